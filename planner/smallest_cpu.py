"""The settings that need least on the CPU: tiles in order of what is held at the peak and what the library keeps for their products."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import NamedTuple

from planner.fronts import START, Option, Options, Still, fastest_held, products
from planner.plan.words import Kind
from planner.problem import Problem
from planner.schedule import Choice
from planner.setting import phases, plain_bound
from planner.space import Space
from planner.tiles_cpu import Shapes, held_with


class _Kind(NamedTuple):
    kind: Kind
    part: int  # index of its phase
    options: Sequence[Option]
    shapes: Sequence[Shapes]  # of each option the products
    shares: bool  # products with other kinds
    least: int  # kept for the products of any of its options


class _Node(NamedTuple):
    """Tiles of the first kinds; `bound`: no combination with these needs less."""

    bound: int
    number: int
    chosen: tuple[int, ...]
    peak: int
    shapes: Shapes


def in_order(space: Space, plain: Sequence[Choice]) -> Iterator[tuple[int, Choice]]:
    """Bytes at least and the setting, least first: these with every combination of tiles."""
    return heapq.merge(*(_in_order(space, choice) for choice in plain), key=itemgetter(0))


def _in_order(space: Space, plain: Choice) -> Iterator[tuple[int, Choice]]:
    parts = [(frame.still, options) for _, frame, options in phases(space, plain) if options]
    for tiles in _combinations(space.problem, parts):
        choice = replace(plain, tiles=plain.tiles.model_copy(update=tiles))
        yield plain_bound(space, choice), choice


def _combinations(
    problem: Problem, phases: Sequence[tuple[Still, Options]]
) -> Iterator[dict[str, int]]:
    """Every combination of tiles of these phases, that which needs least first.

    One kind of step after another is given its tiles, the partial combination with the least bound first.
    """
    kinds = _kinds(problem, phases)
    rests: dict[tuple[int, Shapes], int] = {}  # kinds that share come first: few differ
    heap = [_Node(0, 0, (), _floor(phases), frozenset())]
    pushed = 0
    while heap:
        node = heapq.heappop(heap)
        place = len(node.chosen)
        if place == len(kinds):
            tiles: dict[str, int] = {}
            for kind, number in zip(kinds, node.chosen, strict=True):
                tiles.update(kind.options[number].tiles)
            yield tiles
            continue
        own = kinds[place]
        for number in range(len(own.options)):
            chosen = (*node.chosen, number)
            peak = max(node.peak, _peak(kinds, chosen, phases[own.part][0]))
            shapes = node.shapes | own.shapes[number]
            key = place, shapes
            if key not in rests:
                rests[key] = problem.kept_for(shapes) + _rest(problem, kinds[place + 1 :], shapes)
            bound = peak + rests[key]
            pushed += 1
            heapq.heappush(heap, _Node(bound, pushed, chosen, peak, shapes))


def _kinds(problem: Problem, phases: Sequence[tuple[Still, Options]]) -> list[_Kind]:
    """All kinds of steps with options, those that share products with others first."""
    found = [
        (kind, part, options[kind], [_products(problem, kind, o) for o in options[kind]])
        for part, (_, options) in enumerate(phases)
        for kind in options
    ]
    widths = {entry[0]: {shape[1:] for each in entry[3] for shape in each} for entry in found}
    kinds = []
    for kind, part, mine, shapes in found:
        shares = any(widths[kind] & widths[other] for other in widths if other != kind)
        least = min(problem.kept_for(each) for each in shapes)
        kinds.append(_Kind(kind, part, mine, shapes, shares, least))
    return sorted(kinds, key=lambda kind: not kind.shares)


def _products(problem: Problem, kind: Kind, option: Option) -> Shapes:
    return products(problem, kind, START.model_copy(update=dict(option.tiles)))


def _rest(problem: Problem, kinds: Sequence[_Kind], shapes: Shapes) -> int:
    """What is kept at least for the products of kinds to come; of those that share products only the most counts."""
    alone = sum(kind.least for kind in kinds if not kind.shares)
    shared = [
        min(problem.kept_for(each - shapes) for each in kind.shapes)
        for kind in kinds
        if kind.shares
    ]
    return alone + max(shared, default=0)


def _floor(phases: Sequence[tuple[Still, Options]]) -> int:
    """The least peak of all combinations."""
    floor = 0
    for still, options in phases:
        mine = {key: held for key, held in still.items() if {*key[:2]} <= {*options}}
        sizes = sorted(
            {
                held + one.bytes + other.blocks[images]
                for (before, kind, images), held in mine.items()
                for one in options[before]
                for other in options[kind]
            }
        )
        low, high = 0, max(len(sizes) - 1, 0)
        while low < high:
            middle = (low + high) // 2
            if fastest_held(options, mine, sizes[middle]) is None:
                low = middle + 1
            else:
                high = middle
        floor = max(floor, sizes[low] if sizes else 0)
    return floor


def _peak(kinds: Sequence[_Kind], chosen: Sequence[int], still: Still) -> int:
    """The most held at the steps of the last kind and of those before it that are chosen."""
    last = kinds[len(chosen) - 1]
    mine = last.kind, last.options[chosen[-1]]
    return max(
        held_with(still, (kind.kind, kind.options[number]), mine)
        for kind, number in zip(kinds, chosen, strict=False)
        if kind.part == last.part
    )
