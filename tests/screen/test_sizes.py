from __future__ import annotations

from typing import Any

from planner.checkpoint.spec import resolve_model
from planner.profile import load_profile
from planner.screen import plots
from planner.screen.sizes import by_pixels
from planner.units import GIB


def drawn(line: Any) -> list[tuple[float, float]]:
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_the_usual_way_grows_with_the_image_and_the_plan_stays_within_the_budget() -> None:
    card, sizes = load_profile("rtx-5080-16gb"), ("1000x1000", "5000x3200")
    points = by_pixels(resolve_model("7b"), card, 16 * 10**9, sizes)
    assert [round(point.megapixels) for point in points] == [1, 16]
    small, large = points
    assert large.usual.bound_peak_bytes > small.usual.bound_peak_bytes + GIB // 2
    for point in points:
        assert point.planned.bound_peak_bytes <= 16 * 10**9
        assert point.planned.bound_peak_bytes < point.usual.bound_peak_bytes
    left, right = plots.by_pixels(points).axes
    assert (left.get_xlabel(), right.get_ylabel()) == ("megapixels", "seconds")
    usual, plan, least, budget = left.lines
    assert drawn(usual)[1] == (large.megapixels, large.usual.bound_peak_bytes / GIB)
    assert drawn(plan)[1] == (large.megapixels, large.planned.bound_peak_bytes / GIB)
    assert drawn(least)[0] == (small.megapixels, small.planned.smallest_budget_bytes / GIB)
    assert drawn(budget)[0][1] == 16 * 10**9 / GIB
