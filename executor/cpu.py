"""The CPU as a device: the arena is an anonymous private mapping, copies are `preadv` into it, the peak is VmHWM."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from executor import memory
from executor.device import Chunk, Mark, Range
from executor.files import Files
from executor.host_tier import HostTier, Move
from planner.errors import OutOfMemory
from planner.plan.program import HostUnit
from planner.units import MIB, format_gib

# room under RLIMIT_DATA for what is mapped but never touched: the reader's stack and malloc's arena
LIMIT_SLACK_BYTES = 24 * MIB


class CpuDevice:
    """Work is done when it is issued, so there is nothing to mark or to wait for."""

    kind: Literal["cpu"] = "cpu"
    name = "cpu"
    torch_device = torch.device("cpu")
    readers = 1  # steps want all cores

    def __init__(self, *, limit_data: bool = False) -> None:
        self._limit_data = limit_data
        self._limit_before: int | None = None
        self._mapping: mmap.mmap | None = None
        self._bytes: memoryview | None = None
        self._address = 0
        self._size_bytes = 0
        self._resets = True

    # memory
    def allocate_arena(self, size_bytes: int) -> Tensor:
        self._size_bytes, size_bytes = size_bytes, _up(size_bytes)
        available = self.free_bytes()
        if available is not None and size_bytes > available:
            raise OutOfMemory(
                f"the arena needs {format_gib(size_bytes)}, the system has {format_gib(available)} free; "
                "close other programs or plan for a smaller budget"
            )
        try:
            self._mapping = mapping = _map(size_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise OutOfMemory(
                f"the arena needs {format_gib(size_bytes)}, and the system refused the mapping: {error}"
            ) from None
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            try:
                # one touched byte must cost one page, not 2 MiB, or residency is not what the plan counts
                mapping.madvise(mmap.MADV_NOHUGEPAGE)
            except OSError:
                pass  # a kernel without huge pages
        self._bytes = memoryview(mapping)
        arena = torch.frombuffer(mapping, dtype=torch.uint8)
        self._address = arena.data_ptr()
        return arena

    def reserve_outside(self, size_bytes: int) -> None:
        pass  # malloc gives freed blocks back, there is nothing to reserve

    def cap(self, budget_bytes: int) -> None:
        held, mapped = self.held_bytes(), memory.data_bytes()
        if not self._limit_data or held is None or mapped is None or self._bytes is None:
            return
        # what is mapped now holds the arena whole; beyond it only the rest of the budget may be mapped
        untouched = len(self._bytes) - (self.resident_bytes([(0, len(self._bytes))]) or 0)
        room = max(0, budget_bytes - held - untouched)
        self._limit_before = memory.limit_data(mapped + room + LIMIT_SLACK_BYTES)

    def reset_peak(self) -> None:
        self._resets = memory.reset_peak() and self._resets

    def peak_bytes(self) -> int | None:
        reading = memory.read_memory()
        # the kernel sums both from counters per core, which drift by some pages
        return max(reading.peak_bytes, reading.rss_bytes) if reading else None

    def held_bytes(self) -> int | None:
        reading = memory.read_memory()
        return reading.rss_bytes if reading else None

    def free_bytes(self) -> int | None:
        return memory.available_bytes()

    def context_bytes(self) -> int | None:
        held = self.held_bytes()
        if held is None:
            return None
        return held - (self.resident_bytes([(0, self._size_bytes)]) or 0)

    def allocator_peaks(self) -> None:
        return None

    def allocated_peak(self, call: Callable[[], None]) -> int:
        """From the profiler's memory events, which also see buffers inside kernels.

        The profiler keeps about 80 MiB for itself: /proc tells nothing of use after its first run.
        """
        # read at the first use; without it each call prints two lines of the profiler's own on stderr
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        with profile(profile_memory=True) as profiler:
            call()
        results = profiler.kineto_results
        assert results is not None
        events = [event for event in results.events() if event.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        return peak

    def release(self, ranges: Sequence[Range]) -> None:
        if self._mapping is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        for start, stop in ranges:
            start = _up(start)
            if stop >= self._size_bytes:
                stop = len(self._mapping)  # the last page is nobody else's
            else:
                stop = stop // memory.PAGE_BYTES * memory.PAGE_BYTES
            if stop > start:
                self._mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def resident_bytes(self, ranges: Sequence[Range]) -> int | None:
        mincore = getattr(memory.libc(), "mincore", None) if hasattr(mmap, "MAP_PRIVATE") else None
        if mincore is None:
            return None
        page, total = memory.PAGE_BYTES, 0
        for start, stop in ranges:
            start, stop = start // page * page, _up(stop)
            if stop <= start:
                continue
            # no array type of this length, which would be one more class for every length
            flags = bytearray((stop - start) // page)
            first = ctypes.byref(ctypes.c_char.from_buffer(flags))
            address = ctypes.c_void_p(self._address + start)
            if mincore(address, ctypes.c_size_t(stop - start), first) != 0:
                return None
            # bit 0 alone is defined; the kernel sets the byte to 1
            total += flags.count(1) * page
        return total

    def notes(self) -> tuple[str, ...]:
        found = []
        if memory.read_memory() is None:
            found.append("this system has no /proc/self/status: device peaks were not recorded")
        elif not self._resets:
            found.append(
                "VmHWM could not be reset here: a phase's peak includes those of the phases before it"
            )
        return tuple(found)

    # queues
    def issue(self, call: Callable[[], None]) -> None:
        call()

    def host_waits(self) -> None:
        pass

    def mark_compute(self) -> Mark:
        return None

    def mark_copy(self) -> Mark:
        return None

    def compute_waits(self, mark: Mark) -> None:
        pass

    def copy_waits(self, mark: Mark) -> None:
        pass

    def fill(self, chunk: Chunk, files: Files) -> None:
        assert self._bytes is not None, "the arena comes before the first copy"
        files.read(
            chunk.path,
            chunk.offset_bytes,
            [self._bytes[start:stop] for start, stop in chunk.targets],
        )

    def host_tier(self, units: Sequence[HostUnit]) -> HostTier:
        return HostTier(units, lambda size_bytes: torch.empty(size_bytes, dtype=torch.uint8))

    def move(self, moves: Sequence[Move]) -> None:
        assert self._bytes is not None, "the arena comes before the first copy"
        for (start, stop), source in moves:
            self._bytes[start:stop] = source.numpy().data

    def synchronize(self) -> None:
        pass

    # clock
    def tick(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def close(self) -> None:
        if self._limit_before is not None:
            memory.lift_limit(self._limit_before)
            self._limit_before = None
        if self._mapping is None:
            return
        # views that someone still holds keep the mapping; its pages go now all the same
        self.release([(0, len(self._mapping))])
        if self._bytes is not None:
            self._bytes.release()
        self._mapping = self._bytes = None


def _map(size_bytes: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size_bytes)  # Windows


def _up(size_bytes: int) -> int:
    return -(-size_bytes // memory.PAGE_BYTES) * memory.PAGE_BYTES
