from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from planner.errors import InputError
from planner.plan import Levers
from planner.profile import load_profile
from planner.screen import plots, show
from planner.screen.sweep import (
    Frontier,
    FrontierPoint,
    PhaseSeconds,
    _bisected,
    frontier,
    neighbours,
    swept,
)
from planner.screen.tables import _in_words
from planner.search import search
from planner.units import GIB


@pytest.fixture(scope="module")
def found(kit: Any) -> Frontier:
    return swept(kit.request("7b", None, ("1920x1080",)), load_profile("rtx-5080-16gb"), points=5)


def test_the_frontier_goes_from_the_least_budget_to_everything_resident(
    kit: Any, found: Frontier
) -> None:
    whole = kit.plan("7b", None, images=("1920x1080",)).prediction
    first, last = found.points[0], found.points[-1]
    assert first.budget_bytes == whole.smallest_budget_bytes
    assert (last.budget_bytes, last.seconds) == (whole.bound_peak_bytes, whole.seconds)
    assert 4 <= len(found.points) <= 5
    for left, right in pairwise(found.points):
        assert left.budget_bytes < right.budget_bytes
        assert left.seconds > right.seconds


def test_every_point_is_what_plan_finds_at_its_budget(kit: Any, found: Frontier) -> None:
    request = kit.request("7b", None, ("1920x1080",))
    for point in found.points[::2]:
        plan = search(
            replace(request, budget_bytes=point.budget_bytes),
            load_profile("rtx-5080-16gb"),
            compared=False,
        )
        assert plan.prediction.bound_peak_bytes <= point.budget_bytes
        assert plan.prediction.seconds == point.seconds
        assert sum(row.seconds for row in point.phases) == pytest.approx(point.seconds)


def test_the_same_request_gives_the_same_frontier(kit: Any) -> None:
    request, device = kit.request("7b", None, (), 16), load_profile("rtx-5080-16gb")
    assert frontier(request, device, points=3) == frontier(request, device, points=3)


def test_the_largest_gap_is_halved_and_what_is_not_better_is_left_out(kit: Any) -> None:
    levers: Levers = kit.plan("7b", "8GB").levers
    asked = []

    def point(budget: int, seconds: float) -> FrontierPoint:
        rows = (PhaseSeconds(phase="load", seconds=seconds),)
        return FrontierPoint(budget_bytes=budget, seconds=seconds, phases=rows, levers=levers)

    steps = [(1 * GIB, 100.0), (5 * GIB, 60.0), (6 * GIB, 61.0), (9 * GIB, 10.0)]

    def at(budget: int) -> FrontierPoint:
        asked.append(budget)
        return point(*[step for step in steps if step[0] <= budget][-1])

    curve = _bisected(at, point(*steps[0]), point(*steps[-1]), 12)
    assert asked[0] == 5 * GIB
    assert [p.seconds for p in curve] == [100.0, 60.0, 10.0]
    # the step down at 9 GiB was looked for between what is known below it and itself
    assert all(GIB < budget < 9 * GIB for budget in asked)
    assert len(asked) < 24


@pytest.mark.parametrize(("model", "vram"), [("7b", "8GB"), ("72b", "24GB")])
def test_neighbours_are_near_what_a_search_finds_there(kit: Any, model: str, vram: str) -> None:
    plan, request, card = (
        kit.plan(model, vram),
        kit.request(model, vram),
        load_profile("rtx-5080-16gb"),
    )
    cheaper, faster = neighbours(request, card, plan)
    assert cheaper is not None
    assert faster is not None
    assert cheaper.budget_bytes < plan.prediction.bound_peak_bytes
    assert faster.budget_bytes > plan.prediction.bound_peak_bytes
    for neighbour in (cheaper, faster):
        there = search(
            replace(request, budget_bytes=neighbour.budget_bytes + GIB // 16), card, compared=False
        )
        assert there.prediction.seconds == pytest.approx(neighbour.seconds, rel=0.06)
        assert abs(neighbour.seconds / plan.prediction.seconds - 1) >= 0.05


def test_where_everything_is_resident_nothing_is_faster(kit: Any) -> None:
    plan, request = kit.plan("7b", "16GB"), kit.request("7b", "16GB")
    cheaper, faster = neighbours(request, load_profile("rtx-5080-16gb"), plan)
    assert cheaper is not None
    assert faster is None


def test_below_the_least_budget_nothing_is_cheaper(kit: Any) -> None:
    card = load_profile("rtx-5080-16gb")
    least = kit.plan("7b", "16GB").prediction.smallest_budget_bytes
    request = replace(kit.request("7b"), budget_bytes=least)
    cheaper, faster = neighbours(request, card, search(request, card))
    assert cheaper is None
    assert faster is not None


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep of few points, so that the command is quick."""
    monkeypatch.setattr("planner.screen.sweep.POINTS", 3)
    monkeypatch.setattr(frontier, "__kwdefaults__", {"points": 3})
    monkeypatch.setattr(swept, "__kwdefaults__", {"points": 3})


WORDS = ("--sweep", "--image", "none", "--max-new-tokens", "8")


def test_sweep_prints_a_table_of_budgets(run: Any, short: None) -> None:
    outcome = run(*WORDS)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == "Qwen2.5-VL-7B-Instruct on rtx-5080-16gb: budget against seconds"
    assert max(map(len, lines)) <= 80
    assert outcome.out.isascii()
    rows = [line.split() for line in lines if line[:1] == " " and line.split()[0][:1].isdigit()]
    sizes = [float(row[0]) for row in rows]
    assert sizes == sorted(sizes)
    assert len(rows) == 3
    assert rows[0][-1] in ("slot", "slots")


def test_a_row_of_the_sweep_says_in_few_words_what_is_resident(kit: Any, found: Frontier) -> None:
    levers = kit.plan("7b", "80GB").levers
    assert _in_words(found.points[0].model_copy(update={"levers": levers})) == "all"
    assert re.fullmatch(r"\d+/66, \d+/\d+, \d+/\d+; \d slots?", _in_words(found.points[0]))


def test_a_sweep_marks_what_the_budget_is_good_for(run: Any, short: None) -> None:
    out = run(*WORDS, "--vram", "6GB").out
    (row,) = [line.split() for line in out.splitlines() if line.endswith("<--")]
    sizes = [float(size) for size in re.findall(r"^ +(\d+\.\d\d) ", out, re.MULTILINE)]
    assert float(row[0]) == max(size for size in sizes if size <= 5.59)
    assert "What 6GB (5.59 GiB) is good for is marked <--." in " ".join(out.split())
    assert "<--" not in run(*WORDS).out
    out = run(*WORDS, "--vram", "1MB").out
    assert "<--" not in out
    assert "1MB (0.00 GiB) is less than the first row's: nothing fits it." in " ".join(out.split())


def test_sweep_as_json_is_one_document_that_reads_back(run: Any, short: None) -> None:
    outcome = run(*WORDS, "--json")
    document = Frontier.model_validate(json.loads(outcome.out))
    assert document.dumps() == outcome.out
    assert document.schema_version == 1
    assert document.request.startswith("plan --model 7b --image none")
    assert run(*WORDS, "--json").out == outcome.out


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")]
)
def test_sweep_draws_a_picture_the_same_each_time(
    found: Frontier, tmp_path: Path, name: str, start: bytes
) -> None:
    pictures = []
    for _ in range(2):
        plots.save(plots.pareto({"7B": found}), tmp_path / name)
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0][: len(start)] == start
    assert pictures[0] == pictures[1]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_sweep_with_out_writes_the_picture_and_still_prints(
    run: Any, short: None, tmp_path: Path
) -> None:
    path = tmp_path / "curve.svg"
    outcome = run(*WORDS, "--out", str(path))
    assert (outcome.code, outcome.err) == (0, f"wrote {path}\n")
    assert "budget against seconds" in outcome.out
    assert b"budget, GiB" in path.read_bytes() or path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "plan.json"], "wanted a picture of the sweep"),
        (["--snapshot", "s.json"], "wanted one plan, found --sweep"),
        (["--out", "no/such/a.png"], "does not exist"),
    ],
)
def test_what_a_sweep_cannot_do_is_said_before_it_searches(
    run: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr("planner.screen.sweep.frontier", None)
    outcome = run("--sweep", *words)
    assert outcome.code == 2
    assert message in outcome.err


def test_a_picture_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        show, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    with pytest.raises(InputError, match=r"pip install 'stowplan\[notebooks\]'"):
        show.check_sweep(Path("a.png"), None)
    show.check_sweep(None, None)


def test_a_pareto_picture_has_a_line_with_its_own_mark_per_frontier(found: Frontier) -> None:
    figure = plots.pareto({"one": found, "two": found})
    (axes,) = figure.axes
    assert axes.get_xlabel() == "budget, GiB"
    assert axes.get_ylabel() == "seconds"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    offered = found.usable_bytes / GIB
    line, inside, beyond, second, *_ = axes.lines
    assert list(line.get_xdata()) == [p.budget_bytes / GIB for p in found.points]  # type: ignore[arg-type]
    assert list(line.get_ydata()) == [p.seconds for p in found.points]  # type: ignore[arg-type]
    assert all(size <= offered for size in inside.get_xdata())  # type: ignore[union-attr]
    assert all(size > offered for size in beyond.get_xdata())  # type: ignore[union-attr]
    assert line.get_color() != second.get_color()
    assert inside.get_marker() != axes.lines[4].get_marker()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]
