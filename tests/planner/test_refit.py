"""Tiles fitted anew: of those that fit none is faster in one or two kinds of steps; and the climb from plan to plan."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, islice
from typing import Any

import pytest

from planner.certificate import least_plan
from planner.climb import climbed
from planner.evaluate import card_bound
from planner.footprint import STEP_BYTES
from planner.fronts import Option
from planner.problem import Problem, Request
from planner.profile import load_profile
from planner.refit import CHECKED, Refit
from planner.search import search
from planner.setting import plain_bound, spared
from planner.space import Space

NEAR = [1.001, 1.004]  # budgets, in proportion to the smallest


@pytest.fixture(scope="module")
def optimality(kit: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(kit.root / "benchmarks")
        return importlib.import_module("optimality")


def near(optimality: Any, seed: int, more: float) -> tuple[Space, Any]:
    """The space of a small request with so many times the smallest budget, and its smallest plan."""
    request, profile = optimality.drawn(seed)
    least = least_plan(Problem(request, profile)).bound_bytes
    problem = Problem(replace(request, budget_bytes=round(least * more)), profile)
    return Space(problem), least_plan(problem)


def faster(
    options: Sequence[Sequence[Option]], tiles: Mapping[str, int]
) -> Iterator[dict[str, int]]:
    """These tiles with other ones of one kind or two, in which the steps take less together."""
    mine = [next(o for o in found if o.tiles.items() <= tiles.items()) for found in options]
    for one, two in combinations(range(len(options)), 2):
        for first in options[one]:
            for second in options[two]:
                if first.seconds + second.seconds < mine[one].seconds + mine[two].seconds:
                    yield {**tiles, **first.tiles, **second.tiles}


@pytest.mark.parametrize("seed", [11, 13, 1072, 1080, 1090, 1102, 1132])
@pytest.mark.parametrize("more", NEAR)
def test_with_the_first_tiles_a_setting_fits_and_with_faster_ones_it_does_not(
    optimality: Any, seed: int, more: float
) -> None:
    space, least = near(optimality, seed, more)
    choice = least.choice
    found = next(Refit(space).fitting(choice, float("inf")))
    assert spared(space, found[1])[2] <= 0
    options = [*space.vision[choice.images_together].values(), *space.prefill.values()]
    for tiles in islice(faster(options, found[1].tiles.model_dump()), 400):
        setting = replace(choice, tiles=choice.tiles.model_copy(update=tiles))
        assert spared(space, setting)[2] > 0, tiles


@pytest.mark.parametrize("seed", [1072, 1080, 1090, 1102, 1132, 3211])
def test_a_climb_ends_at_a_faster_plan_that_fits_where_the_space_has_none(
    optimality: Any, seed: int
) -> None:
    request, profile = optimality.drawn(seed)
    space = Space(Problem(request, profile))
    least = least_plan(space.problem)
    better, worked_out = climbed(space, least, most=2000)
    assert 0 < worked_out <= 2000 + CHECKED
    assert better.seconds < least.seconds * 0.995
    assert better.bound_bytes <= request.budget_bytes
    plan = search(request, profile, compared=False)
    assert plan.prediction.seconds <= better.seconds * (1 + 1e-9) + space.problem.start_s(
        better.choice.tiles
    )
    assert plan.prediction.seconds_lower_bound <= plan.prediction.seconds


@pytest.mark.parametrize("seed", [11, 1080, 1102])
@pytest.mark.parametrize("more", [1.001, 1.05])
def test_the_arena_beside_blocks_is_as_large_as_the_allocator_lets_it_be(
    optimality: Any, seed: int, more: float
) -> None:
    space, least = near(optimality, seed, more)
    refit, choice = Refit(space), least.choice
    rooms = refit.rooms(choice.images_together, choice.tiles.vocabulary_rows)
    for room, classes in rooms:
        tiles = {k: v for found in classes.values() for k, v in found[0].tiles.items()}
        blocks = space.footprint.blocks(
            choice.tiles.model_copy(update=tiles), choice.images_together
        )
        assert card_bound(space.problem, room + STEP_BYTES, blocks) > refit.budget
    assert any(room for room, _ in rooms)


def test_where_no_settings_may_be_worked_out_a_climb_stays_where_it_is(optimality: Any) -> None:
    space, least = near(optimality, 1102, NEAR[0])
    assert climbed(space, least, most=0)[0] is least


def test_on_the_cpu_products_of_decode_count_beside_prompt_tiles_that_lack_them(
    kit: Any,
) -> None:
    images = [(3840, 2160)] * 2
    # the last of 64 rows at a time is alone, as in decode; the last of 128 at a time is not
    text = 8 + (65 - kit.workload(images, prompt=8).prompt_tokens) % 128
    workload = kit.workload(images, prompt=text)
    assert workload.prompt_tokens % 128 == 65
    request, profile = Request(kit.checkpoint("3b"), workload, None), load_profile("cpu")
    least = least_plan(Problem(request, profile))
    problem = Problem(replace(request, budget_bytes=round(least.bound_bytes * 1.003)), profile)
    space = Space(problem)
    refit = Refit(space)
    for number, (_, choice) in enumerate(refit.fitting(least.choice, float("inf")), 1):
        assert refit.worked_out == 1 + number  # none was refused
        assert plain_bound(space, choice) <= refit.budget
    assert refit.worked_out > 1
