"""Seconds of the executor's kernels on this machine, as tables of a profile.

Every figure is the median of repeated calls of the executor's own functions on memory like the arena's, in the
sub-tiles that the steps use. Weights and activations come from a large buffer in turn, so that they are as far away
as in a run; results that would drift into denormals are made anew before each call.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from executor import text, vision
from executor.attention import attend, attend_rows, merge
from executor.generate import Sampling, generator, next_token, seen_mask
from executor.ops import inverse_frequencies, linear, rms_norm, rotate, rotate_float32
from planner.plan import Kernel
from planner.profile import Curve, Grid, HeadDim, Kernels
from planner.units import MIB

EPS = 1e-6
DISTURBED = (
    0.2  # of the cores, taken by others while a figure was measured: then it is measured again
)
ANGLE_ROWS = (1, 64, 1024, 4096)
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
    seconds=0.03,
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


def kernels(bench: Bench, dtype: torch.dtype) -> Kernels:
    """All tables of one dtype."""
    bench.say(f"products, {str(dtype)[6:]}")
    product, vector = products(bench, dtype), vectors(bench, dtype)
    bench.say(f"attention, {str(dtype)[6:]}")
    attention = tuple(heads(bench, dtype, *head) for head in bench.sizes.heads)
    bench.say(f"passes, {str(dtype)[6:]}")
    return Kernels(
        product=product,
        vector=vector,
        attention=attention,
        passes=passes(bench, dtype),
    )


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


# --- products -----------------------------------------------------------------------------------------------------


def products(bench: Bench, dtype: torch.dtype) -> Grid:
    """Products without bias by rows and weights; what takes too long is put in proportion to fewer rows."""
    sizes = bench.sizes
    found = []
    for rows in sizes.rows:
        row = []
        for fan_in, fan_out in sizes.weights:
            few = rows
            most = sizes.most_flops if dtype.itemsize == 2 else sizes.most_flops / 4
            while few > sizes.rows[0] and 2 * few * fan_in * fan_out > most:
                few //= 2
            ways = {(fan_in, fan_out), (fan_out, fan_in)}
            seconds = statistics.mean(_product(bench, dtype, few, *way) for way in sorted(ways))
            row.append(seconds * rows / few)
        found.append(tuple(row))
    weights = tuple(fan_in * fan_out for fan_in, fan_out in sizes.weights)
    return Grid(first=sizes.rows, second=weights, seconds=tuple(found))


def _product(
    bench: Bench, dtype: torch.dtype, rows: int, fan_in: int, fan_out: int, *, bias: bool = False
) -> float:
    added = bench.numbers(fan_out, dtype=dtype) if bias else None
    half = bench.memory.numel() // 2
    bench.refill(half)
    weights = _cycle(bench, dtype, (fan_out, fan_in), half)
    # in a run rows come from the step before and results are read by the one behind: neither lies in a core's caches
    far = max(1, half // max(512, rows * (fan_in + fan_out) * dtype.itemsize + 1024))
    pairs = itertools.cycle(
        [
            (bench.take(rows, fan_in, dtype=dtype), bench.take(rows, fan_out, dtype=dtype))
            for _ in range(min(far, 256))
        ]
    )

    def call() -> None:
        x, out = next(pairs)
        linear(x, next(weights), added, out=out)

    return bench.seconds(call)


def _cycle(
    bench: Bench, dtype: torch.dtype, shape: tuple[int, ...], footprint_bytes: int
) -> Iterator[Tensor]:
    """Tensors of that shape, in turn, over so many bytes."""
    size = math.prod(shape) * dtype.itemsize
    count = max(1, min(footprint_bytes, bench.memory.numel()) // max(size, 512))
    bench._next = 0
    # the same few views over and over: making one must not be in the clock's way
    views = [bench.take(*shape, dtype=dtype) for _ in range(min(count, 4096))]
    return itertools.cycle(views)


def vectors(bench: Bench, dtype: torch.dtype) -> Grid:
    """One-row products by the bytes between two uses of the same weights, and by weights."""
    found = []
    for footprint in bench.sizes.footprints:
        row = []
        for fan_in, fan_out in bench.sizes.weights:
            seconds = []
            for way in sorted({(fan_in, fan_out), (fan_out, fan_in)}):
                x = torch.empty(1, way[0], dtype=dtype, device=bench.device).normal_()
                out = torch.empty(1, way[1], dtype=dtype, device=bench.device)
                weights = _cycle(bench, dtype, (way[1], way[0]), footprint)
                seconds.append(bench.seconds(partial(_vector, x, weights, out)))
            row.append(statistics.mean(seconds))
        found.append(tuple(row))
    products = tuple(fan_in * fan_out for fan_in, fan_out in bench.sizes.weights)
    return Grid(first=bench.sizes.footprints, second=products, seconds=tuple(found))


def _vector(x: Tensor, weights: Iterator[Tensor], out: Tensor) -> None:
    linear(x, next(weights), None, out=out)


# --- attention ----------------------------------------------------------------------------------------------------


def heads(bench: Bench, dtype: torch.dtype, size: int, count: int, groups: int) -> HeadDim:
    """Attention of `count` heads of that size over `groups` key heads, seconds for one head."""
    sizes, scale = bench.sizes, size**-0.5
    kernel = _kernel_of(bench, dtype)

    def full(rows: int, keys: int) -> float:
        q = bench.numbers(rows, count, size, dtype=dtype)
        k, v = (bench.numbers(keys, groups, size, dtype=dtype) for _ in range(2))
        return bench.seconds(lambda: attend_rows(q, k, v, kernel=kernel, scale=scale)) / count

    def causal(rows: int) -> float:
        q = bench.numbers(rows, count, size, dtype=dtype)
        k, v = (bench.numbers(rows, groups, size, dtype=dtype) for _ in range(2))
        seconds = bench.seconds(
            lambda: attend_rows(q, k, v, kernel=kernel, scale=scale, causal=True)
        )
        return seconds / count

    def window(rows: int) -> float:
        windows = vision.WINDOWS_PER_CALL
        qkv = bench.numbers(windows, rows, 3, count, size, dtype=dtype)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        seconds = bench.seconds(lambda: attend(q, k, v, kernel=kernel, scale=scale))
        return seconds / (windows * count)

    def decode(keys: int) -> float:
        q = bench.numbers(1, count, size, dtype=dtype)
        k, v = (bench.numbers(keys, groups, size, dtype=dtype) for _ in range(2))
        return bench.seconds(lambda: attend_rows(q, k, v, kernel=kernel, scale=scale)) / groups

    def rope(where: str) -> Curve:
        wide = sorted({1, max(1, count // 2), count, 2 * count})
        shapes = [(1, count), *((128, heads) for heads in wide)]
        points = {
            rows * heads * size: _rope(bench, dtype, rows, heads, size, where)
            for rows, heads in shapes
        }
        return tuple(sorted(points.items()))

    def angles(where: str) -> Curve:
        call = _angles_vision if where == "vision" else _angles_text
        return tuple((rows * size // 2, call(bench, dtype, rows, size // 2)) for rows in ANGLE_ROWS)

    return HeadDim(
        head_dim=size,
        full=Grid(
            first=sizes.queries,
            second=sizes.keys,
            seconds=tuple(tuple(full(rows, keys) for keys in sizes.keys) for rows in sizes.queries),
        ),
        causal=bench.curve(causal, sizes.squares),
        window=bench.curve(window, sizes.windows),
        decode=bench.curve(decode, sizes.cached),
        call_s=decode(sizes.cached[0]) * groups,
        rope_vision=rope("vision"),
        rope_text=rope("text"),
        angles_vision=angles("vision"),
        angles_text=angles("text"),
    )


# --- elementwise --------------------------------------------------------------------------------------------------


def passes(bench: Bench, dtype: torch.dtype) -> dict[str, Curve]:
    """Passes over one sub-tile by its elements."""
    sizes = bench.sizes
    # one row, a whole sub-tile of the narrowest, ... of the widest
    norms = sorted({sizes.widths[0], *(256 * width for width in sizes.widths)})
    curves = {
        "norm": bench.curve(lambda n: _norm(bench, dtype, n), norms),
        "bias": bench.curve(lambda n: _bias(bench, dtype, n), sizes.elements[2:-1] or (65536,)),
    }
    for name, call in (
        *(("gate", _gate), ("gelu", _gelu), ("add", _add), ("copy", _copy), ("merge", _merge)),
    ):
        curves[name] = bench.curve(partial(call, bench, dtype), sizes.elements)
    return curves


def _kernel_of(bench: Bench, dtype: torch.dtype) -> Kernel:
    return "efficient" if bench.kernel == "flash" and dtype == torch.float32 else bench.kernel


def _norm(bench: Bench, dtype: torch.dtype, elements: int) -> float:
    rows = 1 if elements == bench.sizes.widths[0] else 256
    width = elements // rows
    xs = _cycle(bench, dtype, (rows, width), 32 * MIB)
    weight = torch.ones(width, dtype=dtype, device=bench.device)
    out = torch.empty(rows, width, dtype=dtype, device=bench.device)
    scratch = torch.empty(rows, width, device=bench.device)
    return bench.seconds(lambda: rms_norm(next(xs), weight, out, scratch=scratch, eps=EPS))


def _rope(bench: Bench, dtype: torch.dtype, rows: int, heads: int, size: int, where: str) -> float:
    x = bench.numbers(rows, heads, size, dtype=dtype)
    kept, half = x.clone(), size // 2
    if where == "vision":
        scratch = torch.empty(2, rows, heads * size, device=bench.device)
        cos, sin = (torch.full((rows, half), 0.7, device=bench.device) for _ in range(2))
        turn = rotate_float32
    else:
        scratch = torch.empty(2, rows, heads * size, dtype=dtype, device=bench.device)
        cos, sin = (torch.full((rows, size), 0.7, device=bench.device).to(dtype) for _ in range(2))
        turn = rotate
    return bench.seconds(lambda: turn(x, cos, sin, scratch=scratch), lambda: x.copy_(kept))


def _angles_vision(bench: Bench, dtype: torch.dtype, rows: int, half: int) -> float:
    places = torch.arange(rows, device=bench.device)
    run: Any = SimpleNamespace(
        positions=((places, places),), frequencies=torch.full((half,), 0.1, device=bench.device)
    )
    views = {
        name: torch.empty(rows, half, dtype=torch.float32, device=bench.device)
        for name in ("cos32", "sin32")
    }
    return bench.seconds(lambda: vision._angles(run, 0, 0, rows, views))


def _angles_text(bench: Bench, dtype: torch.dtype, rows: int, half: int) -> float:
    sections = (half // 2, half // 4, half - half // 2 - half // 4)
    shape = SimpleNamespace(text=SimpleNamespace(head_dim=2 * half, mrope_section=sections))
    run: Any = SimpleNamespace(
        shape=shape,
        positions=torch.arange(rows, device=bench.device).expand(3, rows),
        frequencies=inverse_frequencies(1e6, 2 * half, device=bench.device),
    )
    views = {
        name: torch.empty(rows, 2 * half, dtype=dtype, device=bench.device)
        for name in ("cos", "sin")
    }
    views["norm32"] = torch.empty(256, max(64, 16 * half), device=bench.device)
    return bench.seconds(lambda: text._angles(run, 0, rows, views))


def _gate(bench: Bench, dtype: torch.dtype, elements: int) -> float:
    gates = _unchanged(bench, dtype, elements)
    up = torch.ones(elements, dtype=dtype, device=bench.device)

    def call() -> None:
        gate = next(gates)
        torch.ops.aten.silu_(gate)
        gate.mul_(up)

    return bench.seconds(call)


def _gelu(bench: Bench, dtype: torch.dtype, elements: int) -> float:
    xs = _unchanged(bench, dtype, elements)
    return bench.seconds(lambda: torch.ops.aten.gelu_(next(xs)))


def _unchanged(bench: Bench, dtype: torch.dtype, elements: int) -> Iterator[Tensor]:
    """Tensors in turn, full of a number that both activations leave as it is."""
    found = _cycle(bench, dtype, (elements,), 32 * MIB)
    for start in range(0, 32 * MIB, 4 * MIB):
        bench.memory[start : start + 4 * MIB].view(dtype).fill_(20.0)
    return found


def _add(bench: Bench, dtype: torch.dtype, elements: int) -> float:
    xs = _cycle(bench, dtype, (elements,), 32 * MIB)
    y = torch.zeros(elements, dtype=dtype, device=bench.device)
    return bench.seconds(lambda: next(xs).add_(y))


def _copy(bench: Bench, dtype: torch.dtype, elements: int) -> float:
    size = 16 if elements < 4096 else 64
    rows = max(1, elements // (4 * size))
    source = bench.numbers(4, rows, size, dtype=dtype)
    target = bench.numbers(rows, 4, size, dtype=dtype)
    return bench.seconds(lambda: target.copy_(source.transpose(0, 1))) * (
        elements / source.numel() if elements > source.numel() else 1.0
    )


def _bias(bench: Bench, dtype: torch.dtype, elements: int) -> float:
    """What the bias adds to a product of so many results."""
    width = 256 if elements < 131072 else 1280
    rows = max(2, elements // width)
    with_bias = _product(bench, dtype, rows, width, width, bias=True)
    without = _product(bench, dtype, rows, width, width)
    return max(with_bias - without, 1e-7)


def _merge(bench: Bench, dtype: torch.dtype, elements: int) -> float:
    size, count = 16, 4
    rows = max(1, elements // (size * count))
    outs = [bench.numbers(1, count, rows, size, dtype=dtype) for _ in range(2)]
    sums = [torch.zeros(1, count, rows, device=bench.device) for _ in range(2)]
    target = torch.empty(rows, 1, count, size, dtype=dtype, device=bench.device)
    scratch = torch.empty(256, 1024, device=bench.device)
    return bench.seconds(
        lambda: merge((outs[0], sums[0]), (outs[1], sums[1]), out=target, scratch=scratch)
    )


def sampling(logits: Sequence[int], seconds: float) -> Curve:
    """One token drawn, by logits, on the host: the quickest, as nothing else is timed beside it."""
    found = []
    for count in logits:
        seen = seen_mask(range(min(count, 500)), count)
        chosen = Sampling(repetition_penalty=1.05)
        values, draws = torch.randn(count), generator(chosen)
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while len(taken) < 4 or time.perf_counter() < end:
            start = time.perf_counter()
            next_token(values, seen, chosen, draws)
            taken.append(time.perf_counter() - start)
        found.append((count, min(taken)))
    return tuple(found)
