"""The settings that need least on the CPU: tiles in order of what is held at the peak and what the library keeps for their products."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import NamedTuple

from planner.fronts import fastest_held
from planner.problem import Problem
from planner.schedule import Choice
from planner.setting import phases, plain_bound
from planner.space import Space
from planner.tiles_cpu import Shapes, TiledKind, held_with, kinds_of, sharing, without_tiles


class _Kind(NamedTuple):
    tiled: TiledKind
    shares: bool  # products with other kinds
    least: int  # kept for the products of any of its options, beside those of steps without tiles


class _Node(NamedTuple):
    """Tiles of the first kinds; `bound`: no combination with these needs less. Of equal ones the most complete comes first."""

    bound: int
    missing: int
    number: int
    chosen: tuple[int, ...]
    peak: int
    shapes: Shapes


def in_order(space: Space, plain: Sequence[Choice]) -> Iterator[tuple[int, Choice]]:
    """Bytes at least and the setting, least first: these with every combination of tiles."""
    return heapq.merge(*(_in_order(space, choice) for choice in plain), key=itemgetter(0))


def _in_order(space: Space, plain: Choice) -> Iterator[tuple[int, Choice]]:
    problem = space.problem
    kinds = kinds_of(problem, plain.tiles, phases(space, plain))
    fixed = without_tiles(problem, kinds, plain.tiles)
    for tiles in _combinations(problem, kinds, fixed):
        choice = replace(plain, tiles=plain.tiles.model_copy(update=tiles))
        yield plain_bound(space, choice), choice


def _combinations(
    problem: Problem, tiled: Sequence[TiledKind], fixed: Shapes
) -> Iterator[dict[str, int]]:
    """Every combination of tiles of these kinds beside the products of steps without, that which needs least first.

    One kind of step after another is given its tiles, the partial combination with the least bound first.
    """
    kinds = _kinds(problem, tiled, fixed)
    rests: dict[tuple[int, Shapes], int] = {}  # kinds that share come first: few differ
    floor = max(problem.decoding_bytes, *map(_floor, _frames(tiled)))
    heap = [_Node(0, len(kinds), 0, (), floor, fixed)]
    pushed = 0
    while heap:
        node = heapq.heappop(heap)
        place = len(node.chosen)
        if place == len(kinds):
            tiles: dict[str, int] = {}
            for kind, number in zip(kinds, node.chosen, strict=True):
                tiles.update(kind.tiled.options[number].tiles)
            yield tiles
            continue
        own = kinds[place].tiled
        for number in range(len(own.options)):
            chosen = (*node.chosen, number)
            peak = max(node.peak, _peak(kinds, chosen))
            shapes = node.shapes | own.shapes[number]
            key = place, shapes
            if key not in rests:
                rests[key] = problem.kept_for(shapes) + _rest(problem, kinds[place + 1 :], shapes)
            bound = peak + rests[key]
            pushed += 1
            missing = len(kinds) - len(chosen)
            heapq.heappush(heap, _Node(bound, missing, pushed, chosen, peak, shapes))


def _kinds(problem: Problem, tiled: Sequence[TiledKind], fixed: Shapes) -> list[_Kind]:
    """All kinds of steps: those without a choice, those that share products with others, the rest."""
    kinds = []
    for kind, shares in zip(tiled, sharing(tiled), strict=True):
        least = min(problem.kept_for(each - fixed) for each in kind.shapes)
        kinds.append(_Kind(kind, shares, least))
    return sorted(kinds, key=lambda kind: (len(kind.tiled.options) > 1, not kind.shares))


def _rest(problem: Problem, kinds: Sequence[_Kind], shapes: Shapes) -> int:
    """What is kept at least for the products of kinds to come; of those that share products only the most counts."""
    alone = sum(kind.least for kind in kinds if not kind.shares)
    shared = [
        min(problem.kept_for(each - shapes) for each in kind.tiled.shapes)
        for kind in kinds
        if kind.shares
    ]
    return alone + max(shared, default=0)


def _frames(tiled: Sequence[TiledKind]) -> list[list[TiledKind]]:
    """The kinds of each phase."""
    found: dict[int, list[TiledKind]] = {}
    for kind in tiled:
        found.setdefault(id(kind.frame), []).append(kind)
    return list(found.values())


def _floor(kinds: Sequence[TiledKind]) -> int:
    """The least peak of all combinations of tiles of one phase."""
    still = kinds[0].frame.still
    options = {kind.kind: kind.options for kind in kinds}
    sizes = sorted(
        {
            held + one.bytes + other.blocks[images]
            for (before, kind, images), held in still.items()
            for one in options[before]
            for other in options[kind]
        }
    )
    low, high = 0, max(len(sizes) - 1, 0)
    while low < high:
        middle = (low + high) // 2
        if fastest_held(options, still, sizes[middle]) is None:
            low = middle + 1
        else:
            high = middle
    return sizes[low] if sizes else 0


def _peak(kinds: Sequence[_Kind], chosen: Sequence[int]) -> int:
    """The most held at the steps of the last kind and of those before it that are chosen."""
    last = kinds[len(chosen) - 1].tiled
    mine = last.kind, last.options[chosen[-1]]
    return max(
        held_with(last.frame.still, (kind.tiled.kind, kind.tiled.options[number]), mine)
        for kind, number in zip(kinds, chosen, strict=False)
        if kind.tiled.frame is last.frame
    )
