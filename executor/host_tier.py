"""Weights that stay in pinned host memory once they were read: later copies take them from there, not from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from executor.device import Chunk, Range
from executor.files import Files
from planner.errors import OutOfMemory
from planner.plan.program import HostUnit
from planner.units import MIB, format_gib

# a power of two, as the pinned allocator rounds up to one; a unit may lie across pieces
HOST_PIECE_BYTES = 256 * MIB


class Move(NamedTuple):
    """Bytes on their way from pinned host memory to a range of the arena of the same length."""

    target: Range
    source: Tensor


class HostTier:
    """Pinned pieces one behind another, as one range of bytes in which each kept unit has its place."""

    def __init__(
        self,
        units: Sequence[HostUnit],
        pin: Callable[[int], Tensor],
        *,
        piece_bytes: int = HOST_PIECE_BYTES,
    ) -> None:
        self._piece_bytes = piece_bytes
        self.filled: set[str] = set()  # units that were read
        self._start = {unit.unit: unit.offset_bytes for unit in units}
        self._size = max((unit.offset_bytes + unit.size_bytes for unit in units), default=0)
        self._pin = pin
        self._pieces: list[Tensor] = []

    def __contains__(self, unit: str) -> bool:
        return unit in self._start

    def start(self, unit: str) -> int:
        """Where the unit's place begins; its chunks lie there one behind another."""
        return self._start[unit]

    def read(self, at: int, chunk: Chunk, files: Files) -> None:
        """Fill the place of a chunk, which begins at `at`, from its file; OutOfMemory where more pinned memory is refused."""
        self._reach(at + chunk.size_bytes)
        parts = [part.numpy().data for part in self._between(at, at + chunk.size_bytes)]
        files.read(chunk.path, chunk.offset_bytes, parts)

    def _reach(self, end: int) -> None:
        """Have pieces for the bytes before `end`; pinning takes time, so each is taken when it is first used."""
        while len(self._pieces) * self._piece_bytes < end:
            try:
                self._pieces.append(self._pin(self._piece_bytes))
            except RuntimeError as error:
                raise OutOfMemory(
                    f"{format_gib(self._size)} of pinned host memory for weights were refused after "
                    f"{format_gib(len(self._pieces) * self._piece_bytes)}: {error}; plan with a smaller --ram"
                ) from None

    def moves(self, at: int, chunk: Chunk) -> list[Move]:
        """From the place of a chunk, which begins at `at`, to the ranges that it names."""
        found = []
        for start, stop in chunk.targets:
            for source in self._between(at, at + stop - start):
                found.append(Move((start, start + source.numel()), source))
                start += source.numel()
                at += source.numel()
        return found

    def _between(self, start: int, stop: int) -> Iterator[Tensor]:
        """The pinned bytes `[start, stop)`, cut where pieces end."""
        while start < stop:
            piece, low = divmod(start, self._piece_bytes)
            high = min(low + stop - start, self._piece_bytes)
            yield self._pieces[piece][low:high]
            start += high - low

    @property
    def pinned(self) -> tuple[Tensor, ...]:
        """The pieces."""
        return tuple(self._pieces)

    def close(self) -> None:
        """Give the pieces back; no move may be under way."""
        self._pieces.clear()
