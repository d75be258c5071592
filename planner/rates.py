"""Seconds that were measured, as tables, and how they are read between and beyond their points.

Between points a table is a straight line in the logarithms of sizes and seconds (a line in plain numbers would bend
where a fixed cost ends); beyond the last size seconds grow in proportion, below the first they stay: there the call
itself is what costs. `execute --probe` fills the tables by calling the executor's own functions.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Annotated, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from planner.plan.words import Frozen, Kind

Share = Annotated[float, Field(gt=0, le=1)]
Curve = tuple[tuple[PositiveInt, PositiveFloat], ...]  # (size, seconds), sizes ascending


def seconds_at(points: Sequence[tuple[int, float]], size: float) -> float:
    """Seconds at `size`."""
    if size <= points[0][0]:
        return points[0][1]
    last = points[-1]
    if size >= last[0]:
        return last[1] * size / last[0]
    right = next(i for i, point in enumerate(points) if point[0] >= size)
    (low, below), (high, above) = points[right - 1], points[right]
    share = math.log(size / low) / math.log(high / low)
    return math.exp(math.log(below) + share * math.log(above / below))


class Grid(Frozen):
    """Seconds over two sizes: `seconds[i][j]` at `first[i]` and `second[j]`."""

    first: tuple[PositiveInt, ...] = Field(min_length=1)
    second: tuple[PositiveInt, ...] = Field(min_length=1)
    seconds: tuple[tuple[PositiveFloat, ...], ...]

    @model_validator(mode="after")
    def _complete(self) -> Grid:
        for sizes in (self.first, self.second):
            if list(sizes) != sorted(set(sizes)):
                raise ValueError(f"wanted ascending sizes, found {list(sizes)}")
        shape = [len(row) for row in self.seconds]
        if shape != [len(self.second)] * len(self.first):
            raise ValueError(
                f"wanted {len(self.first)} rows of {len(self.second)} seconds, found {shape}"
            )
        return self

    @cached_property
    def _logs(self) -> tuple[list[float], list[float], list[list[float]]]:
        return (
            [math.log(size) for size in self.first],
            [math.log(size) for size in self.second],
            [[math.log(value) for value in row] for row in self.seconds],
        )

    def at(self, first: float, second: float) -> float:
        """Seconds at those sizes."""
        firsts, seconds, logs = self._logs
        i, row_share, row_extra = _place(firsts, math.log(first))
        j, share, extra = _place(seconds, math.log(second))
        low = logs[i][j] + share * (logs[i][min(j + 1, len(seconds) - 1)] - logs[i][j])
        below = logs[min(i + 1, len(firsts) - 1)]
        high = below[j] + share * (below[min(j + 1, len(seconds) - 1)] - below[j])
        return math.exp(low + row_share * (high - low) + row_extra + extra)


def _place(logs: Sequence[float], wanted: float) -> tuple[int, float, float]:
    """The point left of `wanted`, the share of the way to the next, and what lies beyond the last."""
    if wanted <= logs[0]:
        return 0, 0.0, 0.0
    if wanted >= logs[-1]:
        return len(logs) - 1, 0.0, wanted - logs[-1]
    right = bisect_left(logs, wanted)
    left = right - 1
    return left, (wanted - logs[left]) / (logs[right] - logs[left]), 0.0


class HeadDim(Frozen):
    """Attention of heads of one size, seconds for one head of a call over several.

    full: (query rows, keys) without a mask. causal: rows of a square. window: rows of one window, a batch of windows
    a call. decode: keys that one row sees, for one key head and the query heads that share it. call_s: the smallest
    whole call. rope_*, angles_*: one sub-tile, by its elements; short heads make for short inner loops. heads: of each
    call of full. alone: a call of one head, which the cores cannot share as well (None: not measured).
    """

    head_dim: PositiveInt
    full: Grid
    heads: PositiveInt | None = None
    alone: Grid | None = None
    causal: Curve = Field(min_length=1)
    window: Curve = Field(min_length=1)
    decode: Curve = Field(min_length=1)
    call_s: PositiveFloat
    rope_vision: Curve = Field(min_length=1)
    rope_text: Curve = Field(min_length=1)
    angles_vision: Curve = Field(min_length=1)
    angles_text: Curve = Field(min_length=1)

    def beyond(self, heads: int, rows: int, keys: int) -> float:
        """Seconds of a call of so many heads beyond what each takes in a call of many."""
        if self.alone is None or self.heads is None or heads >= self.heads:
            return self.call_s
        more = max(0.0, self.alone.at(rows, keys) - self.full.at(rows, keys))
        return max(self.call_s, more * (self.heads - heads) / max(1, self.heads - 1))

    def curves(self) -> tuple[Curve, ...]:
        """All tables by one size."""
        turned = (self.rope_vision, self.rope_text, self.angles_vision, self.angles_text)
        return (self.causal, self.window, self.decode, *turned)


PASSES = ("norm", "gate", "gelu", "add", "copy", "bias", "merge")
TURNS = ("rope_vision", "rope_text", "angles_vision", "angles_text")  # by head size


CACHE_BYTES = (
    8 * 2**20
)  # weights of a token beyond which code and activations leave the nearest caches


class Kernels(Frozen):
    """The executor's calls in one dtype.

    product: (rows, weight elements), all of it coming from memory. vector: one row, (bytes between two uses of the
    same weights, weight elements): what was used lately still lies in a cache. passes: by elements of one call.
    """

    product: Grid
    vector: Grid
    attention: tuple[HeadDim, ...] = Field(min_length=1)
    passes: dict[str, Curve]

    @model_validator(mode="after")
    def _every_pass(self) -> Kernels:
        _same_names("passes", PASSES, self.passes)
        curves = [*self.passes.values()]
        for dim in self.attention:
            curves += dim.curves()
        for curve in curves:
            sizes = [point[0] for point in curve]
            if not sizes or sizes != sorted(set(sizes)):
                raise ValueError(f"wanted ascending sizes, found {sizes}")
        dims = [dim.head_dim for dim in self.attention]
        if dims != sorted(set(dims)):
            raise ValueError(f"attention: wanted ascending head sizes, found {dims}")
        return self

    def heads(self, head_dim: int) -> tuple[tuple[HeadDim, float], ...]:
        """The measured head sizes next to that one, with their weights: linear between, in proportion beyond the last."""
        dims = self.attention
        if head_dim > dims[-1].head_dim:
            return ((dims[-1], head_dim / dims[-1].head_dim),)
        return self.turned(head_dim)

    def turned(self, head_dim: int) -> tuple[tuple[HeadDim, float], ...]:
        """The same, constant beyond the last: for what is tabulated by elements."""
        dims = self.attention
        if head_dim <= dims[0].head_dim:
            return ((dims[0], 1.0),)
        if head_dim >= dims[-1].head_dim:
            return ((dims[-1], 1.0),)
        right = next(i for i, dim in enumerate(dims) if dim.head_dim >= head_dim)
        low, high = dims[right - 1], dims[right]
        share = (head_dim - low.head_dim) / (high.head_dim - low.head_dim)
        return ((low, 1 - share), (high, share))


class Measured(Frozen):
    """What `execute --probe` timed, one table per kernel. Replaces the roofline wherever it is there."""

    bits16: Kernels
    float32: Kernels
    pixel_values_per_s: PositiveInt  # patch values that the host cuts out and normalises
    sample: Curve = Field(min_length=1)  # by logits
    # of a step of each kind beyond its kernels as the tables have them (views, records, queues, code that has left the
    # caches): where a token's weights stay in the caches, and where they do not
    step_s: dict[Kind, tuple[NonNegativeFloat, NonNegativeFloat]]
    copy_s: PositiveFloat  # of a copy beyond its bytes
    first_touch_bytes_per_s: int = Field(ge=0)  # new pages of the arena, the CPU alone; else 0
    # of a product whose shape is multiplied for the first time: 225 rows of 640 by 640, of which little code is kept, and
    # 540 rows of 5120 by 5120, of which much is (0: not measured)
    create_s: float = Field(ge=0)
    create_wide_s: float = Field(ge=0, default=0.0)
    image_pixels_per_s: PositiveInt  # of image files: decoded and resized
    # how fast steps and copies are while both run, in proportion to each alone: on the CPU they share the cores
    beside: tuple[Share, Share]
    # of steps, while a unit is copied after a rest; below zero where they lose more than the copy takes (None: not measured)
    favoured: float | None = Field(ge=-1, le=1, default=None)

    @model_validator(mode="after")
    def _every_kind(self) -> Measured:
        _same_names("step_s", get_args(Kind), self.step_s)
        return self


def _same_names(what: str, wanted: Sequence[str], found: Iterable[str]) -> None:
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or unknown:
        raise ValueError(
            f"{what}: wanted {', '.join(wanted)}; missing {missing}, unknown {unknown}"
        )
