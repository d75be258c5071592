"""Lower bounds on the seconds of parts of the canonical space: no setting below a part is faster.

What bytes alone say: every unit comes over the link at least once, those that are streamed again in every iteration of
decode; steps take what the fastest tiles take that the room leaves; and neither queue helps the other
(`planner.queues.Beside.least`). With what tiles add to the start.
"""

from __future__ import annotations

from functools import lru_cache
from operator import mul
from typing import TYPE_CHECKING

from planner.fronts import least_seconds
from planner.stack import UNLIMITED, Decoding, Root, Stack

if TYPE_CHECKING:
    from planner.space import Space


class Bounds:
    """Of one space."""

    def __init__(self, space: Space) -> None:
        self.space, self.problem = space, space.problem
        self.tower = lru_cache(maxsize=None)(self._tower)
        self.prompts = lru_cache(maxsize=None)(self._prompts)

    def _stack(self, root: Root) -> Stack:
        return self.space.stack(self.space, root.vocabulary_rows)

    def _tower(self, cap: float) -> tuple[float, float, int]:
        """No tower is faster, nor has fewer seconds of steps, nor more of these."""
        if not self.problem.workload.images:
            return 0.0, 0.0, 0
        bare = self.space.parts.bare_vision(True)
        once = self.space.copied(sum(bare.units), first=True)
        first = self.space.copied(bare.units[0], first=True)
        compute = min(least_seconds(options, cap) for options in self.space.vision.values())
        steps = max(
            len(self.space.parts.bare_vision(together).units) for together in self.space.modes
        )
        least = self.problem.costs.beside.least(compute, once, steps)
        return max(compute + first, least), compute, steps

    def front(
        self,
        root: Root,
        streamed: float,
        looped: float,
        compute: float,
        cap: float,
        *,
        residents: tuple[int, int],
        cleared: float = 0.0,
    ) -> float:
        """Vision and prefill take at least so long where so many bytes of the language model are streamed in prefill, and so many in decode.

        `compute`: of the prompt's tiles; `residents`: attention and MLP halves, at most; `cleared`: of new pages for them.
        """
        problem, stack = self.problem, self._stack(root)
        least = problem.costs.beside.least
        pin, brought = stack.pin_bound(looped), stack.brought + cleared
        link = self.space.copied(streamed, first=True)
        serial = 0.0
        if root.depth == 1:
            # nothing is copied while what came through the only slot computes
            shares = [1 - count / stack.layers for count in residents]
            least_of = [self.space.prefill[kind][0].seconds for kind in ("self_attn", "text_mlp")]
            slower = max(compute - sum(least_of), 0.0) * min(shares)
            serial = link + sum(map(mul, shares, least_of)) + slower
        compute += stack.small_prefill
        if not problem.workload.images:
            link = self.space.copied(stack.total, first=True) + cleared
        prefill = max(link + pin, least(compute, link, stack.steps), serial)
        vision, encoding, steps = self.tower(cap)
        together = least(encoding + compute, brought, steps + stack.steps)
        return max(vision + prefill, brought + pin, together)

    def decoding(self, root: Root, looped: float, rest: float, residents: tuple[int, int]) -> float:
        """All takes at least so long where so many bytes are streamed in decode, which takes `rest` where its residents, at most so many attention and MLP halves, are there before."""
        best = UNLIMITED
        for least, compute in self.prompts(root):
            streamed = max(looped, least)
            cap = self.space.caps[0]
            front = self.front(root, streamed, looped, compute, cap, residents=residents)
            best = min(best, front + max(rest, self.loop(root, streamed, looped)))
            if least <= looped:
                break  # slower tiles would only leave room
        return max(best, self._cleared(root, looped)) + self._stack(root).start

    def _prompts(self, root: Root) -> list[tuple[float, float]]:
        """How many bytes are streamed in prefill at least, and seconds of the prompt's tiles: more bytes, fewer seconds."""
        stack = self._stack(root)
        if stack.lax:
            return [(0.0, self.space.prompt_compute)]
        room = self.space.room(root, self.space.caps[-1]) - stack.fixed_prefill
        points = reversed(self.space.points(self.space.caps[0]))
        return [(stack.total - room + size, seconds) for size, seconds in points if size <= room]

    def loop(self, root: Root, streamed: float, looped: float) -> float:
        """Decode takes at least so long where so many bytes are streamed in prefill, and so many in decode."""
        if not self.space.repeats:
            return 0.0
        stack, costs = self._stack(root), self.problem.costs
        # what is added after prefill comes in the first iteration, into new pages
        copied = self.space.copied(streamed, first=False) + costs.touch(int(streamed - looped))
        first = costs.beside.least(stack.decode_compute, copied, stack.steps)
        return first + (self.space.repeats - 1) * stack.period(looped, root.depth)

    def _cleared(self, root: Root, looped: float) -> float:
        """All takes at least so long where so many bytes are streamed in decode: new pages for the others are cleared before its first iteration ends."""
        stack = self._stack(root)
        cleared = self.problem.costs.touch(int(stack.total - looped))
        if not cleared or not self.space.repeats:
            return 0.0
        _, encoding, steps = self.tower(self.space.caps[0])
        compute = encoding + self.space.prompt_compute + stack.small_prefill + stack.decode_compute
        again = self.space.copied(looped, first=False) if looped else 0.0
        copied = stack.brought + cleared + again
        first = self.problem.costs.beside.least(compute, copied, steps + 2 * stack.steps)
        return first + (self.space.repeats - 1) * stack.period(looped, root.depth)

    def filling(
        self,
        decoding: Decoding,
        residents: tuple[int, int, int],
        compute: float,
        cap: float,
        rest: float,
    ) -> float:
        """The same with these residents of prefill; `compute`: of the prompt's tiles, under a cap on blocks outside the arena."""
        root = decoding.root
        stack = self._stack(root)
        streamed = stack.streamed(*residents)
        looped = stack.streamed(decoding.attn, decoding.mlp, decoding.head)
        cleared = self.problem.costs.touch(stack.total - streamed)
        front = self.front(
            root, streamed, looped, compute, cap, residents=residents[:2], cleared=cleared
        )
        return front + max(rest, self.loop(root, streamed, looped)) + stack.start
