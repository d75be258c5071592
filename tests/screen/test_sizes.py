from __future__ import annotations

from planner import plots
from planner.profile import load_profile
from planner.sizes import by_pixels
from planner.spec import resolve_model
from planner.units import GIB


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
    assert list(usual.get_ydata())[1] == large.usual.bound_peak_bytes / GIB  # type: ignore[index,arg-type]
    assert list(plan.get_xdata())[1] == large.megapixels  # type: ignore[index,arg-type]
    assert list(least.get_ydata())[0] == small.planned.smallest_budget_bytes / GIB  # type: ignore[index,arg-type]
    assert list(budget.get_ydata())[0] == 16 * 10**9 / GIB  # type: ignore[index,arg-type]
