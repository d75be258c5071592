"""The smallest budget is exact: with it a plan is found, with one MiB less none; and no setting of all fits that."""

from __future__ import annotations

import importlib
import random
from dataclasses import replace
from itertools import islice, product
from typing import Any

import pytest

from planner import smallest_card, smallest_cpu
from planner.certificate import least_plan, streamed
from planner.errors import BudgetTooSmall
from planner.floor import Floor
from planner.problem import Problem
from planner.profile import load_profile
from planner.schedule import Choice
from planner.search import Request, search
from planner.setting import plain_bound
from planner.space import Space
from planner.units import MIB

CARD_6GB, CARD_16GB, CARD_80GB = "rtx-3060-laptop-6gb", "rtx-5080-16gb", "h100-sxm5-80gb"
PHOTO, SMALL = (1920, 1080), (640, 480)
FEW = [
    ("3b", CARD_6GB, ()),
    ("3b", "cpu", (SMALL,)),
    ("7b", CARD_16GB, (PHOTO, SMALL)),
    ("7b", "cpu", ()),
    ("72b", CARD_80GB, (PHOTO,)),
]
IMAGES: list[tuple[tuple[int, int], ...]] = [(), (PHOTO,), (PHOTO, SMALL), ((3840, 2160), SMALL)]
MODELS = ("3b", "7b", "32b", "72b")


@pytest.fixture(scope="module")
def optimality(kit: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(kit.root / "benchmarks")
        return importlib.import_module("optimality")


def test_tiles_that_all_need_the_same_are_not_all_looked_at(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where reading the largest image is the peak and the library keeps nothing, any tiles do: 200,000 combinations."""
    looked_at = []
    known = smallest_cpu._peak
    monkeypatch.setattr(smallest_cpu, "_peak", lambda *given: looked_at.append(1) or known(*given))
    workload = kit.workload([(28, 28), (3840, 2160), (8000, 6000), (640, 480)], prompt=1)
    request, profile = Request(kit.checkpoint("tiny"), workload, None), load_profile("cpu")
    assert least_plan(Problem(request, profile)).bound_bytes < 2**30
    assert 0 < len(looked_at) < 2000


def check_exact(kit: Any, model: str, device: str, sizes: Any, new_tokens: int) -> None:
    workload = kit.workload(sizes, new=new_tokens)
    request, profile = Request(kit.checkpoint(model), workload, None), load_profile(device)
    least = least_plan(Problem(request, profile)).bound_bytes
    plan = search(replace(request, budget_bytes=least), profile, compared=False)
    assert plan.prediction.bound_peak_bytes <= least
    assert plan.prediction.smallest_budget_bytes == least
    with pytest.raises(BudgetTooSmall) as refused:
        search(replace(request, budget_bytes=least - MIB), profile, compared=False)
    assert refused.value.smallest_bytes == least


@pytest.mark.parametrize(("model", "device", "sizes"), FEW)
def test_the_smallest_budget_plans_and_one_mib_less_does_not(
    kit: Any, model: str, device: str, sizes: Any
) -> None:
    check_exact(kit, model, device, sizes, 16)


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "device", "sizes", "new_tokens"),
    list(product(MODELS, (CARD_6GB, CARD_16GB, CARD_80GB, "cpu"), IMAGES, (1, 64))),
)
def test_over_models_devices_and_images_the_smallest_budget_plans_and_one_mib_less_does_not(
    kit: Any, model: str, device: str, sizes: Any, new_tokens: int
) -> None:
    check_exact(kit, model, device, sizes, new_tokens)


def check_nothing_fits(optimality: Any, seed: int) -> None:
    request, profile = optimality.drawn(seed)
    least = least_plan(Problem(request, profile)).bound_bytes
    within, below = (
        optimality.Everything(Problem(replace(request, budget_bytes=budget), profile))
        for budget in (least, least - MIB)
    )
    assert within.any_fits()
    assert not below.any_fits()


@pytest.mark.parametrize("seed", [0, 2, 4, 5, 6, 7])
def test_of_all_tiles_of_a_small_request_none_fits_one_mib_less(optimality: Any, seed: int) -> None:
    check_nothing_fits(optimality, seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 3, *range(8, 40)])
def test_of_all_tiles_of_more_small_requests_none_fits_one_mib_less(
    optimality: Any, seed: int
) -> None:
    check_nothing_fits(optimality, seed)


@pytest.mark.parametrize("allocator", ["native", "expandable"])
@pytest.mark.parametrize("device", [CARD_6GB, CARD_80GB])
def test_no_tiles_need_less_than_the_floor_by_which_settings_are_ordered(
    kit: Any, device: str, allocator: str
) -> None:
    workload = kit.workload((PHOTO, SMALL), new=16)
    request = replace(Request(kit.checkpoint("7b"), workload, None), allocator=allocator)
    space = Space(Problem(request, load_profile(device)))
    floor = Floor(space.problem)
    draw = random.Random(0)
    met = 0
    for choice in streamed(space):
        for chosen in draw.sample(list(smallest_card.combinations(space, floor, choice)), 25):
            tiles = {key: value for tile in chosen for key, value in tile.tiles.items()}
            setting = replace(choice, tiles=choice.tiles.model_copy(update=tiles))
            needed = plain_bound(space, setting)
            least = floor.bytes([tile.taken for tile in chosen])
            assert least <= needed
            met += least == needed
    assert met > 25


def drawn_setting(space: Space, draw: random.Random) -> Choice:
    """Everything streamed, in tiles drawn from all options."""
    choice = draw.choice(streamed(space))
    tiles: dict[str, int] = {}
    for options in (space.vision[choice.images_together], space.prefill):
        for found in options.values():
            tiles.update(draw.choice(found).tiles)
    return replace(choice, tiles=choice.tiles.model_copy(update=tiles))


# at the peak of these is a step without tiles
@pytest.mark.parametrize("seed", [3006, 3040, 3052, 3054])
def test_on_the_cpu_settings_come_in_order_of_what_they_need_and_none_needs_less_than_the_first(
    optimality: Any, seed: int
) -> None:
    space = Space(Problem(*optimality.drawn(seed)))
    found = list(islice(smallest_cpu.in_order(space, streamed(space)), 60))
    bounds = [bound for bound, _ in found]
    assert bounds == sorted(bounds)
    assert bounds == [plain_bound(space, choice) for _, choice in found]
    draw = random.Random(seed)
    assert all(plain_bound(space, drawn_setting(space, draw)) >= bounds[0] for _ in range(200))
