"""The search's answer against the canonical space written out, and against trying everything."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from planner.certificate import least_plan
from planner.problem import Problem
from planner.profile import load_profile
from planner.schedule import Choice
from planner.search import fastest, usual_way
from planner.space import Decoding, Filling, Space
from planner.variants import evaluate_ordered
from planner.worked import worked

EQUAL = 1e-9
SHORT = (1004, 1041, 1085, 1107, 1117, 1133)


@pytest.fixture(scope="module")
def optimality(kit: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(kit.root / "benchmarks")
        return importlib.import_module("optimality")


def members(space: Space) -> Iterator[tuple[float, Choice]]:
    """Every setting of the canonical space and the bound of what it was taken from, nothing left out."""
    for _, root in space.roots():
        decodings: list[Decoding] = [decoding for _, decoding in space.decodings(root)]
        while decodings:
            decoding = decodings.pop()
            if decoding.anchor is None:
                decodings += [found for _, found in space.worked_decodings(decoding)]
                continue
            fillings: list[tuple[float, Filling]] = list(space.fillings(decoding))
            while fillings:
                bound, filling = fillings.pop()
                if filling.anchor is None:
                    fillings += space.worked_fillings(filling)
                    continue
                number = 0
                while orders := list(space.orders(filling, number)):
                    for least, order in orders:
                        yield max(bound, least), space.choice(filling, number, order)
                    number += 1


@pytest.mark.parametrize("seed", [1, 5, 7])
def test_the_search_finds_the_fastest_of_the_whole_space_written_out(
    optimality: Any, seed: int
) -> None:
    check_fastest(optimality, seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 2, 3, 4, 6, 8, 9])
def test_the_search_finds_the_fastest_of_more_spaces_written_out(
    optimality: Any, seed: int
) -> None:
    check_fastest(optimality, seed)


def check_fastest(optimality: Any, seed: int) -> None:
    request, profile = optimality.drawn(seed)
    problem = Problem(request, profile)
    space = Space(problem)
    budget = request.budget_bytes
    found = fastest(space, least_plan(problem, space), weighed_most=10**6, built_most=10**6)
    assert found.lower_bound == pytest.approx(found.best.seconds, rel=EQUAL)
    faster: dict[Choice, float] = {}
    for bound, choice in members(space):
        done = worked(space.parts, choice)
        assert bound <= done.seconds * (1 + EQUAL)
        fits = space.footprint.bound(choice, done.live, done.held) <= budget
        if fits and done.seconds < found.best.seconds * (1 - EQUAL):
            faster[choice] = done.seconds
    for choice in faster:
        assert evaluate_ordered(problem, choice).bound_bytes > budget, choice


@pytest.mark.parametrize("seed", [2, 9, 23, 25])
def test_bounds_hold_where_pages_are_cleared_and_tiles_add_to_the_start(
    optimality: Any, seed: int
) -> None:
    """A measured CPU: new pages, queues that slow one another down, code made for products (those that two kinds share are counted twice)."""
    request, _ = optimality.drawn(seed)
    profile = load_profile("cpu")
    least = least_plan(Problem(request, profile)).bound_bytes
    most = usual_way(request, profile).prediction.bound_peak_bytes
    space = Space(Problem(replace(request, budget_bytes=(3 * least + most) // 4), profile))
    settings = 0
    for bound, choice in members(space):
        tiles = choice.tiles.model_dump()
        options = [space.prefill]
        if request.workload.images:
            options.append(space.vision[choice.images_together])
        start = sum(space.started(each, tiles) for each in options)
        start += space.stack(space, choice.tiles.vocabulary_rows).start
        settings += 1
        assert bound <= (worked(space.parts, choice).seconds + start) * (1 + EQUAL), choice
    assert settings


def judged(optimality: Any, seeds: Sequence[int], seconds: float) -> list[float]:
    """By how much plans are slower than the best of all settings, for those requests that could be judged."""
    losses = [optimality.judged(seed, seconds)["loss"] for seed in seeds]
    return [loss for loss in losses if loss is not None]


def test_trying_everything_finds_nothing_faster_on_small_requests(optimality: Any) -> None:
    losses = judged(optimality, SHORT, 10)
    assert len(losses) == len(SHORT)
    assert max(losses) <= EQUAL


@pytest.mark.full
def test_trying_everything_finds_nothing_faster_on_most_small_requests(optimality: Any) -> None:
    losses = judged(optimality, range(2000, 2030), 10)
    assert len(losses) >= 24
    assert sum(loss <= EQUAL for loss in losses) >= 0.85 * len(losses)
