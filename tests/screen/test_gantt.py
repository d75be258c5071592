from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from planner.costs import Costs
from planner.plan import Plan
from planner.profile import load_profile
from planner.queues import Beside
from planner.screen import gantt as screen
from planner.screen import tables
from planner.screen.gantt import BLOCKS, LETTERS, Gantt, Span, bar, columns, gantt, widths
from planner.search import search


@pytest.mark.parametrize(
    ("model", "vram", "device", "images", "new"),
    [
        ("7b", "16GB", "rtx-5080-16gb", ("3840x2160",), 128),
        ("7b", "8GB", "rtx-5080-16gb", ("3840x2160",), 128),
        ("7b", "8GB", "rtx-5080-16gb", (), 128),
        ("7b", "4GB", "rtx-5080-16gb", ("3840x2160", "640x480"), 1),
        ("3b", "4GB", "cpu", ("1920x1080",), 2),
        ("3b", "2500MB", "cpu", (), 2),
    ],
)
def test_both_queues_are_as_busy_as_predicted_and_phases_follow_one_another(
    kit: Any, model: str, vram: str, device: str, images: tuple[str, ...], new: int
) -> None:
    profile = load_profile(device)
    plans = [(profile, kit.plan(model, vram, device, images, new))]
    if profile.measured:
        # a reader that is never let run before the steps: then both queues' work is exact
        plain = profile.measured.model_copy(update={"favoured": None})
        profile = profile.model_copy(update={"measured": plain})
        plans.append((profile, search(kit.request(model, vram, images, new), profile)))
    for found, plan in plans:
        _is_as_busy_as_predicted(plan, Costs(plan.model, found).beside, device)


def _is_as_busy_as_predicted(plan: Plan, beside: Beside, device: str) -> None:
    drawn, rows = gantt(plan, beside), plan.prediction.phases
    assert [name for name, _, _ in drawn.phases] == [row.phase for row in rows]
    assert [stop - start for _, start, stop in drawn.phases] == pytest.approx(
        [row.seconds for row in rows]
    )
    assert drawn.phases[-1][2] == pytest.approx(plan.prediction.seconds)
    # what is predicted is each queue's work alone: while both run, each does less of it
    both = sum(
        max(0.0, min(one.stop, other.stop) - max(one.start, other.start)) * one.value * other.value
        for one in drawn.compute
        for other in drawn.copies
    )
    assert both > 0.1 or device != "cpu"
    computing, copying = (
        busy - both * (1 - speed)
        for busy, speed in zip(drawn.busy, (beside.compute, beside.copy), strict=True)
    )
    computed = sum(row.compute_seconds for row in rows)
    if beside.credit_s:
        # what a rested reader takes costs steps more than its share
        assert computed * (1 - 1e-3) <= computing <= 1.05 * computed
    else:
        assert computing == pytest.approx(computed, rel=1e-3)
    assert copying == pytest.approx(sum(row.copy_seconds for row in rows), rel=1e-3)
    for row in (drawn.compute, drawn.copies):
        for left, right in pairwise(row):
            assert left.stop <= right.start + 1e-9  # one thing at a time


@pytest.mark.parametrize(("device", "vram"), [("rtx-5080-16gb", "3GB"), ("cpu", "2500MB")])
def test_phases_last_as_predicted_without_being_stretched(
    kit: Any, device: str, vram: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = kit.plan("3b", vram, device, ("640x480",), 16)
    seen: list[dict[str, tuple[float, float]]] = []
    stretched = screen._stretched

    def look(plan: Plan, marks: Any, *rest: Any) -> Gantt:
        seen.append(marks)
        return stretched(plan, marks, *rest)

    monkeypatch.setattr(screen, "_stretched", look)
    gantt(plan, Costs(plan.model, load_profile(device)).beside)
    walked = {name: stop - start for name, (start, stop) in seen[0].items() if name != "load"}
    rows = {row.phase: row.seconds for row in plan.prediction.phases if row.phase != "load"}
    assert walked == pytest.approx(rows)
    if device == "cpu":
        gantt(plan)  # as if neither slowed the other down
        assert seen[1]["decode"][1] < 0.95 * seen[0]["decode"][1]


def test_the_screen_draws_with_the_devices_own_slowing_down(kit: Any) -> None:
    plan = kit.plan("3b", "2500MB", "cpu", ("640x480",), 16)
    words = "--vram 2500MB --model 3b --device cpu --image 640x480 --max-new-tokens 16"
    shown = kit.screen(*words.split())
    beside = Costs(plan.model, load_profile("cpu")).beside
    lines = tables.timeline(plan, blocks=False, beside=beside).plain.splitlines()
    others = tables.timeline(plan, blocks=False).plain.splitlines()
    assert all(line.rstrip() in shown for line in lines)
    assert not all(line.rstrip() in shown for line in others)


def test_a_streamed_decode_waits_for_its_copies(kit: Any) -> None:
    drawn = gantt(kit.plan("7b", "8GB"))
    name, start, stop = drawn.phases[-1]
    assert name == "decode"
    assert max(columns(drawn.compute, start, stop, 20)) < 0.3
    assert min(columns(drawn.copies, start, stop, 20)) > 0.9


def test_copies_that_come_before_everything_are_drawn_in_load(kit: Any) -> None:
    from planner.search import usual_way

    plan = usual_way(kit.request("7b"), load_profile("rtx-5080-16gb"))
    drawn = gantt(plan)
    _, start, stop = drawn.phases[0]
    assert sum(columns(drawn.copies, start, stop, 30)) > 10
    assert sum(columns(drawn.compute, start, stop, 30)) == 0
    assert all(span.start >= stop - 1e-9 for span in drawn.compute)


def test_bytes_in_use_never_pass_the_expected_peak_and_reach_nearly_that(kit: Any) -> None:
    plan = kit.plan("7b", "8GB")
    most = max(span.value for span in gantt(plan).alive)
    assert 0.97 * plan.prediction.expected_peak_bytes < most
    assert most <= plan.prediction.expected_peak_bytes


def test_a_column_is_the_mean_or_the_most_of_what_lies_in_it() -> None:
    spans = [Span(0.0, 1.0, 1.0), Span(1.5, 2.0, 0.5)]
    assert columns(spans, 0.0, 2.0, 2) == pytest.approx([1.0, 0.25])
    assert columns(spans, 0.0, 2.0, 2, most=True) == [1.0, 0.5]


def test_only_nothing_is_drawn_as_nothing() -> None:
    assert bar([0.0, 0.001, 0.5, 1.0], 1.0, blocks=False) == " .=#"
    assert bar([0.0, 0.001, 0.5, 1.0], 1.0, blocks=True) == " \u2581\u2584\u2588"
    assert len(BLOCKS) == len(LETTERS) == 9


def test_phases_get_columns_by_their_seconds_but_room_for_their_names() -> None:
    wide = widths([1.0, 99.0], ["load", "decode x127"], 50)
    assert sum(wide) == 50
    assert wide[0] == 5
    assert widths([1.0, 1.0], ["load", "load"], 40) == [20, 20]
