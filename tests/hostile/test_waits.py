"""A wait that is left out shows, unless the others imply it; and a plan that lacks one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from executor.order import check_order, problems
from executor.prepare import Request, check_request
from executor.run import run
from planner.errors import NotFinite, PlanFileError, RunFailed
from planner.plan import Plan
from tests.hostile.lab import SETTINGS, Lab
from tests.hostile.scheduler import Blocked, at_random
from tests.hostile.table import markdown, verdict, verdicts
from tests.hostile.waits import SORTS, Graph, Mutant, mutants

# two plans that have waits of every sort between them
SHORT = ("half prefetched, grows after prefill", "half of each, all first")


def test_nothing_may_meet_under_a_right_plan(lab: Lab, setting: str) -> None:
    plan = lab.plan(setting)
    assert problems(plan) == []
    assert Graph(plan, lab.locations(setting)).unordered() == []


def test_a_wait_of_every_sort_shows_when_it_is_left_out(lab: Lab) -> None:
    tried: dict[str, list[str]] = {}
    for name in SHORT:
        plan, locations = lab.plan(name), lab.locations(name)
        graph = Graph(plan, locations)
        by_sort: dict[str, list[Mutant]] = {}
        for mutant in mutants(plan, locations):
            if graph.unordered(mutant.edges):
                by_sort.setdefault(mutant.sort, []).append(mutant)
        for sort, found in by_sort.items():
            mutant = found[len(found) // 2]
            assert verdict(lab, name, graph, mutant).holds, mutant.name
            tried.setdefault(sort, []).append(mutant.name)
    # what priming writes lies on no byte that comes first, and every phase's end waits for what others wait for too
    assert set(SORTS) - set(tried) <= {SORTS[8], SORTS[9]}


def test_what_other_waits_imply_does_not_show(lab: Lab) -> None:
    name = SHORT[1]
    plan, locations = lab.plan(name), lab.locations(name)
    graph = Graph(plan, locations)
    implied = [m for m in mutants(plan, locations) if not graph.unordered(m.edges)]
    assert len({mutant.sort for mutant in implied}) >= 4
    for sort in (SORTS[0], SORTS[1], SORTS[4]):
        mutant = next(m for m in implied if m.sort == sort)
        assert verdict(lab, name, graph, mutant, implied_seeds=0).holds, mutant.name


@pytest.mark.full
def test_every_wait_left_out_shows_or_is_implied(lab: Lab, setting: str) -> None:
    found = list(verdicts(lab, setting, every=5))
    print(f"\n{setting}\n{markdown(found)}")
    assert [v.mutant.name for v in found if not v.holds] == []


# --- what is refused before the run -------------------------------------------------------------------------------


def test_a_plan_without_a_wait_that_it_needs_is_refused(lab: Lab, setting: str) -> None:
    plan, locations = lab.plan(setting), lab.locations(setting)
    graph = Graph(plan, locations)
    needed = [m.plan for m in mutants(plan, locations) if m.plan and graph.unordered(m.edges)]
    assert needed
    for lacking in needed:
        with pytest.raises(PlanFileError, match="make the plan anew"):
            check_order(lacking)


def test_it_is_refused_before_any_file_is_opened(lab: Lab) -> None:
    name = "all streamed, 1 slot"
    plan = lab.plan(name)
    steps = tuple(step.model_copy(update={"waits": ()}) for step in plan.steps)
    gone = {n: t._replace(path=Path("/nowhere")) for n, t in lab.locations(name).items()}
    request = Request(locations=gone, images=(Path("/nowhere"),) * 2)
    with pytest.raises(PlanFileError, match="do not wait for each other"):
        check_request(plan.model_copy(update={"steps": steps}), request)


def changed(plan: Plan, place: int, **update: object) -> Plan:
    """The plan with one copy changed."""
    copies = list(plan.copies)
    copies[place] = copies[place].model_copy(update=update)
    return plan.model_copy(update={"copies": tuple(copies)})


def blocking(plan: Plan) -> dict[str, Plan]:
    """Plans whose queues wait for each other, made from one with streamed phases."""
    staged = [i for i, c in enumerate(plan.copies) if c.buffer == "staging/prefill/0"]
    first, second = staged[:2]
    wraps = next(i for i, c in enumerate(plan.copies) if c.wraps)
    needed = next(s.id for s in plan.steps if plan.copies[first].id in s.waits)
    swapped = list(plan.copies)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    return {
        "a copy comes after the step that waits for it": changed(plan, first, after=needed),
        "two copies stand in the wrong order": plan.model_copy(update={"copies": tuple(swapped)}),
        "a copy of the next round is wanted in this one": changed(plan, wraps, wraps=False),
    }


@pytest.mark.parametrize("name", ["all streamed, 1 slot", "all streamed, 2 slots"])
def test_a_plan_that_blocks_itself_is_refused_and_would_end_with_an_error(
    lab: Lab, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = blocking(lab.plan(name))
    for what, plan in cases.items():
        with pytest.raises(PlanFileError, match="wait for each other"):
            check_order(plan)
        answer = lab.hostile(name, at_random(1), Mutant(what, what, frozenset(), plan=plan))
        assert isinstance(answer.error, RunFailed), what
        assert "blocks itself" in str(answer.error)
        # with threads of the system too: an error, not a hang
        monkeypatch.setattr("executor.prepare.check_order", lambda plan: None)
        with pytest.raises(RunFailed, match="blocks itself"):
            run(plan, lab.request(name))
        monkeypatch.undo()


def test_without_that_error_it_would_hang(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "all streamed, 1 slot"
    monkeypatch.setattr("executor.weights.Reader._check_blocked", lambda *_: None)
    for what, plan in blocking(lab.plan(name)).items():
        answer = lab.hostile(name, at_random(1), Mutant(what, what, frozenset(), plan=plan))
        assert isinstance(answer.error, Blocked), what


def test_no_wait_left_out_blocks_a_run(lab: Lab) -> None:
    name = "all streamed, 1 slot"
    for mutant in mutants(lab.plan(name), lab.locations(name)):
        if mutant.sort == SORTS[0] and "mlp" in mutant.name:
            answer = lab.hostile(name, at_random(2), mutant)
            blocked = isinstance(answer.error, Blocked | RunFailed)
            assert not blocked or isinstance(answer.error, NotFinite), mutant.name


def test_host_memory_is_read_once_and_before_anything_comes_from_it(lab: Lab) -> None:
    plan = lab.plan("all streamed, kept in host memory")
    assert plan.host_units
    assert problems(plan) == []
    kept = {place.unit for place in plan.host_units}
    first = next(i for i, c in enumerate(plan.copies) if c.unit in kept)
    later = next(i for i, c in enumerate(plan.copies) if c.source == "host")
    with pytest.raises(PlanFileError, match=r"where .* is not yet"):
        check_order(changed(plan, first, source="host"))
    with pytest.raises(PlanFileError, match="anew, which is kept in host memory"):
        check_order(changed(plan, later, source="disk"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wraps": True, "after": "prefill/norm"}, "does not run so often"),
        ({"phase": "decode"}, "which does not run"),
    ],
)
def test_a_wait_for_what_does_not_run_is_refused(
    lab: Lab, changes: dict[str, object], words: str
) -> None:
    plan = lab.plan("all streamed, 1 slot")
    place = next(i for i, c in enumerate(plan.copies) if c.wraps)
    if "phase" in changes:
        # a plan of one token runs no copies of decode
        steps = tuple(step for step in plan.steps if step.phase != "decode")
        place = next(i for i, c in enumerate(plan.copies) if c.phase == "prefill")
        plan = plan.model_copy(update={"steps": steps, "decode_repeats": 0})
    with pytest.raises(PlanFileError, match=words):
        check_order(changed(plan, place, **changes))


def test_the_settings_of_the_short_form_are_of_the_grid() -> None:
    assert set(SHORT) <= set(SETTINGS)
