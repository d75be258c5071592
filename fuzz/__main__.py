"""`python -m fuzz [--cases N] [--jobs N] [target ...]`: every reader on spoilt input; exit code 1 where something was found."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from fuzz.run import run_limited
from fuzz.targets import TARGETS

BLOCK = 5000  # cases of one task


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="target", help=", ".join(TARGETS))
    parser.add_argument(
        "--cases", type=int, default=100_000, help="of each target (default: 100000)"
    )
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first case (default: 0)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument(
        "--keep",
        type=Path,
        default=Path("fuzz-found"),
        help="folder for inputs that found something",
    )
    options = parser.parse_args()
    unknown = set(options.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no target {', '.join(sorted(unknown))}; there are: {', '.join(TARGETS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    last = options.first + options.cases
    begin, found = time.monotonic(), 0
    # a fresh process: forked threads would be a fault of the fuzzer
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        started = {
            name: [
                pool.submit(run_limited, name, first, min(first + BLOCK, last))
                for first in range(options.first, last, BLOCK)
            ]
            for name in options.targets or TARGETS
        }
        print(f"{'target':<12} {'cases':>8} {'read':>8} {'refused':>8} {'seconds':>8}  errors")
        for name, blocks in started.items():
            tallies = [block.result() for block in blocks]
            refused = sum((tally.refused for tally in tallies), Counter[str]())
            print(
                f"{name:<12} {sum(t.cases for t in tallies):>8} {sum(t.read for t in tallies):>8} "
                f"{refused.total():>8} {sum(t.seconds for t in tallies):>8.1f}  "
                + ", ".join(f"{kind} {count}" for kind, count in refused.most_common()),
                flush=True,
            )
            for finding in (finding for tally in tallies for finding in tally.findings):
                found += 1
                options.keep.mkdir(exist_ok=True)
                file = options.keep / f"{finding.target}-{finding.number}"
                file.write_bytes(finding.data)
                print(f"{file}:\n{finding.what}", flush=True)
    print(f"{found} findings in {time.monotonic() - begin:.0f} s", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
