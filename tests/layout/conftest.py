"""Tables whose optimum is known, and a checker that shares nothing with the solver."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import pytest

from planner.layout import Span


@pytest.fixture
def partition() -> Callable[[int, int], list[Span]]:
    """`partition(count, seed)`: a rectangle of 2^12 in time by 2^20 cut into `count` buffers, no byte to spare."""

    def cut(count: int, seed: int) -> list[Span]:
        draw = random.Random(seed)
        pieces = [(0, 2**12, 0, 2**20)]
        while len(pieces) < count:
            areas = [(right - left) * (top - low) for left, right, low, top in pieces]
            left, right, low, top = pieces.pop(draw.choices(range(len(pieces)), areas)[0])
            if draw.random() < 0.5 and right - left > 1:
                at = draw.randint(left + 1, right - 1)
                pieces += [(left, at, low, top), (at, right, low, top)]
            elif top - low > 1024:
                at = low + 1024 * draw.randint(1, (top - low) // 1024 - 1)
                pieces += [(left, right, low, at), (left, right, at, top)]
            else:
                pieces.append((left, right, low, top))
        draw.shuffle(pieces)
        return [Span(f"b{i}", l, r, top - low) for i, (l, r, low, top) in enumerate(pieces)]  # noqa: E741

    return cut


@pytest.fixture
def check() -> Callable[[Sequence[Span], Mapping[str, int]], int]:
    """`check(spans, offsets)`: the height of a layout, after looking at every pair."""

    def height(spans: Sequence[Span], offsets: Mapping[str, int]) -> int:
        assert set(offsets) == {span.id for span in spans}
        for i, one in enumerate(spans):
            assert offsets[one.id] >= 0
            for two in spans[:i]:
                if one.lower < two.upper and two.lower < one.upper:
                    first, second = offsets[one.id], offsets[two.id]
                    assert first + one.size <= second or second + two.size <= first
        return max((offsets[span.id] + span.size for span in spans), default=0)

    return height
