"""The queue logic of a device that works behind the host's back: marks, waits, and the ring of pinned pieces.

`cuda.py` runs it on a card's streams, the tests on queues that run as late, or as early, as the waits allow. Every
wait that such a device has stands in this file:

- a queue waits for a mark of the other (`compute_waits`, `copy_waits`);
- the host waits until a pinned piece's last move has left it, before it reads the next part of a file into it (`fill`);
- the host waits for the compute queue before it reads what steps wrote (`host_waits`), and for both at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from executor.device import Chunk, Mark
from executor.files import Files, readers_beside_a_card
from executor.host_tier import HOST_PIECE_BYTES, HostTier, Move
from planner.errors import OutOfMemory
from planner.plan.program import HostUnit
from planner.units import MIB

PIECE_BYTES = 64 * MIB  # a power of two: the pinned allocator rounds up to one
RING_PIECES = 3  # one being read, one being moved, one in between


class Event(Protocol):
    """A point in a queue."""

    def synchronize(self) -> None:
        """Hold the host until the queue has come to it."""
        ...


class Stream(Protocol):
    """A queue: what is put in it runs in order, later than the host puts it there."""

    def record_event(self) -> Any: ...

    def wait_event(self, event: Any) -> None:
        """What is put in from now on runs after the event."""
        ...

    def synchronize(self) -> None:
        """Hold the host until all that was put in has run."""
        ...


class Streams(Protocol):
    """What a runtime brings: two queues, pinned host memory, and moves from there into the arena."""

    @property
    def compute(self) -> Stream: ...

    @property
    def copy(self) -> Stream: ...

    def pin(self, size_bytes: int) -> Tensor:
        """Host memory, uint8, that moves may read while the host goes on; RuntimeError where it is refused."""
        ...

    def move(self, moves: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Put (target in the arena, pinned source) of the same length into the copy queue, in order."""
        ...


@dataclass(slots=True)
class RingPiece:
    """One pinned piece of the ring, and the event after which it may be filled anew; None before its first use."""

    pinned: Tensor
    view: memoryview
    free: Event | None = None


class Queued:
    """The part of the device protocol that two queues and a ring make up."""

    def __init__(
        self,
        streams: Streams,
        *,
        piece_bytes: int = PIECE_BYTES,
        pieces: int = RING_PIECES,
        host_piece_bytes: int = HOST_PIECE_BYTES,
    ) -> None:
        self._streams = streams
        self._piece_bytes = piece_bytes
        self._host_piece_bytes = host_piece_bytes
        self._host: HostTier | None = None
        self._pieces = pieces
        self._arena: Tensor | None = None
        self._ring: list[RingPiece] = []
        self._next = 0
        self.readers = readers_beside_a_card()

    def fill_ring(self) -> None:
        """Take the pinned pieces; OutOfMemory where they are refused."""
        try:
            for _ in range(self._pieces):
                pinned = self._streams.pin(self._piece_bytes)
                self._ring.append(RingPiece(pinned, pinned.numpy().data))
        except RuntimeError as error:
            raise OutOfMemory(
                f"{self._pieces} pinned pieces of {self._piece_bytes // MIB} MiB of host memory were refused: {error}"
            ) from None

    def pinned(self) -> tuple[Tensor, ...]:
        """All pinned host memory that is held."""
        kept = () if self._host is None else self._host.pinned
        return (*(piece.pinned for piece in self._ring), *kept)

    def drop_ring(self) -> None:
        """Give the pinned pieces and the host tier back; no move may be under way."""
        for piece in self._ring:
            piece.view.release()
        self._ring.clear()
        if self._host is not None:
            self._host.close()

    def allocator_peaks(self) -> tuple[int, int] | None:
        return None

    def issue(self, call: Callable[[], None]) -> None:
        call()  # its kernels go into the current stream

    def mark_compute(self) -> Mark:
        return self._streams.compute.record_event()

    def mark_copy(self) -> Mark:
        return self._streams.copy.record_event()

    def compute_waits(self, mark: Mark) -> None:
        self._streams.compute.wait_event(mark)

    def copy_waits(self, mark: Mark) -> None:
        self._streams.copy.wait_event(mark)

    def host_waits(self) -> None:
        self._streams.compute.synchronize()

    def fill(self, chunk: Chunk, files: Files) -> None:
        assert self._arena is not None, "the arena comes before the first copy"
        for offset_bytes, size_bytes, moves in pieces_of(chunk, self._piece_bytes):
            piece = self._ring[self._next]
            self._next = (self._next + 1) % len(self._ring)
            self.piece_waits(piece)
            files.read(chunk.path, offset_bytes, [piece.view[:size_bytes]])
            self._streams.move(
                [
                    (self._arena[start:stop], piece.pinned[at : at + stop - start])
                    for at, start, stop in moves
                ]
            )
            piece.free = self._streams.copy.record_event()

    def host_tier(self, units: Sequence[HostUnit]) -> HostTier:
        self._host = HostTier(units, self._streams.pin, piece_bytes=self._host_piece_bytes)
        return self._host

    def move(self, moves: Sequence[Move]) -> None:
        assert self._arena is not None, "the arena comes before the first copy"
        self._streams.move([(self._arena[slice(*move.target)], move.source) for move in moves])

    def piece_waits(self, piece: RingPiece) -> None:
        """Hold the host until the piece's last move has left it."""
        if piece.free is not None:
            piece.free.synchronize()


class Part(NamedTuple):
    """One pinned piece's share of a chunk: a read of the file, then moves of (offset in the piece, arena start, arena stop)."""

    offset_bytes: int
    size_bytes: int
    moves: tuple[tuple[int, int, int], ...]


def pieces_of(chunk: Chunk, piece_bytes: int) -> list[Part]:
    """The chunk cut into parts of at most `piece_bytes`, in order."""
    parts: list[Part] = []
    offset_bytes, at = chunk.offset_bytes, 0
    moves: list[tuple[int, int, int]] = []
    for start, stop in chunk.targets:
        while start < stop:
            take = min(stop - start, piece_bytes - at)
            moves.append((at, start, start + take))
            start, at = start + take, at + take
            if at == piece_bytes:
                parts.append(Part(offset_bytes, at, tuple(moves)))
                offset_bytes, at, moves = offset_bytes + at, 0, []
    if moves:
        parts.append(Part(offset_bytes, at, tuple(moves)))
    return parts
