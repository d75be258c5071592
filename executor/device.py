"""The protocol between the executor and a device: memory, two queues, a clock. `cpu.py` and `cuda.py` implement it.

Compute is issued by the main thread, copies by the reader thread (weights.py). A *mark* is a point in one of the two
queues; the other queue can be made to wait for it. On the CPU work is done when it is issued, so marks are None; on
CUDA they are events. The host-side order (which step was issued, which copy was issued) is the Reader's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from executor.files import Files

if TYPE_CHECKING:
    from executor.host_tier import HostTier, Move
    from planner.plan.program import HostUnit

Mark = Any  # None, or a torch.cuda.Event
Tick = Any  # seconds as float, or a torch.cuda.Event
Range = tuple[int, int]  # [start, stop) in bytes of the arena


class Chunk(NamedTuple):
    """One contiguous read of a file, scattered to arena ranges in order."""

    path: Path
    offset_bytes: int
    targets: tuple[Range, ...]

    @property
    def size_bytes(self) -> int:
        return sum(stop - start for start, stop in self.targets)


class Device(Protocol):
    """Where a plan runs. One arena; compute and copy queues; peaks as the system sees them."""

    @property
    def kind(self) -> Literal["cpu", "cuda"]: ...

    @property
    def name(self) -> str: ...

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def readers(self) -> int:
        """Threads that read one piece of a file together: processors that steps leave free."""
        ...

    def allocate_arena(self, size_bytes: int) -> Tensor:
        """The one allocation, uint8; OutOfMemory with the numbers where it is refused."""
        ...

    def reserve_outside(self, size_bytes: int) -> None:
        """Take and free one block, so that what kernels take outside the arena is reserved from the start."""
        ...

    def cap(self, budget_bytes: int) -> None:
        """From now on refuse what would pass the budget, as hard as the device can."""
        ...

    # queues
    def issue(self, call: Callable[[], None]) -> None:
        """Put a call in the compute queue. CPU and CUDA call at once; what it works on is decided now, not when it runs."""
        ...

    def host_waits(self) -> None:
        """Hold the host until the compute queue is empty: before it reads what steps wrote."""
        ...

    def mark_compute(self) -> Mark: ...

    def mark_copy(self) -> Mark: ...

    def compute_waits(self, mark: Mark) -> None: ...

    def copy_waits(self, mark: Mark) -> None: ...

    def fill(self, chunk: Chunk, files: Files) -> None:
        """Read one chunk into the arena, in the copy queue; called by the reader thread."""
        ...

    def host_tier(self, units: Sequence[HostUnit]) -> HostTier:
        """Places for units that stay in host memory once they were read; OutOfMemory where it is refused."""
        ...

    def move(self, moves: Sequence[Move]) -> None:
        """Bring bytes of host memory, which nobody writes any more, into the arena, in the copy queue."""
        ...

    def synchronize(self) -> None: ...

    # clock
    def tick(self) -> Tick: ...

    def seconds(self, start: Tick, end: Tick) -> float:
        """Between two ticks; only after `synchronize`."""
        ...

    # memory
    def reset_peak(self) -> None: ...

    def peak_bytes(self) -> int | None:
        """The most that the process held on the device since the last reset; None where nobody tells."""
        ...

    def held_bytes(self) -> int | None: ...

    def free_bytes(self) -> int | None:
        """What the device could still give this process, beyond what it holds; None where nobody tells."""
        ...

    def allocator_peaks(self) -> tuple[int, int] | None:
        """Bytes allocated and bytes reserved at most since the last reset; None where the device has no such allocator."""
        ...

    def allocated_peak(self, call: Callable[[], None]) -> int:
        """The most bytes that torch's allocator had given out at once during the call, beyond those it began with."""
        ...

    def context_bytes(self) -> int | None:
        """Device bytes that are neither the arena's nor the allocator's: driver or interpreter, libraries, their code."""
        ...

    def release(self, ranges: Sequence[Range]) -> None:
        """Give back the whole pages inside ranges of the arena; their content is lost."""
        ...

    def resident_bytes(self, ranges: Sequence[Range]) -> int | None:
        """Arena bytes that the device really holds of these ranges."""
        ...

    def notes(self) -> tuple[str, ...]:
        """What could not be measured here, one sentence each."""
        ...

    def close(self) -> None: ...
