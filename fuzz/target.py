"""What a target is, and the folder in which its inputs become files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple


class Target(NamedTuple):
    """`make(chance)` is one input, `read(input)` what must be done with it in words."""

    make: Callable[[Random], bytes]
    read: Callable[[bytes], object]


class Place:
    """A folder in memory where inputs become files."""

    def __init__(self) -> None:
        shared = Path("/dev/shm")
        self._folder = tempfile.TemporaryDirectory(
            prefix="fuzz-", dir=shared if shared.is_dir() else None
        )
        self.path = Path(self._folder.name)

    def file(self, name: str, data: bytes) -> Path:
        path = self.path / name
        path.write_bytes(data)
        return path

    def close(self) -> None:
        self._folder.cleanup()
