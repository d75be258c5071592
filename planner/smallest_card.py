"""The settings that need least on a card: tiles in order of the arena and of what kernels' blocks reserve beside it.

Which blocks share segments depends on the sizes of all of them: larger ones may reserve less. So every combination of
tiles that differ in blocks counts; a bound from below tells which are worth the allocator's simulation.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from planner.floor import Floor, Taken
from planner.parts import Frame
from planner.plan.words import Kind
from planner.schedule import Choice
from planner.setting import phases, plain_bound
from planner.space import Alike, Space


class Tile(NamedTuple):
    """A tile of one kind of step."""

    tiles: Mapping[str, int]
    seconds: float
    taken: Taken


def in_order(space: Space, plain: Sequence[Choice]) -> Iterator[tuple[int, Choice]]:
    """Bytes by the closed form and the setting, least first, of equal ones the fastest: these with every combination of tiles that differ in blocks; of tiles with equal blocks the one with the least scratch."""
    heap: list[tuple[int, float, int, Choice, Sequence[Tile]]] = []
    floor = Floor(space.problem)
    for choice in plain:
        for chosen in combinations(space, floor, choice):
            least = floor.bytes([tile.taken for tile in chosen])
            seconds = sum(tile.seconds for tile in chosen)
            heap.append((least, seconds, len(heap), choice, chosen))
    heapq.heapify(heap)
    while heap:
        bound, seconds, number, choice, chosen = heapq.heappop(heap)
        if chosen:
            tiles = {key: value for tile in chosen for key, value in tile.tiles.items()}
            choice = replace(choice, tiles=choice.tiles.model_copy(update=tiles))
            bound = plain_bound(space, choice)
            heapq.heappush(heap, (bound, seconds, number, choice, ()))
        else:
            yield bound, choice


def combinations(space: Space, floor: Floor, choice: Choice) -> Iterator[Sequence[Tile]]:
    """One tile of each kind of step; those that differ in blocks, and what the steps without tiles to choose hold."""
    parts = phases(space, choice)
    base = max(held for _, frame, _ in parts for held in frame.base.values())
    lists = [[Tile({}, 0.0, Taken(base, 0, 0, 0, 0))]]
    for phase, frame, options in parts:
        if options:
            lists += _lists(space, floor, frame, space.by_blocks(phase, choice.images_together))
    return product(*lists)


def _lists(
    space: Space, floor: Floor, frame: Frame, kinds: Mapping[Kind, Sequence[Alike]]
) -> Iterator[list[Tile]]:
    """Of each kind of step its tiles that differ in blocks."""
    for kind, found in kinds.items():
        tiles = []
        for blocks, options in found:
            option = min(options, key=lambda o: o.bytes)
            taken = floor.taken(frame.base[kind] + option.bytes, option.outside, blocks)
            tiles.append(Tile(option.tiles, option.seconds, taken))
        yield tiles
