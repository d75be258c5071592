"""Device bytes of a setting by the closed form: the context, the arena where it packs without gaps, kernels' blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache

from planner.evaluate import card_bound
from planner.fronts import START, Options, products
from planner.parts import Parts
from planner.plan.program import Outside
from planner.plan.tiles import Tiles
from planner.problem import Problem
from planner.schedule import Choice
from planner.units import MIB

STEP_BYTES = 2 * MIB  # in which a card's segments grow
SMALL_BYTES = 64 * MIB


class Footprint:
    """What one problem's settings need on the device, at least."""

    def __init__(self, problem: Problem, parts: Parts, options: Sequence[Options]) -> None:
        self.problem, self.parts, self.options = problem, parts, options
        self.blocks = lru_cache(maxsize=None)(self._blocks)
        self.beside = lru_cache(maxsize=None)(self._beside)
        self.room = lru_cache(maxsize=None)(self._room)

    def _room(self, cap: float) -> float:
        """The largest arena (on the CPU: the most held at a step) with which any setting under that cap can fit."""
        problem, budget = self.problem, self.problem.request.budget_bytes
        if budget is None:
            return float("inf")
        if problem.on_cpu:
            return budget - self.least_kept_bound
        tiles = START.model_copy(update={"vocabulary_rows": problem.model.text.vocabulary})
        bare = self.parts.bare_text(True, tiles.vocabulary_rows)
        kinds = dict.fromkeys(bare.kinds) if self.parts.repeats else ()
        blocks = [problem.outside(kind, "decode", tiles, ()) for kind in kinds]
        scratch = Outside(name="cap", size_bytes=int(cap), birth=0, death=1)
        known = [*blocks, (scratch,)]
        arena = budget - budget % STEP_BYTES
        overhead = card_bound(problem, arena, known) - arena
        if budget - overhead > SMALL_BYTES:
            # a large arena has a segment of its own, in steps: beside it everything is as it is
            return (budget - overhead) // STEP_BYTES * STEP_BYTES
        while arena > 0 and card_bound(problem, arena, known) > budget:
            arena -= STEP_BYTES
        return arena + STEP_BYTES  # where others' blocks share its segment

    @cached_property
    def least_kept_bound(self) -> int:
        """On the CPU what any setting needs beside what its steps hold."""
        problem = self.problem
        context = problem.fixed_context_bytes + self._least_kept()
        return context + problem.profile.context_error_bytes

    def _least_kept(self) -> int:
        """What the CPU's library keeps at least for the products of any tiles; products of one shape may serve two kinds."""
        least: dict[tuple[int, int], int] = {}
        for kind, found in ((k, f) for each in self.options for k, f in each.items()):
            mine: dict[tuple[int, int], int] = {}
            for option in found:
                kept: dict[tuple[int, int], int] = {}
                for shape in products(self.problem, kind, START.model_copy(update=option.tiles)):
                    pair = shape[1:]
                    kept[pair] = kept.get(pair, 0) + self.problem.kept_bytes(shape)
                for pair, size in kept.items():
                    mine[pair] = min(mine.get(pair, size), size)
            for pair, size in mine.items():
                least[pair] = max(least.get(pair, 0), size)
        return sum(least.values())

    def _blocks(self, tiles: Tiles, together: bool) -> list[tuple[Outside, ...]]:
        """Distinct blocks outside the arena of the steps of any setting with these tiles, in order."""
        problem, parts = self.problem, self.parts
        bare = [
            ("vision", parts.bare_vision(together)),
            ("prefill", parts.bare_text(False, tiles.vocabulary_rows)),
        ]
        if parts.repeats:
            bare.append(("decode", parts.bare_text(True, tiles.vocabulary_rows)))
        found: dict[tuple[Outside, ...], None] = {}
        for phase, part in bare:
            for kind, images in dict.fromkeys(zip(part.kinds, part.images, strict=True)):
                found[problem.outside(kind, phase, tiles, images)] = None
        return list(found)

    def bound(self, choice: Choice, live: int, held: int) -> int:
        """Device bytes with their error, where the arena packs to its live bytes; on the CPU at least so many."""
        problem = self.problem
        if problem.on_cpu:
            shapes = problem.gemm_shapes(choice.tiles, choice.images_together)
            context = problem.context_bytes(shapes)
            return max(held, problem.decoding_bytes) + context + problem.profile.context_error_bytes
        if live <= SMALL_BYTES:
            return card_bound(problem, live, self.blocks(choice.tiles, choice.images_together))
        return in_steps(live) + self.beside(choice.tiles, choice.images_together)

    def limit(self, choice: Choice) -> float:
        """On a card the largest arena with which these tiles fit; infinite where the closed form cannot tell."""
        budget = self.problem.request.budget_bytes
        if budget is None or self.problem.on_cpu:
            return float("inf")
        left = budget - self.beside(choice.tiles, choice.images_together)
        return left // STEP_BYTES * STEP_BYTES if left > SMALL_BYTES else float("inf")

    def _beside(self, tiles: Tiles, together: bool) -> int:
        """What a card holds beside a large arena, which has a segment of its own."""
        return card_bound(self.problem, SMALL_BYTES, self.blocks(tiles, together)) - SMALL_BYTES


def in_steps(size_bytes: int) -> int:
    """The size of a segment for it alone."""
    return -(-size_bytes // STEP_BYTES) * STEP_BYTES
