"""What the probe measures with: memory like the arena's, given out in turn, the clock, and who else is busy."""

from __future__ import annotations

import itertools
import math
import mmap
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from executor import memory
from planner.errors import RunFailed
from planner.plan.words import Kernel
from planner.profile import Curve
from planner.units import GIB, MIB

DISTURBED = 0.2  # of the cores, taken by others meanwhile: then a figure is measured again
DISTURBED_S = 0.05  # less than that the counters, which tick every 10 ms, do not tell
TRIES = 3
CUDA_BATCH = 10


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured; `short` takes seconds, for tests.

    weights: (fan-in, fan-out) of products, by rising product; both ways round where they differ. heads: (head size,
    query heads, key heads).
    """

    weights: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    footprints: tuple[int, ...]
    heads: tuple[tuple[int, int, int], ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    squares: tuple[int, ...]
    windows: tuple[int, ...]
    cached: tuple[int, ...]
    widths: tuple[int, ...]
    elements: tuple[int, ...]
    buffer_bytes: int
    seconds: float  # for one figure, at least; slow calls take longer
    most_flops: float


FULL = Sizes(
    weights=(
        *((64, 64), (256, 256), (640, 640), (640, 1716), (1280, 1280)),
        *((1280, 3420), (2048, 11008)),
    ),
    rows=(16, 64, 256, 1024, 4096),
    footprints=(2 * MIB, 32 * MIB, 512 * MIB),
    heads=((16, 4, 2), (80, 16, 16), (128, 16, 2)),
    queries=(64, 256, 1024, 2048),
    keys=(256, 1024, 4096),
    squares=(16, 64, 256, 512, 1024, 2048),
    windows=(16, 64),
    cached=(64, 512, 2048, 8192),
    widths=(64, 640, 1280, 3584),
    elements=(64, 4096, 32768, 131072, 655360, 3145728, 12582912),
    buffer_bytes=512 * MIB,
    seconds=0.02,
    most_flops=2e11,
)

SHORT = Sizes(
    weights=((64, 64), (256, 256)),
    rows=(16, 256),
    footprints=(1 * MIB, 8 * MIB),
    heads=((16, 4, 2),),
    queries=(64, 256),
    keys=(256, 512),
    squares=(64, 256),
    windows=(16, 64),
    cached=(64, 512),
    widths=(64,),
    elements=(64, 4096, 65536),
    buffer_bytes=32 * MIB,
    seconds=0.002,
    most_flops=1e9,
)


class Bench:
    """Memory to measure on, given out in turn, and the clock."""

    def __init__(
        self,
        memory: Tensor,
        sizes: Sizes,
        kernel: Kernel,
        synchronize: Callable[[], None],
        on_progress: Callable[[str], None] = lambda what: None,
    ) -> None:
        """`memory`: uint8, on the device."""
        self.memory, self.sizes, self.kernel = memory, sizes, kernel
        self.synchronize, self.say = synchronize, on_progress
        self._next = 0
        self._noise = torch.empty(MIB // 2, dtype=torch.bfloat16).normal_(0, 0.05).to(memory.device)
        self.refill(0)

    @property
    def device(self) -> torch.device:
        return self.memory.device

    def refill(self, start_bytes: int) -> None:
        """Small numbers everywhere from there on, read as 16 bits."""
        rest = self.memory[start_bytes // 2 * 2 : self.memory.numel() // 2 * 2].view(torch.bfloat16)
        for start in range(0, rest.numel(), self._noise.numel()):
            part = rest[start : start + self._noise.numel()]
            part.copy_(self._noise[: part.numel()])

    def take(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A view of memory that was not given out for long; what is in it are small numbers, if of 16 bits."""
        size = math.prod(shape) * dtype.itemsize
        if size > self.memory.numel():
            raise ValueError(f"{shape} does not fit the buffer of {self.memory.numel()} bytes")
        if self._next + size > self.memory.numel():
            self._next = 0
        start, self._next = self._next, -(-(self._next + size) // 512) * 512
        return self.memory[start : start + size].view(dtype).view(*shape)

    def numbers(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """The same, filled with small random numbers."""
        found = self.take(*shape, dtype=dtype)
        seed = torch.empty(min(found.numel(), 65536), device=self.device).normal_(0, 0.05).to(dtype)
        flat = found.view(-1)
        for start in range(0, flat.numel(), seed.numel()):
            part = flat[start : start + seed.numel()]
            part.copy_(seed[: part.numel()])
        return found

    def seconds(
        self, call: Callable[[], object], before: Callable[[], object] | None = None
    ) -> float:
        """The median of one call, after one that does not count; `before` is not timed."""
        tries = []
        for _ in range(TRIES):
            busy = Busy()
            tries.append(self._seconds(call, before))
            others = busy.of_others()
            if others is None or others[0] <= max(DISTURBED * others[1], DISTURBED_S):
                break
        return min(tries)

    def _seconds(self, call: Callable[[], object], before: Callable[[], object] | None) -> float:
        found: list[float] = []
        begun = 0.0
        # on a card calls queue up behind one another: the wait for the last is no part of each
        batch = CUDA_BATCH if self.device.type == "cuda" and before is None else 1
        for number in itertools.count():
            if before is not None:
                before()
            self.synchronize()
            start = time.perf_counter()
            for _ in range(batch):
                call()
            self.synchronize()
            stop = time.perf_counter()
            if number == 0:
                begun = stop
                continue
            found.append((stop - start) / batch)
            enough = stop - begun >= self.sizes.seconds and len(found) >= 3
            if enough or len(found) >= 500 or stop - begun >= 20 * self.sizes.seconds:
                return statistics.median(found)
        raise AssertionError

    def curve(self, seconds: Callable[[int], float], sizes: Sequence[int]) -> Curve:
        return tuple((size, seconds(size)) for size in sizes)


class Busy:
    """How much of the cores other processes took since it was made, by the system's counters."""

    def __init__(self) -> None:
        self._before = self._read()

    def _read(self) -> tuple[float, float, float] | None:
        """(busy, own, all) seconds."""
        try:
            with open("/proc/stat", encoding="ascii") as file:
                fields = [int(word) for word in file.readline().split()[1:9]]
        except (OSError, ValueError):
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        total = sum(fields)
        return (total - fields[3] - fields[4]) / ticks, own, total / ticks

    def of_others(self) -> tuple[float, float] | None:
        """Seconds that others were busy, and of all cores; None where the system does not tell."""
        after = self._read()
        if self._before is None or after is None:
            return None
        busy, own, total = (now - then for now, then in zip(after, self._before, strict=True))
        return max(0.0, busy - own), total


def buffer(size_bytes: int, device: torch.device) -> tuple[Tensor, object]:
    """Memory as the arena's: on the CPU private pages of the ordinary size."""
    if device.type == "cuda":
        return torch.empty(size_bytes, dtype=torch.uint8, device=device), None
    available = memory.available_bytes()
    if available is not None and available < size_bytes + GIB // 2:
        raise RunFailed(
            f"--probe: wanted {(size_bytes + GIB // 2) / GIB:.1f} GiB of free memory, "
            f"the system has {available / GIB:.1f}; close other programs"
        )
    mapping = pages(size_bytes)
    return torch.frombuffer(mapping, dtype=torch.uint8), mapping


def pages(size_bytes: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size_bytes)
    mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):
            mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return mapping


def best(call: Callable[[], object], size_bytes: int, repeats: int) -> int:
    """Units per second, the best of some repeats."""
    return max(1, round(size_bytes / min(_laps(call, repeats))))


def typical(call: Callable[[], object], size_bytes: int, repeats: int) -> int:
    """Units per second, the median of some repeats after one that does not count."""
    return max(1, round(size_bytes / statistics.median(_laps(call, repeats + 1)[1:])))


def _laps(call: Callable[[], object], repeats: int) -> list[float]:
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found
