"""Seconds of the executor's kernels on this machine, as tables of a profile.

Every figure is the median of repeated calls of the executor's own functions on memory like the arena's, in the
sub-tiles that the steps use. Weights and activations come from a large buffer in turn, so that they are as far away
as in a run; results that would drift into denormals are made anew before each call.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from executor import text, vision
from executor.attention import attend, attend_rows, merge
from executor.generate import Sampling, generator, next_token, seen_mask
from executor.ops import inverse_frequencies, linear, rms_norm, rotate, rotate_float32
from executor.probe.bench import Bench
from planner.plan.words import Kernel
from planner.profile import Curve, Grid, HeadDim, Kernels
from planner.units import MIB

EPS = 1e-6
BIAS_TURNS = 3
ANGLE_ROWS = (1, 64, 1024, 4096)


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

    def full(rows: int, keys: int, count: int, groups: int) -> float:
        q = bench.numbers(rows, count, size, dtype=dtype)
        k, v = (bench.numbers(keys, groups, size, dtype=dtype) for _ in range(2))
        return bench.seconds(lambda: attend_rows(q, k, v, kernel=kernel, scale=scale)) / count

    def grid(count: int, groups: int) -> Grid:
        return Grid(
            first=sizes.queries,
            second=sizes.keys,
            seconds=tuple(
                tuple(full(rows, keys, count, groups) for keys in sizes.keys)
                for rows in sizes.queries
            ),
        )

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
        full=grid(count, groups),
        heads=count,
        alone=grid(1, 1),
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
    # small beside the product: taken by turns
    added = [
        _product(bench, dtype, rows, width, width, bias=True)
        - _product(bench, dtype, rows, width, width)
        for _ in range(BIAS_TURNS)
    ]
    return max(statistics.median(added), 1e-7)


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
