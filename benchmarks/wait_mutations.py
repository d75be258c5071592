"""Every wait of the executor left out by itself on the hostile device; prints a Markdown table.

    python benchmarks/wait_mutations.py [--setting NAME]... [--ring-every N] [--seeds N]

For every plan of a grid over the levers: all orders of the queues must give the plain CPU's answer, bit for bit. Then
each wait is left out: of the plan, of the device's queues, of the host. Where a graph of what surely comes before what
says that something may now meet on the same bytes, some order must give another answer; where the other waits imply
it, none may. About 10 minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.hostile.lab import SETTINGS, Lab
from tests.hostile.scheduler import policies
from tests.hostile.table import markdown, verdicts


def main() -> int:
    """0 where every order gives the answer and every verdict holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--setting", action="append", choices=list(SETTINGS), help="all without it")
    parser.add_argument("--ring-every", type=int, default=1, help="of the ring's waits one in N")
    parser.add_argument("--seeds", type=int, default=50, help="of the right plans' runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, wrong = [], 0
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        print("| plan | steps | copies | orders | equal answers |\n|---|--:|--:|--:|--:|")
        for name in options.setting or SETTINGS:
            plan = lab.plan(name)
            runs = [
                lab.hostile(name, policy).equals(lab.expected(name))
                for _, policy in policies(options.seeds, every_rank=True)
            ]
            wrong += len(runs) - sum(runs)
            counts = f"{len(plan.steps)} | {len(plan.copies)} | {len(runs)} | {sum(runs)}"
            print(f"| {name} | {counts} |", flush=True)
            for verdict in verdicts(lab, name, every=options.ring_every):
                found.append(verdict)
                if not verdict.holds:
                    print(
                        f"does not hold: {verdict.mutant.sort}: {verdict.mutant.name}",
                        file=sys.stderr,
                    )
    print(f"\n{markdown(found)}")
    return 1 if wrong or not all(verdict.holds for verdict in found) else 0


if __name__ == "__main__":
    sys.exit(main())
