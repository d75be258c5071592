"""Combinations of tiles that fit on the CPU, the fastest first: what steps hold of pages of steps before, and what its library keeps for products.

One kind of step after another is given its tiles; a partial combination takes at least as long as the fastest that may
come of it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from planner.buffers import VISION_KINDS
from planner.fronts import START, Option, Options, Still
from planner.parts import Frame
from planner.plan.tiles import Tiles
from planner.plan.words import Kind, Phase
from planner.problem import Problem
from planner.workspace import gemm_shapes

Shapes = frozenset[tuple[int, int, int]]


@dataclass(frozen=True, eq=False)
class TiledKind:
    """A kind of step with its options: `shapes` of each the products. Without tiles to choose there is one."""

    kind: Kind
    frame: Frame
    options: Sequence[Option]
    shapes: Sequence[Shapes]


class _Node(NamedTuple):
    """Tiles of the first kinds, and of the others those that may go with them. `seconds`: no combination with these is faster.

    Of equally fast ones the most complete comes first, then the latest.
    """

    seconds: float
    missing: int
    number: int
    chosen: tuple[int, ...]
    peak: int
    shapes: Shapes
    left: tuple[tuple[int, ...], ...]


def kinds_of(
    problem: Problem, tiles: Tiles, phases: Sequence[tuple[Phase, Frame, Options]]
) -> list[TiledKind]:
    """All kinds of steps of these phases; those without options with the given tiles."""
    found = []
    for phase, frame, options in phases:
        images: dict[Kind, list[tuple[int, ...]]] = {}
        for kind, group in dict.fromkeys(zip(frame.bare.kinds, frame.bare.images, strict=True)):
            images.setdefault(kind, []).append(group)
        for kind, groups in images.items():
            mine = options.get(kind)
            if mine is None:
                taken = {group: problem.taken(kind, phase, tiles, group) for group in groups}
                blocks = {group: outside for group, (_, outside) in taken.items()}
                size = max(scratch for scratch, _ in taken.values())
                mine = [Option(0.0, size, max(blocks.values()), {}, 0, blocks)]
                found.append(TiledKind(kind, frame, mine, [frozenset()]))
                continue
            found.append(
                TiledKind(kind, frame, mine, [_shapes(problem, kind, groups, o) for o in mine])
            )
    return found


def _shapes(
    problem: Problem, kind: Kind, groups: Sequence[tuple[int, ...]], option: Option
) -> Shapes:
    """Products of a kind's steps with these tiles, of all groups of images."""
    tiles, rows = START.model_copy(update=dict(option.tiles)), problem.workload.prompt_tokens
    images = map(problem.images_of, groups)
    return frozenset().union(*(gemm_shapes(kind, problem.model, tiles, i, rows) for i in images))


def without_tiles(problem: Problem, kinds: Sequence[TiledKind], tiles: Tiles) -> Shapes:
    """Products that count whatever tiles these kinds have: lm_head's, decode's, and those of kinds of vision that no step is of. Short tiles may have the same."""
    model, rows = problem.model, problem.workload.prompt_tokens
    images, there = problem.workload.images, {kind.kind for kind in kinds}
    found = set(gemm_shapes("lm_head", model, tiles, (), rows))
    for text in ("self_attn", "text_mlp", "lm_head"):
        found |= gemm_shapes(text, model, tiles, (), rows, decode=True)
    for vision in VISION_KINDS:
        if images and vision not in there:
            found |= gemm_shapes(vision, model, tiles, images, rows)
    return frozenset(found)


def sharing(kinds: Sequence[TiledKind]) -> list[bool]:
    """Of each kind, whether products of another kind may be the same."""
    widths = [{shape[1:] for each in kind.shapes for shape in each} for kind in kinds]
    return [
        any(mine & other for n, other in enumerate(widths) if n != number)
        for number, mine in enumerate(widths)
    ]


class Combinations:
    """Tiles of all kinds with which no step holds more than `limit`, with what is kept for products: `fixed`, those of steps without tiles, and those of tiles."""

    def __init__(
        self, problem: Problem, kinds: Sequence[TiledKind], fixed: Shapes, limit: int
    ) -> None:
        self.problem, self.fixed, self.limit = problem, fixed, limit
        # those that differ most come first
        self.kinds = sorted(kinds, key=lambda k: k.options[0].seconds - k.options[-1].seconds)
        self.shares = sharing(self.kinds)
        self.kept = lru_cache(maxsize=None)(problem.kept_for)
        self.pair = lru_cache(maxsize=None)(self._pair)
        self.heap: list[_Node] = []
        self.pushed = 0

    def fastest_first(self, most: int) -> Iterator[Mapping[str, int]]:
        """One after another, until so many partial combinations were looked at."""
        everything = tuple(tuple(range(len(kind.options))) for kind in self.kinds)
        # the images are read before any step runs
        self._push((), self.problem.decoding_bytes, self.fixed, everything)
        for _ in range(most):
            if not self.heap:
                return
            node = heapq.heappop(self.heap)
            place = len(node.chosen)
            if place == len(self.kinds):
                yield {
                    key: value
                    for kind, number in zip(self.kinds, node.chosen, strict=True)
                    for key, value in kind.options[number].tiles.items()
                }
                continue
            (number, *slower), *others = node.left
            options = self.kinds[place].options
            if slower:
                later = options[slower[0]].seconds - options[number].seconds
                left = (tuple(slower), *others)
                heapq.heappush(self.heap, node._replace(seconds=node.seconds + later, left=left))
            chosen = (*node.chosen, number)
            peak = max(self.pair(n, c, place, number) for n, c in enumerate(chosen))
            shapes = node.shapes | self.kinds[place].shapes[number]
            self._push(chosen, max(peak, node.peak), shapes, tuple(others))

    def _push(
        self, chosen: tuple[int, ...], peak: int, shapes: Shapes, left: tuple[tuple[int, ...], ...]
    ) -> None:
        """With those of the other kinds' tiles that go with these; nothing where a kind has none."""
        place, kept = len(chosen), self.kept(shapes)
        more = [
            [self.kept(shapes | kind.shapes[n]) - kept for n in numbers]
            for kind, numbers in zip(self.kinds[place:], left, strict=True)
        ]
        alone = shared = 0  # of kinds that share products only the most counts
        for least, shares in zip(map(min, more), self.shares[place:], strict=True):
            alone, shared = (alone, max(shared, least)) if shares else (alone + least, shared)
        if peak + kept + alone + shared > self.limit:
            return
        seconds = sum(k.options[n].seconds for k, n in zip(self.kinds, chosen, strict=False))
        going = []
        for other, (numbers, extra) in enumerate(zip(left, more, strict=True), place):
            rest = self.limit - kept - alone + (0 if self.shares[other] else min(extra))
            mine = tuple(
                n
                for n, size in zip(numbers, extra, strict=True)
                if max(peak, self._beside(chosen, other, n)) <= rest - size
            )
            if not mine:
                return
            seconds += self.kinds[other].options[mine[0]].seconds
            going.append(mine)
        self.pushed += 1
        node = _Node(seconds, len(going), -self.pushed, chosen, peak, shapes, tuple(going))
        heapq.heappush(self.heap, node)

    def _beside(self, chosen: tuple[int, ...], other: int, number: int) -> int:
        """The most held at steps of another kind with these tiles; pages of the last that was chosen count."""
        own = self.pair(other, number, other, number)
        return max(own, self.pair(len(chosen) - 1, chosen[-1], other, number)) if chosen else own

    def _pair(self, one: int, number: int, other: int, second: int) -> int:
        """The most held at a step of one of two kinds while pages of the other are there."""
        a, b = self.kinds[one], self.kinds[other]
        if a.frame is not b.frame:
            return 0
        return held_with(a.frame.still, (a.kind, a.options[number]), (b.kind, b.options[second]))


def held_with(still: Still, one: tuple[Kind, Option], other: tuple[Kind, Option]) -> int:
    """The most held at a step of one of two kinds beside what one of the other has written before."""
    return max(
        (
            still[before, kind, images] + written.bytes + size
            for (before, written), (kind, taking) in ((one, other), (other, one))
            for images, size in taking.blocks.items()
            if (before, kind, images) in still
        ),
        default=0,
    )
