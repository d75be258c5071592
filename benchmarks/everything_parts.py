"""What the settings of `everything.py` are put together from: combinations of tiles, and residents of a phase."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from planner.fronts import START, Option, Options
from planner.parts import Frame
from planner.plan.tiles import Tiles
from planner.plan.words import Phase
from planner.schedule import PhaseResidency

Vector = tuple[int, ...]  # of each kind of step the number of its tiles, the fastest first
Vectors = tuple[Vector, Vector]  # of vision and of prefill


class Part(NamedTuple):
    """Residents of a phase, and the fastest combinations of tiles that fit by themselves."""

    number: int
    frame: Frame
    residency: PhaseResidency
    vectors: tuple[Vector, ...]  # none is slower in all
    seconds: tuple[float, float]  # alone, with the fastest tiles of each kind
    compute: float
    copied: float
    rest: float = 0.0
    decode: PhaseResidency = PhaseResidency(0, 0)
    looped: int = 0  # bytes held in decode
    there: float = 0.0  # seconds with all residents there from the start
    brought: float = 0.0  # seconds of copying these
    early: int = 0  # bytes of these
    loaded: Frame | None = None  # with all residents there before the first step
    peak: int = 0  # bytes alive in decode
    like: tuple[object, ...] = ()  # equal where the frames are


class Combinations:
    """The tiles that each kind of step may have, and what is put together from them."""

    def __init__(self, vision: Options, prefill: Options, rows: int) -> None:
        self.vision, self.prefill = vision, prefill
        self.start = START.model_copy(update={"vocabulary_rows": rows})
        self.of = lru_cache(maxsize=None)(self._of)

    def options(self, phase: Phase) -> Options:
        return self.vision if phase == "vision" else self.prefill

    def every(self, phase: Phase) -> Iterator[Vector]:
        """Every combination of a phase's tiles."""
        options = self.options(phase)
        return product(*(range(len(found)) for found in options.values()))

    def chosen(self, phase: Phase, vector: Vector) -> dict[str, int]:
        chosen: dict[str, int] = {}
        for index, found in zip(vector, self.options(phase).values(), strict=True):
            chosen.update(found[index].tiles)
        return chosen

    def _of(self, phase: Phase, vector: Vector) -> Tiles:
        return self.start.model_copy(update=self.chosen(phase, vector))

    def both(self, vectors: Vectors) -> Tiles:
        tiles = self.of("vision", vectors[0])
        return tiles.model_copy(update=self.chosen("prefill", vectors[1]))

    def slower(self, vectors: Vectors) -> Iterator[Vectors]:
        """Each kind's next slower tiles."""
        vision, prefill = vectors
        for changed in slower(vision, list(self.vision.values())):
            yield changed, prefill
        for changed in slower(prefill, list(self.prefill.values())):
            yield vision, changed


def slower(vector: Vector, options: Sequence[Sequence[Option]]) -> Iterator[Vector]:
    """The same with the next slower tiles of one kind."""
    for place, (index, found) in enumerate(zip(vector, options, strict=True)):
        if index + 1 < len(found):
            yield (*vector[:place], index + 1, *vector[place + 1 :])
