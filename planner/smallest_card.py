"""The settings that need least on a card: tiles in order of the arena and of what kernels' blocks reserve beside it.

Which blocks share segments depends on the sizes of all of them: larger ones may reserve less. So every combination of
tiles that differ in blocks counts; a bound from below tells which are worth the allocator's simulation.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from planner.allocator.settings import SMALL_BYTES
from planner.evaluate import card_base
from planner.footprint import SMALL_BYTES as WHOLE_BYTES
from planner.footprint import in_steps
from planner.fronts import Options
from planner.parts import Frame, plain_bytes
from planner.plan import Kept, Outside, Phase
from planner.problem import Problem
from planner.schedule import Choice
from planner.simulate import card_bytes
from planner.workspace import doubled_bytes

if TYPE_CHECKING:
    from planner.space import Space


class Taken(NamedTuple):
    """Bytes that steps take.

    `live`: of the arena; `outside`: blocks beside it at most. Of large blocks, with declared ones of twice their size:
    `doubled` at once, and the `largest` alone. `small`: what is added to the segments of small blocks.
    """

    live: int
    outside: int
    doubled: int
    largest: int
    small: int


class Tile(NamedTuple):
    """A tile of one kind of step."""

    tiles: Mapping[str, int]
    seconds: float
    taken: Taken


class Floor:
    """What a card holds at least."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.small_kept = [block for block in problem.kept if block.size_bytes <= SMALL_BYTES]
        self.large_kept = [block for block in problem.kept if block.size_bytes > SMALL_BYTES]
        self.large_bytes = sum(block.size_bytes for block in self.large_kept)
        self.small_bytes = self.reserved(0, self.small_kept, 0, ())
        self.small = lru_cache(maxsize=None)(self._small)
        self.large = lru_cache(maxsize=None)(self._large)

    def beside(self, taken: Sequence[Taken]) -> int:
        """The same without a large arena."""
        return self._bytes([Taken(WHOLE_BYTES, 0, 0, 0, 0), *taken]) - WHOLE_BYTES

    def bytes(self, tiles: Sequence[Tile]) -> int:
        """No setting with these tiles needs less."""
        return self._bytes([tile.taken for tile in tiles])

    def _bytes(self, taken: Sequence[Taken]) -> int:
        live, outside, doubled, largest, small = Taken(*map(max, *taken))
        arena = min(live, WHOLE_BYTES)  # a larger one grows in steps and changes nothing beside it
        large = self.large(arena, outside if outside > SMALL_BYTES else 0, largest)
        large = max(large, in_steps(arena + self.large_bytes + doubled))
        return card_base(self.problem) + in_steps(live - arena) + large + self.small_bytes + small

    def _large(self, arena: int, outside: int, largest: int) -> int:
        """Segments of large blocks: those before the first step; where none of them has room for the largest block, one more."""
        start = self.reserved(arena, self.large_kept, outside, ())
        block = Outside(name="largest", size_bytes=largest, birth=0, death=1)
        if (
            largest
            and "expandable" not in self.problem.alloc_conf
            and self.reserved(arena, self.large_kept, outside, [(block,)]) > start
        ):
            return start + in_steps(largest)
        return start

    def _small(self, blocks: tuple[Outside, ...]) -> int:
        """What these steps add to the segments of small blocks: those of other steps are free then, all of one size."""
        if not blocks:
            return 0
        return self.reserved(0, self.small_kept, 0, [blocks]) - self.small_bytes

    def reserved(
        self,
        arena: int,
        kept: Sequence[Kept],
        outside: int,
        blocks: Sequence[tuple[Outside, ...]],
    ) -> int:
        conf = self.problem.alloc_conf
        return card_bytes(arena, kept, blocks, scratch_bytes=outside, alloc_conf=conf).doubled


def in_order(space: Space, plain: Sequence[Choice]) -> Iterator[tuple[int, Choice]]:
    """Bytes by the closed form and the setting, least first, of equal ones the fastest: these with every combination of tiles that differ in blocks; of tiles with equal blocks the one with the least scratch."""
    heap: list[tuple[int, float, int, Choice, Sequence[Tile]]] = []
    floor = Floor(space.problem)
    for choice in plain:
        for chosen in combinations(space, floor, choice):
            least = floor.bytes(chosen)
            seconds = sum(tile.seconds for tile in chosen)
            heap.append((least, seconds, len(heap), choice, chosen))
    heapq.heapify(heap)
    while heap:
        bound, seconds, number, choice, chosen = heapq.heappop(heap)
        if chosen:
            tiles = {key: value for tile in chosen for key, value in tile.tiles.items()}
            choice = replace(choice, tiles=choice.tiles.model_copy(update=tiles))
            bound = space.footprint.bound(choice, *plain_bytes(space.parts, choice))
            heapq.heappush(heap, (bound, seconds, number, choice, ()))
        else:
            yield bound, choice


def combinations(space: Space, floor: Floor, choice: Choice) -> Iterator[Sequence[Tile]]:
    """One tile of each kind of step; those that differ in blocks, and what the steps without tiles to choose hold."""
    parts, rows = space.parts, choice.tiles.vocabulary_rows
    vision = parts.vision(choice.images_together, choice.vision, choice.depth, False)
    prefill = parts.prefill(choice.prefill, choice.decode, choice.depth, rows)
    frames = [vision, prefill]
    if parts.repeats:
        frames.append(parts.decode(choice.decode, choice.prefill, choice.depth, rows))
    base = max(held for frame in frames for held in frame.base.values())
    lists = [
        [Tile({}, 0.0, Taken(base, 0, 0, 0, 0))],
        *_lists(space, floor, choice, "vision", vision, space.vision[choice.images_together]),
        *_lists(space, floor, choice, "prefill", prefill, space.prefill),
    ]
    return product(*lists)


def _lists(
    space: Space, floor: Floor, choice: Choice, phase: Phase, frame: Frame, options: Options
) -> Iterator[list[Tile]]:
    """Of each kind of step its tiles that differ in blocks."""
    groups = space.parts.groups(choice.images_together) if phase == "vision" else [()]
    for kind, found in options.items():
        least: dict[tuple[tuple[Outside, ...], ...], Tile] = {}
        for option in sorted(found, key=lambda o: o.bytes):
            blocks = space.blocks(kind, phase, option, groups)
            if blocks not in least:
                live = frame.base[kind] + option.bytes
                taken = taken_beside(floor, live, option.outside, blocks)
                least[blocks] = Tile(option.tiles, option.seconds, taken)
        yield list(least.values())


def taken_beside(
    floor: Floor, live: int, outside: int, blocks: Sequence[tuple[Outside, ...]]
) -> Taken:
    """What steps with these blocks take."""
    large = [tuple(b for b in each if doubled_bytes([b]) > SMALL_BYTES) for each in blocks]
    small = [tuple(b for b in each if doubled_bytes([b]) <= SMALL_BYTES) for each in blocks]
    return Taken(
        live,
        outside,
        max(map(doubled_bytes, large)),
        max((doubled_bytes([block]) for each in large for block in each), default=0),
        max(map(floor.small, small)),
    )
