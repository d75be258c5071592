"""The fastest tiles with which given residents fit: of all combinations that may, not of those that a cap leaves."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice, product
from operator import itemgetter

from planner.floor import Floor, Taken
from planner.footprint import SMALL_BYTES, STEP_BYTES
from planner.fronts import START, Option
from planner.plan.program import Outside
from planner.plan.words import Kind, Phase
from planner.schedule import Choice
from planner.setting import phases, spared
from planner.space import Space
from planner.tiles_cpu import Combinations, kinds_of, without_tiles
from planner.worked import worked
from planner.workspace import peak_bytes

CHECKED = 24  # combinations of tiles that are worked out for one setting, at most
OPENED = 2000  # partial ones that are looked at, at most
GRAIN_BYTES = 2**17  # in which small arenas are told apart

PHASES: tuple[Phase, ...] = ("vision", "prefill")  # that have tiles to choose


class Refit:
    """Settings of a request with tiles fitted to what they really need; without a budget the fastest tiles."""

    def __init__(self, space: Space) -> None:
        self.space, self.problem = space, space.problem
        budget = self.problem.request.budget_bytes
        self.budget = sys.maxsize if budget is None else budget
        self.rooms = lru_cache(maxsize=None)(self._rooms)
        self.worked_out = 0

    def fitting(self, choice: Choice, below: float) -> Iterator[tuple[float, Choice]]:
        """Exact seconds, less than `below`, and the setting with tiles with which it fits by the closed form: the fastest tiles first."""
        self.worked_out += 1
        quickest = self._quickest(choice)
        seconds = worked(self.space.parts, quickest).seconds + self.space.start(quickest.tiles)
        if seconds >= below:
            return
        if self.problem.request.budget_bytes is None:
            yield seconds, quickest
            return
        for tiles in islice(self._combinations(choice), CHECKED):
            self.worked_out += 1
            setting, found, excess = spared(self.space, _tiled(choice, tiles))
            seconds = found.seconds + self.space.start(setting.tiles)
            if seconds < below and excess <= 0:
                yield seconds, setting

    def _quickest(self, choice: Choice) -> Choice:
        """With the fastest tiles of all."""
        options = (self.space.options(phase, choice.images_together) for phase in PHASES)
        found = (found for each in options for found in each.values())
        return _tiled(choice, {k: v for each in found for k, v in each[0].tiles.items()})

    def _combinations(self, choice: Choice) -> Iterator[Mapping[str, int]]:
        return self._on_cpu(choice) if self.problem.on_cpu else self._on_card(choice)

    def _on_cpu(self, choice: Choice) -> Iterator[Mapping[str, int]]:
        problem = self.problem
        kinds = kinds_of(problem, choice.tiles, phases(self.space, choice))
        fixed = without_tiles(problem, kinds, choice.tiles)
        context = problem.fixed_context_bytes + problem.profile.context_error_bytes
        return Combinations(problem, kinds, fixed, self.budget - context).fastest_first(OPENED)

    # --- a card ---------------------------------------------------------------------------------------------------

    def _on_card(self, choice: Choice) -> Iterator[Mapping[str, int]]:
        """Under each combination of blocks the fastest tiles for which the arena has room, the fastest of all first."""
        base = {
            kind: frame.base[kind]
            for _, frame, options in phases(self.space, choice)
            for kind in options
        }
        found: dict[tuple[int, ...], tuple[float, Mapping[str, int]]] = {}
        rooms = self.rooms(choice.images_together, choice.tiles.vocabulary_rows)
        for room, classes in rooms:
            tiles: dict[str, int] = {}
            seconds = 0.0
            for kind, options in classes.items():
                fits = (o for o in options if base[kind] + o.bytes <= room)
                option = next(fits, None)
                if option is None:
                    break
                tiles.update(option.tiles)
                seconds += option.seconds
            else:
                found[tuple(tiles.values())] = seconds, tiles
        return (tiles for _, tiles in sorted(found.values(), key=itemgetter(0)))

    def _rooms(
        self, together: bool, vocabulary_rows: int
    ) -> list[tuple[int, Mapping[Kind, list[Option]]]]:
        """Of each combination of blocks beside the arena the bytes that it may have, and the options of each kind of step."""
        floor, fixed = Floor(self.problem), self._fixed_blocks(vocabulary_rows)
        always = floor.taken(0, max(map(peak_bytes, fixed)), fixed)
        kinds = {
            kind: [
                (floor.taken(0, options[0].outside, blocks), options) for blocks, options in found
            ]
            for phase in PHASES
            for kind, found in self.space.by_blocks(phase, together).items()
        }
        rooms: list[tuple[int, Mapping[Kind, list[Option]]]] = []
        for combination in product(*kinds.values()):
            room = self._room(floor, [always, *map(itemgetter(0), combination)])
            rooms.append((room, dict(zip(kinds, map(itemgetter(1), combination), strict=True))))
        return rooms

    def _room(self, floor: Floor, taken: Sequence[Taken]) -> int:
        """The largest arena beside steps that take these blocks."""
        room = (self.budget - floor.beside(taken)) // STEP_BYTES * STEP_BYTES
        if room >= SMALL_BYTES:
            return room

        def needed(arena: int) -> int:
            return floor.bytes([Taken(arena, 0, 0, 0, 0), *taken])

        # a small one shares segments with blocks
        sizes = range(0, SMALL_BYTES, GRAIN_BYTES)
        return sizes[max(bisect_right(sizes, self.budget, key=needed) - 1, 0)]

    def _fixed_blocks(self, vocabulary_rows: int) -> list[tuple[Outside, ...]]:
        """Blocks outside the arena of the language model's steps that have no tiles to choose."""
        parts = self.space.parts
        tiles = START.model_copy(update={"vocabulary_rows": vocabulary_rows})
        texts: list[tuple[Phase, bool]] = [("prefill", False), ("decode", True)]
        return [
            self.problem.outside(kind, phase, tiles, ())
            for phase, looped in texts[: 2 if parts.repeats else 1]
            for kind in dict.fromkeys(parts.bare_text(looped, vocabulary_rows).kinds)
            if kind not in self.space.options(phase, True)
        ]


def _tiled(choice: Choice, tiles: Mapping[str, int]) -> Choice:
    return replace(choice, tiles=choice.tiles.model_copy(update=dict(tiles)))
