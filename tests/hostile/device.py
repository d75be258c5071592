"""A device with a card's rules on the CPU: steps and moves run later than they are put in their queues, when the scheduler says.

Marks, waits and the ring are `executor.queues`, as on a card. What nobody may read is NaN: a ring piece from the moment
it is to be refilled, an arena range while a move into it is under way, and (by the run itself) dead arena ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from executor.device import Chunk, Range
from executor.files import Files
from executor.host_tier import HostTier
from executor.queues import Queued, RingPiece
from planner.plan.program import HostUnit
from tests.hostile.scheduler import LANDING, Scheduler

PAGE_BYTES = 4096
PIECE_BYTES = 16 * 1024  # units of a tiny model take several pieces

# a wait that the device can leave out: ("device", "step waits", copy id) and the like, see waits.py
Wait = tuple[Any, ...]


class Event:
    """`label` says which wait of the plan the mark is for."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.done = False
        self.label: Any = None

    def reach(self) -> None:
        self.done = True

    def synchronize(self) -> None:
        self._scheduler.pause(lambda: self.done)


class Stream:
    def __init__(self, scheduler: Scheduler, name: str) -> None:
        self._scheduler = scheduler
        self._name = name

    def record_event(self) -> Event:
        event = Event(self._scheduler)
        self.put(event.reach)
        return event

    def wait_event(self, event: Event) -> None:
        self.put(_nothing, lambda: event.done)

    def synchronize(self) -> None:
        self._scheduler.drain(self._name)

    def put(
        self, call: Callable[[], None], ready: Callable[[], bool] | None = None, *, name: str = ""
    ) -> None:
        self._scheduler.put(self._name, call, ready, name=name)
        self._scheduler.pause()


class Streams:
    """The scheduler's two queues; pinned memory is plain memory, which a late move reads late."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.compute = Stream(scheduler, "compute")
        self.copy = Stream(scheduler, "copy")

    def pin(self, size_bytes: int) -> Tensor:
        return torch.full((size_bytes,), 0xFF, dtype=torch.uint8)

    def move(self, moves: Sequence[tuple[Tensor, Tensor]]) -> None:
        # two entries: between them the move is under way
        self.copy.put(partial(_poison, [target for target, _ in moves]))
        self.copy.put(partial(_move, moves), name=LANDING)


class HostileDevice(Queued):
    """Calls itself a CPU, so that the plan's kernels run. Leaves out the waits in `without`."""

    kind: Literal["cpu"] = "cpu"
    name = "hostile"
    torch_device = torch.device("cpu")

    def __init__(self, scheduler: Scheduler, *, without: Collection[Wait] = ()) -> None:
        streams = Streams(scheduler)
        super().__init__(streams, piece_bytes=PIECE_BYTES)
        self._scheduler = scheduler
        self._hostile = streams
        self._without = set(without)
        self._counts: dict[str, int] = {}

    def _leaves_out(self, what: str) -> bool:
        """Whether this, the n-th wait of its sort, is to be left out."""
        number = self._counts[what] = self._counts.get(what, -1) + 1
        return (what, number) in self._without

    # memory
    def allocate_arena(self, size_bytes: int) -> Tensor:
        whole = torch.full((size_bytes + PAGE_BYTES,), 0, dtype=torch.uint8)
        start = -whole.data_ptr() % PAGE_BYTES  # as on the CPU: kernels may go by alignment
        self._arena = whole[start : start + size_bytes]
        self.fill_ring()
        return self._arena

    def reserve_outside(self, size_bytes: int) -> None: ...

    def cap(self, budget_bytes: int) -> None: ...

    def reset_peak(self) -> None: ...

    def peak_bytes(self) -> None: ...

    def held_bytes(self) -> None: ...

    def free_bytes(self) -> None: ...

    def context_bytes(self) -> None: ...

    def allocated_peak(self, call: Callable[[], None]) -> int:
        call()
        return 0

    def release(self, ranges: Sequence[Range]) -> None: ...

    def resident_bytes(self, ranges: Sequence[Range]) -> None: ...

    def notes(self) -> tuple[str, ...]:
        return ()

    # queues
    def issue(self, call: Callable[[], None]) -> None:
        self._hostile.compute.put(call)

    def mark_compute(self) -> Event:
        return self._labelled(super().mark_compute(), "step")

    def mark_copy(self) -> Event:
        return self._labelled(super().mark_copy(), "copy")

    def _labelled(self, event: Event, queue: str) -> Event:
        number = self._counts[queue] = self._counts.get(queue, -1) + 1
        event.label = number
        return event

    def compute_waits(self, mark: Event) -> None:
        # the wait belongs to the step that is marked next
        if ("step waits", self._counts.get("step", -1) + 1, mark.label) not in self._without:
            super().compute_waits(mark)

    def copy_waits(self, mark: Event) -> None:
        if ("copy waits", self._counts.get("copy", -1) + 1) not in self._without:
            super().copy_waits(mark)

    def host_waits(self) -> None:
        if not self._leaves_out("host reads"):
            super().host_waits()

    def piece_waits(self, piece: RingPiece) -> None:
        if piece.free is not None and not self._leaves_out("ring"):
            super().piece_waits(piece)

    def fill(self, chunk: Chunk, files: Files) -> None:
        super().fill(chunk, _Reads(files, self._scheduler))

    def host_tier(self, units: Sequence[HostUnit]) -> HostTier:
        self._host = _Kept(units, self._streams.pin, piece_bytes=PIECE_BYTES)
        self._host.scheduler = self._scheduler
        return self._host

    def synchronize(self) -> None:
        if not self._leaves_out("synchronize"):
            self._drain()

    # clock
    def tick(self) -> float:
        return 0.0

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def _drain(self) -> None:
        self._hostile.compute.synchronize()
        self._hostile.copy.synchronize()

    def close(self) -> None:
        self._drain()
        self.drop_ring()
        self._arena = None


class _Kept(HostTier):
    """Places of kept units, into which reads take time too."""

    scheduler: Scheduler

    def read(self, at: int, chunk: Chunk, files: Files) -> None:
        super().read(at, chunk, _Reads(files, self.scheduler))


class _Reads(Files):
    """Reads that take time: the piece is NaN first, and full after the others had their chance."""

    def __init__(self, files: Files, scheduler: Scheduler) -> None:
        super().__init__()
        self._files = files
        self._scheduler = scheduler

    def read(self, path: Path, offset_bytes: int, targets: Sequence[memoryview]) -> None:
        for target in targets:
            target[:] = b"\xff" * len(target)
        self._scheduler.pause()
        self._files.read(path, offset_bytes, targets)
        self._scheduler.pause()


def _poison(targets: Sequence[Tensor]) -> None:
    for target in targets:
        target.fill_(0xFF)


def _move(moves: Sequence[tuple[Tensor, Tensor]]) -> None:
    for target, source in moves:
        target.copy_(source)


def _nothing() -> None: ...
