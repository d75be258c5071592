"""The exact search against trying everything, and on tables that fit without a byte to spare."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from planner.layout import Span, pack, place
from planner.layout.search import PREFERENCES, Intervals, Verdict, fit, make_problem

Cut = Callable[[int, int], list[Span]]
Check = Callable[..., int]


def least_height(sizes: list[int], lives: list[Intervals]) -> int:
    """The least height: every order, each buffer on the highest one below it."""
    count, best = len(sizes), sum(sizes)
    overlap = [
        [any(a < d and c < b for a, b in one for c, d in two) for two in lives] for one in lives
    ]

    def extend(offsets: dict[int, int], height: int) -> None:
        nonlocal best
        if height >= best:
            return
        if len(offsets) == count:
            best = height
            return
        for i in range(count):
            if i in offsets:
                continue
            offset = max((offsets[j] + sizes[j] for j in offsets if overlap[i][j]), default=0)
            if offset >= max(offsets.values(), default=0):
                extend({**offsets, i: offset}, max(height, offset + sizes[i]))

    extend({}, 0)
    return best


def random_lives(draw: random.Random, count: int) -> list[Intervals]:
    lives: list[Intervals] = []
    for _ in range(count):
        times = sorted(draw.sample(range(11), draw.choice([2, 2, 4])))
        lives.append(tuple(zip(times[::2], times[1::2], strict=True)))
    return lives


@pytest.mark.parametrize("tightest_first", [False, True])
def test_the_search_finds_the_least_height_and_refuses_the_one_beneath(
    tightest_first: bool,
) -> None:
    draw = random.Random(3)
    above = 0
    for _ in range(200):
        count = draw.randint(2, 7)
        sizes = [draw.randint(1, draw.choice([2, 4, 9])) for _ in range(count)]
        lives = random_lives(draw, count)
        problem = make_problem(sizes, lives)
        best = least_height(sizes, lives)
        above += best > problem.lower_bound
        for preference in PREFERENCES:
            chosen = preference._replace(tightest_first=tightest_first)
            assert fit(problem, best, chosen, nodes=10**6).verdict is Verdict.FOUND
            assert fit(problem, best - 1, chosen, nodes=10**6).verdict is Verdict.IMPOSSIBLE
    assert above >= 5  # otherwise the lower bound alone would refuse


def test_the_limit_of_decisions_leaves_the_question_open(partition: Cut) -> None:
    spans = partition(60, 1)
    problem = make_problem([s.size for s in spans], [((s.lower, s.upper),) for s in spans])
    assert fit(problem, 2**20, PREFERENCES[0], nodes=10**6, tries=5).verdict is Verdict.UNDECIDED
    outcome = fit(problem, 2**20, PREFERENCES[0], nodes=10)
    assert outcome.verdict is Verdict.UNDECIDED
    assert not outcome.offsets


@pytest.mark.parametrize(("count", "seed"), [(40, 0), (100, 1), (200, 0), (200, 3), (400, 3)])
def test_partitions_of_a_rectangle_are_packed_without_a_byte_to_spare(
    partition: Cut, check: Check, count: int, seed: int
) -> None:
    spans = partition(count, seed)
    found = pack(spans, 2**20, seconds=30)
    assert check(spans, found.offsets) == found.height == found.lower_bound == 2**20
    assert found.fits
    assert found.proved


def test_ties_broken_otherwise_find_what_one_order_does_not(partition: Cut, check: Check) -> None:
    """Breaking ties in one way alone, 35,000 decisions did not suffice."""
    spans = partition(400, 1)
    found = pack(spans, 2**20, seconds=60)
    assert check(spans, found.offsets) == found.height == 2**20
    assert found.nodes < 15_000


def test_the_same_table_is_packed_the_same_way(partition: Cut) -> None:
    spans = partition(200, 1)
    assert pack(spans, 2**20) == pack(spans, 2**20)


def test_a_capacity_beneath_the_lower_bound_gets_the_lowest_layout_and_a_proof(
    partition: Cut, check: Check
) -> None:
    spans = partition(100, 2)
    found = pack(spans, 2**20 - 1)
    assert not found.fits
    assert found.proved
    assert check(spans, found.offsets) == found.height == 2**20


def test_time_that_is_up_leaves_the_lowest_layout_so_far(partition: Cut, check: Check) -> None:
    ticks = iter(range(10**6))
    spans = partition(400, 0)
    found = pack(spans, 2**20, seconds=3, clock=lambda: next(ticks))
    assert not found.fits
    assert not found.proved
    assert check(spans, found.offsets) == found.height > 2**20


def test_a_plan_s_buffers_reach_the_bound_where_first_fit_does_not(partition: Cut) -> None:
    spans = partition(60, 1)
    sizes = {s.id: s.size for s in spans}
    lives: dict[str, Intervals] = {s.id: ((s.lower, s.upper),) for s in spans}
    layout = place(sizes, lives)
    assert layout.height_bytes == layout.lower_bound_bytes == 2**20
    assert layout == place(sizes, lives)


def test_a_buffer_passed_over_may_rest_on_what_was_placed_instead() -> None:
    """Whoever forgets that finds this one impossible."""
    sizes = [8, 5, 2, 5, 6, 7, 6, 1, 2, 3, 3, 5, 8]
    births = [1, 1, 0, 3, 8, 1, 7, 4, 4, 6, 2, 9, 2]
    deaths = [14, 8, 9, 7, 14, 13, 9, 13, 12, 12, 13, 13, 4]
    lives: list[Intervals] = [(life,) for life in zip(births, deaths, strict=True)]
    problem = make_problem(sizes, lives)
    for preference in PREFERENCES:
        chosen = preference._replace(tightest_first=False)
        verdict = fit(problem, problem.lower_bound, chosen, nodes=10_000).verdict
        assert verdict is not Verdict.IMPOSSIBLE
    assert fit(problem, problem.lower_bound, PREFERENCES[3], nodes=100).verdict is Verdict.FOUND
