"""What a card holds at least: a bound from below on the arena and on what the allocator reserves for kernels' blocks.

Small blocks have segments of one size, free again after each step: what a step adds to them does not depend on others.
Of large blocks the bound has those before the first step, and one segment more where none has room for the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from planner.allocator.settings import SMALL_BYTES
from planner.evaluate import card_base
from planner.footprint import SMALL_BYTES as WHOLE_BYTES
from planner.footprint import in_steps
from planner.plan import Kept
from planner.plan.program import Outside
from planner.problem import Problem
from planner.simulate import card_bytes
from planner.workspace import doubled_bytes


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

    def bytes(self, taken: Sequence[Taken]) -> int:
        """No setting needs less whose steps take these."""
        live, outside, doubled, largest, small = Taken(*map(max, *taken))
        arena = min(live, WHOLE_BYTES)  # a larger one grows in steps and changes nothing beside it
        large = self.large(arena, outside if outside > SMALL_BYTES else 0, largest)
        large = max(large, in_steps(arena + self.large_bytes + doubled))
        return card_base(self.problem) + in_steps(live - arena) + large + self.small_bytes + small

    def beside(self, taken: Sequence[Taken]) -> int:
        """The same without a large arena."""
        return self.bytes([Taken(WHOLE_BYTES, 0, 0, 0, 0), *taken]) - WHOLE_BYTES

    def taken(self, live: int, outside: int, blocks: Sequence[tuple[Outside, ...]]) -> Taken:
        """What steps with so many arena bytes and these blocks beside it take."""
        large = [tuple(b for b in each if doubled_bytes([b]) > SMALL_BYTES) for each in blocks]
        small = [tuple(b for b in each if doubled_bytes([b]) <= SMALL_BYTES) for each in blocks]
        return Taken(
            live,
            outside,
            max(map(doubled_bytes, large)),
            max((doubled_bytes([block]) for each in large for block in each), default=0),
            max(map(self.small, small)),
        )

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
