"""What of a file lies in the page cache: all of it, or none."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from planner.units import MIB


def warm(paths: Iterable[Path]) -> None:
    """Read into the page cache what is not there: a virtual machine's host may take it back within a minute."""
    piece = bytearray(8 * MIB)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass


def drop(path: Path, offset_bytes: int = 0, size_bytes: int = 0) -> None:
    """Take a part of a file out of the page cache; size 0: up to its end."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, offset_bytes, size_bytes, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
