"""How fast files are read by one and by several threads, as executor/files.py shares a read; prints Markdown.

    python benchmarks/readers.py FILE [--readers 1 2 4] [--rounds 5]

In pieces of 64 MiB into a ring of three, as beside a card: from the page cache, and after the file was put out of it.
Nothing else runs meanwhile, which is how it is where steps run on a card. Medians of rounds that take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import closing
from pathlib import Path

from page_cache import drop

from executor.files import Files
from executor.queues import PIECE_BYTES, RING_PIECES

MOST_BYTES = 2 * 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    size = min(options.file.stat().st_size, MOST_BYTES)
    ring = memoryview(bytearray(RING_PIECES * PIECE_BYTES))
    found: dict[tuple[bool, int], list[float]] = {}
    for _ in range(options.rounds):
        for cold in (True, False):
            for readers in options.readers:
                if cold:
                    drop(options.file)
                seconds = read(options.file, size, ring, readers)
                found.setdefault((cold, readers), []).append(size / seconds / 1e9)
    print("| threads | cold disk | page cache |")
    print("|--:|--:|--:|")
    for readers in options.readers:
        rates = (statistics.median(found[cold, readers]) for cold in (True, False))
        print(f"| {readers} | " + " | ".join(f"{rate:.1f} GB/s" for rate in rates) + " |")


def read(path: Path, size: int, ring: memoryview, readers: int) -> float:
    """Seconds of the whole."""
    with closing(Files(readers)) as files:
        start = time.perf_counter()
        for number, offset in enumerate(range(0, size, PIECE_BYTES)):
            at = number % RING_PIECES * PIECE_BYTES
            files.read(path, offset, [ring[at : at + min(PIECE_BYTES, size - offset)]])
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
