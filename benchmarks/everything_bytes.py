"""Whether a setting of `everything.py` may fit: its bytes by the closed form, never more than those of its plan."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import product

from everything_parts import Combinations, Part, Vector, Vectors

from planner.evaluate import card_bound
from planner.footprint import SMALL_BYTES, STEP_BYTES, Footprint
from planner.fronts import Option, Options
from planner.parts import Bare, Frame, Parts
from planner.plan.program import Outside
from planner.plan.words import Kind, Order, Phase
from planner.problem import Problem
from planner.workspace import gemm_shapes

Taken = dict[Kind, tuple[int, Mapping[tuple[int, ...], int]]]


class Bytes:
    """Bytes of the settings with one lm_head tiling, way of handling images, and cap on blocks outside the arena."""

    def __init__(
        self,
        problem: Problem,
        parts: Parts,
        footprint: Footprint,
        tiles: Combinations,
        rows: int,
        cap: float,
        together: bool,
    ) -> None:
        self.problem, self.parts, self.footprint, self.tiles = problem, parts, footprint, tiles
        self.together, self.budget = together, problem.request.budget_bytes
        self.known: dict[tuple[int, Vector, bool], int] = {}
        self.bounds: dict[tuple[int, tuple[tuple[Outside, ...], ...]], int] = {}
        self.blocks = lru_cache(maxsize=None)(self._blocks)
        self.besides = lru_cache(maxsize=None)(self._besides)
        self._find_products()
        self.fixed = {
            "vision": self._fixed("vision", parts.bare_vision(together), tiles.vision),
            "prefill": self._fixed("prefill", parts.bare_text(False, rows), tiles.prefill),
            "decode": self._fixed("decode", parts.bare_text(True, rows), {}),
        }
        self.room = footprint.room(cap)
        self.left = lru_cache(maxsize=None)(self._left)
        self.least = self._least("vision"), self._least("prefill")

    def _fixed(self, phase: Phase, bare: Bare, options: Options) -> Taken:
        """Scratch and blocks outside the arena of kinds without options."""
        found: Taken = {}
        for kind, images in zip(bare.kinds, bare.images, strict=True):
            if kind not in options:
                size, outside = self.problem.taken(kind, phase, self.tiles.start, images)
                found[kind] = size, {images: outside}
        return found

    def _find_products(self) -> None:
        """On the CPU the products of each kind's options, and those of all others."""
        problem = self.problem
        self.products: dict[tuple[Kind, int], frozenset[tuple[int, int, int]]] = {}
        self.shapes: frozenset[tuple[int, int, int]] = frozenset()
        if not problem.on_cpu:
            return
        groups = self.parts.groups(self.together)
        model, rows = problem.model, problem.workload.prompt_tokens
        for kind, found in [*self.tiles.vision.items(), *self.tiles.prefill.items()]:
            images = [problem.images_of(g) for g in groups] if kind in self.tiles.vision else [()]
            for number, option in enumerate(found):
                tiles = self.tiles.start.model_copy(update=dict(option.tiles))
                self.products[kind, number] = frozenset[tuple[int, int, int]]().union(
                    *(gemm_shapes(kind, model, tiles, each, rows) for each in images)
                )
        for kind in ("self_attn", "text_mlp", "lm_head"):
            if kind == "lm_head":
                self.shapes |= gemm_shapes(kind, model, self.tiles.start, (), rows)
            self.shapes |= gemm_shapes(kind, model, self.tiles.start, (), rows, decode=True)

    def _least(self, phase: Phase) -> Vector:
        """The tiles for which least is taken beside what steps hold: on the CPU kept by its library, on a card by a kind's blocks."""
        options = list((self.tiles.vision if phase == "vision" else self.tiles.prefill).values())
        if not self.problem.on_cpu:
            return tuple(
                min(range(len(o)), key=[each.outside for each in o].__getitem__) for o in options
            )
        other = tuple(0 for _ in (self.tiles.prefill if phase == "vision" else self.tiles.vision))
        return min(
            product(*(range(len(found)) for found in options)),
            key=lambda v: self.besides((v, other) if phase == "vision" else (other, v)),
        )

    def beside_least(self, phase: Phase, vector: Vector) -> int:
        """Bytes beside what the steps hold, with those tiles of the other phase for which they are fewest."""
        vision, prefill = self.least
        return self.besides((vector, prefill) if phase == "vision" else (vision, vector))

    def _left(self, phase: Phase, vector: Vector) -> float:
        """Bytes that a phase may hold with these tiles, the other phase's tiles being those for which least is taken beside."""
        budget = self.budget
        if budget is None:
            return float("inf")
        if not self.problem.on_cpu and self.room <= SMALL_BYTES:
            return self.room
        left = budget - self.beside_least(phase, vector)
        return min(self.room, left if self.problem.on_cpu else left // STEP_BYTES * STEP_BYTES)

    def may_fit(self, order: Order, tower: Part, text: Part, vectors: Vectors) -> bool:
        """By the closed form of the bytes."""
        budget = self.budget
        if budget is None:
            return True
        held = max(self.held("vision", tower, vectors[0]), self.held("prefill", text, vectors[1]))
        held = max(held, text.looped)
        if order == "all_first":
            held = max(held, self.held("vision", tower, vectors[0], loaded=True) + text.early)
        return self.fits(held, vectors)

    def fits(self, held: int, vectors: Vectors) -> bool:
        """Whether so many bytes held fit the budget beside what these tiles take, by the closed form."""
        budget = self.budget
        assert budget is not None
        held = max(held, self.problem.decoding_bytes)
        if self.problem.on_cpu or held > SMALL_BYTES:
            whole = held if self.problem.on_cpu else -(-held // STEP_BYTES) * STEP_BYTES
            return whole + self.besides(vectors) <= budget
        key = held, self.blocks(vectors)
        if key not in self.bounds:
            self.bounds[key] = card_bound(self.problem, *key)
        return self.bounds[key] <= budget

    def has_room(self, frame: Frame, kind: Kind, option: Option) -> bool:
        """Whether these tiles fit where other kinds take nothing."""
        if not self.problem.on_cpu:
            return option.bytes <= self.room - frame.base[kind]
        return all(
            held + option.bytes + option.blocks[images] <= self.room
            for (before, after, images), held in frame.still.items()
            if before == after == kind
        )

    def _blocks(self, vectors: Vectors) -> tuple[tuple[Outside, ...], ...]:
        return tuple(self.footprint.blocks(self.tiles.both(vectors), self.together))

    def _besides(self, vectors: Vectors) -> int:
        """Bytes beside what the steps hold: on the CPU the context, on a card what is reserved beside a large arena."""
        if not self.problem.on_cpu:
            key = SMALL_BYTES, self.blocks(vectors)
            if key not in self.bounds:
                self.bounds[key] = card_bound(self.problem, *key)
            return self.bounds[key] - SMALL_BYTES
        shapes = self.shapes.union(
            *(
                self.products[kind, index]
                for options, vector in zip(
                    (self.tiles.vision, self.tiles.prefill), vectors, strict=True
                )
                for kind, index in zip(options, vector, strict=True)
            )
        )
        return self.problem.context_bytes(shapes) + self.problem.profile.context_error_bytes

    def held(self, phase: Phase, part: Part, vector: Vector, *, loaded: bool = False) -> int:
        """The most bytes held in a phase by the closed form."""
        key = part.number, vector, loaded
        known = self.known.get(key)
        if known is None:
            frame = part.loaded if loaded and part.loaded else part.frame
            known = self.known[key] = self.bytes_held(phase, frame, vector)
        return known

    def bytes_held(self, phase: Phase, frame: Frame, vector: Vector) -> int:
        if not frame.bare.kinds:
            return 0
        options = self.tiles.options(phase)
        taken = dict(self.fixed[phase])
        if vector:
            for (kind, found), number in zip(options.items(), vector, strict=True):
                taken[kind] = found[number].bytes, found[number].blocks
        if not self.problem.on_cpu:
            return max(base + taken[kind][0] for kind, base in frame.base.items())
        return max(
            held + taken[before][0] + taken[kind][1][images]
            for (before, kind, images), held in frame.still.items()
        )
