from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from planner.checkpoint.spec import resolve_model
from planner.plan import Plan
from planner.profile import load_profile
from planner.screen import plots
from planner.search import Request, search, usual_way
from planner.units import GIB, parse_bytes
from planner.workload import make_workload, parse_image

ROOT = Path(__file__).parents[2]
MakePlan = Callable[..., Plan]


def request(vram: str | None, *, new_tokens: int = 32) -> Request:
    checkpoint = resolve_model("3b")
    bounds = {"min_pixels": checkpoint.min_pixels, "max_pixels": checkpoint.max_pixels}
    workload = make_workload(
        [parse_image("1920x1080", **bounds)], **bounds, max_new_tokens=new_tokens
    )
    return Request(checkpoint, workload, None if vram is None else parse_bytes(vram))


@pytest.fixture(scope="module")
def streamed() -> Plan:
    """A plan with every kind of buffer."""
    return search(request("5GB"), load_profile("rtx-5080-16gb"))


@pytest.mark.parametrize(
    ("device", "vram"), [("cpu", "6GB"), ("cpu", None), ("rtx-5080-16gb", "5GB")]
)
def test_the_areas_of_each_step_add_up_to_its_expected_bytes(device: str, vram: str | None) -> None:
    plan = search(request(vram), load_profile(device))
    stack = plots.device_bytes(plan)
    assert list(stack) == [name for name in plots.COLOURS if name in stack]
    assert min(min(row) for row in stack.values()) >= 0
    for index, step in enumerate(plan.steps):
        assert sum(row[index] for row in stack.values()) == step.expected_bytes
    assert (plots.ALLOCATOR in stack) == (device != "cpu")
    assert (plots.KERNELS in stack) == (device == "cpu")


def test_the_areas_of_the_peak_are_the_terms_of_the_report(streamed: Plan) -> None:
    index = [step.id for step in streamed.steps].index(streamed.prediction.peak_step)
    drawn = {name: row[index] for name, row in plots.device_bytes(streamed).items() if row[index]}
    weights = drawn.pop(plots.LLM, 0) + drawn.pop(plots.VISION, 0)
    terms = {term.name: term.expected_bytes for term in streamed.prediction.terms}
    # one colour for what a card's allocator holds beside the arena
    beside = drawn.pop(plots.ALLOCATOR)
    inside = drawn | {"resident weights": weights}
    assert inside == {name: size for name, size in terms.items() if name in inside}
    assert beside == sum(size for name, size in terms.items() if name not in inside)


def test_the_picture_has_its_axes_phases_lines_and_legend(streamed: Plan) -> None:
    figure = plots.lifetimes(streamed)
    (axes,) = figure.axes
    assert axes.get_ylabel() == "GiB on the device"
    assert axes.get_xlabel() == f"{len(streamed.steps)} steps"
    assert [t.get_text() for t in axes.get_xticklabels()] == [
        "vision",
        "prefill",
        "decode \N{MULTIPLICATION SIGN}31",
    ]
    lines = {
        line.get_label(): line.get_ydata()[0]
        for line in axes.lines
        if len(set(line.get_ydata())) == 1
    }  # type: ignore[arg-type,index]
    assert set(lines.values()) == {
        streamed.prediction.bound_peak_bytes / GIB,
        5 * 10**9 / GIB,
    }
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [*plots.device_bytes(streamed), "bound", "budget"]
    assert "fits" in axes.get_title(loc="left")


def top(figure: Figure, number: int, colour: str) -> float:
    """The highest point of the area of this colour, in GiB."""
    from matplotlib.colors import to_rgba

    axes = figure.axes[number]
    (area,) = [c for c in axes.collections if tuple(c.get_facecolor()[0]) == to_rgba(colour)]  # type: ignore[index]
    return float(area.get_paths()[0].vertices[:, 1].max())


def test_the_areas_drawn_reach_the_expected_peak(streamed: Plan) -> None:
    figure = plots.lifetimes(streamed)
    last = list(plots.device_bytes(streamed))[-1]
    drawn = top(figure, 0, plots.COLOURS[last])
    assert drawn == pytest.approx(streamed.prediction.expected_peak_bytes / GIB)


def test_plans_side_by_side_share_one_scale_and_say_who_fits(streamed: Plan) -> None:
    usual = usual_way(request("5GB"), load_profile("rtx-5080-16gb"))
    figure = plots.compare({"usual": usual, "planned": streamed})
    left, right = figure.axes
    assert left.get_ylim() == right.get_ylim()
    assert left.get_title(loc="left").startswith("usual\n")
    assert "does not fit" in left.get_title(loc="left")
    assert right.get_title(loc="left").endswith(", fits")
    # one legend for both, though staging is in one of them alone
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()].count(plots.STAGING) == 1


def test_every_buffer_is_a_rectangle_at_its_offset(streamed: Plan) -> None:
    (axes,) = plots.offsets(streamed).axes
    drawn = sorted(
        (r.get_x(), r.get_y(), r.get_width(), r.get_height())
        for r in axes.patches
        if isinstance(r, Rectangle)
    )
    wanted = sorted(
        (birth, b.offset_bytes / GIB, death - birth, b.size_bytes / GIB)
        for b in streamed.buffers
        for birth, death in b.lifetimes
    )
    assert drawn == wanted
    assert axes.get_ylabel() == "offset in the arena, GiB"


def test_a_plan_of_one_token_and_no_budget_is_drawn() -> None:
    plan = search(request(None, new_tokens=1), load_profile("cpu"))
    (axes,) = plots.lifetimes(plan).axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["vision", "prefill"]
    assert "fit" not in axes.get_title(loc="left")


def test_the_usual_way_holds_everything_from_the_first_step_on() -> None:
    asked = request("5GB")
    plan = usual_way(asked, load_profile("rtx-5080-16gb"))
    everything = sum(unit.size_bytes for unit in plan.units)
    stack = plots.device_bytes(plan)
    assert stack[plots.LLM][0] + stack[plots.VISION][0] == everything
    assert plan.device.budget_bytes == asked.budget_bytes
    assert plan.prediction.bound_peak_bytes > 5 * 10**9
    assert plots.STAGING not in stack


def test_matplotlib_is_imported_only_when_something_is_drawn() -> None:
    code = "import sys, planner.screen.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
