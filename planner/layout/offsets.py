"""Offsets of buffers in one stretch of memory: no two that are alive together may share a byte.

The problem is dynamic storage allocation, NP-hard in general. `place` lays out a plan's arena: plans are close to nested
stacks, for which first fit by a good order is optimal or nearly so; several orders are tried, then a short exact search
(`planner.layout.search`), and the largest sum of live bytes is the lower bound at which trying stops. `pack` is the
stand-alone solver: the same search, by several preferences in turn, until the capacity is reached or time is up.
Source of the orders: Pisarchyk and Lee 2020, arXiv:2001.03288 (greedy by size and by breadth).
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from planner.buffers import ALIGNMENT
from planner.graph import Intervals
from planner.layout.search import PREFERENCES, Problem, Verdict, fit, make_problem

SECONDS = 60.0  # that `pack` takes at most, unless told otherwise
DESCENT_SHARE = 0.2  # of these, for the lowest height above a capacity that was not reached
PLACE_NODES = 100  # decisions of a plan's exact search beyond one per buffer
PLACE_TRIES = 3  # buffers that it places, right or wrong, for each decision allowed
PLACE_PREFERENCES = 2
FIRST_NODES = (
    3  # decisions per buffer before `pack` turns to another preference; doubled in every round
)
SHORT_TRIES = 3  # buffers placed per buffer in a short search; one that goes straight to a layout needs 1 to 2


class Item(NamedTuple):
    name: str
    size_bytes: int
    intervals: Intervals
    life: int  # the same intervals as a bit set: bit i is step i


class Layout(NamedTuple):
    offsets: dict[str, int]
    height_bytes: int
    lower_bound_bytes: int


# --- a plan's arena -----------------------------------------------------------------------------------------------


def place(
    sizes: Mapping[str, int], lifetimes: Mapping[str, Intervals], *, quick: bool = False
) -> Layout:
    """The lowest layout found of buffers with these sizes (multiples of ALIGNMENT) and lifetimes; `quick`: by first fit alone.

    Buffers with the same life lie one behind another, which makes few items of many; where these miss the lower bound,
    single ones are tried. No clock: the same buffers get the same offsets.
    """
    groups: dict[Intervals, list[str]] = {}
    for name, spans in lifetimes.items():
        groups.setdefault(spans, []).append(name)
    together = [
        Item(names[0], sum(sizes[name] for name in names), spans, _bits(spans))
        for spans, names in groups.items()
    ]
    lower = _lower_bound(together)
    starts, height = _lowest_first_fit(together, lower)
    if height > lower and not quick:
        starts, height = _searched(together, lower, starts, height)
    offsets = {}
    for names in groups.values():
        offset = starts[names[0]]
        for name in names:
            offsets[name] = offset
            offset += sizes[name]
    if height > lower:
        single = [Item(name, sizes[name], spans, _bits(spans)) for name, spans in lifetimes.items()]
        found, single_height = _lowest_first_fit(single, lower, below=height)
        if found:
            offsets, height = found, single_height
    assert height % ALIGNMENT == 0
    return Layout({name: offsets[name] for name in lifetimes}, height, lower)


def _searched(
    items: Sequence[Item], lower: int, offsets: dict[str, int], height: int
) -> tuple[dict[str, int], int]:
    """A layout as low as the lower bound by a short exact search, or the one given."""
    problem = make_problem([item.size_bytes for item in items], [item.intervals for item in items])
    for preference in PREFERENCES[:PLACE_PREFERENCES]:
        nodes = len(items) + PLACE_NODES
        outcome = fit(problem, lower, preference, nodes=nodes, tries=PLACE_TRIES * nodes)
        if outcome.verdict is Verdict.FOUND:
            return {item.name: outcome.offsets[i] for i, item in enumerate(items)}, lower
        if outcome.verdict is Verdict.IMPOSSIBLE:
            break
    return offsets, height


def _length(item: Item) -> int:
    return item.life.bit_count()


_ORDERS: Sequence[Callable[[Item], tuple[int | str, ...]]] = (
    # what lives longest lies lowest, so that short-lived buffers share the rest
    lambda item: (-_length(item), -item.size_bytes, item.name),
    lambda item: (-item.size_bytes, -_length(item), item.name),
    lambda item: (-item.size_bytes * _length(item), item.name),
    lambda item: (item.intervals[0][0], -item.size_bytes, item.name),
    lambda item: (-item.intervals[-1][1], -_length(item), item.name),
)


def _lowest_first_fit(
    items: Sequence[Item], lower: int, *, below: int | None = None
) -> tuple[dict[str, int], int]:
    """First fit by the order that ends lowest: offsets and height; no offsets where none ends `below` that height."""
    best: dict[str, int] = {}
    height = sum(item.size_bytes for item in items) + 1 if below is None else below
    for order in _ORDERS:
        found = _first_fit(sorted(items, key=order), height)
        if found:
            best, height = found
        if height <= lower:
            break
    return best, height


def _first_fit(items: Sequence[Item], below: int) -> tuple[dict[str, int], int] | None:
    """Each item at the lowest offset that is free throughout its life; None where they do not end below that height."""
    placed: list[tuple[int, int, int]] = []  # (offset, end, life), by offset
    offsets: dict[str, int] = {}
    height = 0
    for name, size_bytes, _, life in items:
        offset = 0
        for start, end, other in placed:
            if not other & life:
                continue
            if start >= offset + size_bytes:
                break
            if end > offset:
                offset = end
        offsets[name] = offset
        bisect.insort(placed, (offset, offset + size_bytes, life))
        height = max(height, offset + size_bytes)
        if height >= below:
            return None
    return offsets, height


def _bits(spans: Intervals) -> int:
    life = 0
    for birth, death in spans:
        life |= (1 << death) - (1 << birth)
    return life


def _lower_bound(items: Sequence[Item]) -> int:
    changes: dict[int, int] = {}
    for item in items:
        for birth, death in item.intervals:
            changes[birth] = changes.get(birth, 0) + item.size_bytes
            changes[death] = changes.get(death, 0) - item.size_bytes
    total = peak = 0
    for step in sorted(changes):
        total += changes[step]
        peak = max(peak, total)
    return peak


# --- the stand-alone solver ---------------------------------------------------------------------------------------


class Span(NamedTuple):
    """A buffer to pack: `size` units, alive in the half-open interval `[lower, upper)`."""

    id: str
    lower: int
    upper: int
    size: int


class Packing(NamedTuple):
    """The lowest layout found. `proved`: no layout is lower (or, where the capacity is missed, none keeps to it)."""

    offsets: dict[str, int]
    height: int
    lower_bound: int  # largest sum of sizes alive together
    fits: bool
    proved: bool
    nodes: int  # decisions of the search; 0 where first fit sufficed


def pack(
    buffers: Sequence[Span],
    capacity: int,
    *,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Packing:
    """Offsets of all buffers below `capacity`, or the lowest layout found in about `seconds`.

    Where the capacity lies beneath the lower bound no layout can keep to it, and one at the lower bound is looked for.
    """
    start = clock()
    problem = make_problem(
        [span.size for span in buffers], [((span.lower, span.upper),) for span in buffers]
    )
    lower = problem.lower_bound
    effort = _Effort(problem, *_greedy(buffers))
    target = max(capacity, lower)
    # where the target is not found, the last part of the time goes to heights above it
    effort.reach(target, lambda: clock() >= start + seconds * (1 - DESCENT_SHARE))
    effort.descend(target, lambda: clock() >= start + seconds)
    fits = effort.height <= capacity
    return Packing(
        {span.id: offset for span, offset in zip(buffers, effort.offsets, strict=True)},
        effort.height,
        lower,
        fits,
        effort.height == lower if fits else effort.impossible >= capacity or capacity < lower,
        effort.nodes,
    )


def _greedy(buffers: Sequence[Span]) -> tuple[list[int], int]:
    """First fit of the buffers by index."""
    times = sorted({time for span in buffers for time in (span.lower, span.upper)})
    index = {time: i for i, time in enumerate(times)}
    items = []
    for i, span in enumerate(buffers):
        life = (index[span.lower], index[span.upper])
        items.append(Item(f"{i:09}", span.size, (life,), _bits((life,))))
    offsets, height = _lowest_first_fit(items, _lower_bound(items))
    return [offsets[item.name] for item in items], max(height, 0)


class _Effort:
    """The lowest layout so far, and the largest height proved impossible."""

    def __init__(self, problem: Problem, offsets: list[int], height: int) -> None:
        self.problem, self.offsets, self.height = problem, offsets, height
        self.impossible = problem.lower_bound - 1
        self.nodes = 0

    def reach(self, target: int, stop: Callable[[], bool]) -> None:
        """Search for `target`: each preference a little, then each for longer.

        How long that takes hangs on how ties are broken, by orders of magnitude: between, short searches break them otherwise.
        """
        count = len(self.problem.sizes)
        rounds = turn = 0
        while self.height > target > self.impossible and not stop():
            self._try(target, FIRST_NODES * count << rounds, stop)
            rounds += 1
            for _ in range(1 << rounds):
                if self.height <= target or self.impossible >= target or stop():
                    break
                turn += 1
                self._try(target, FIRST_NODES * count, stop, turn, SHORT_TRIES * count)

    def descend(self, target: int, stop: Callable[[], bool]) -> None:
        """Halve the distance between the best height and `target`, or what was missed above it, until `stop`."""
        nodes = FIRST_NODES * len(self.problem.sizes)
        while self.height > target and not stop():
            missed = max(target, self.impossible)
            while self.height - missed > 1 and not stop():
                between = (missed + self.height) // 2
                if self._try(between, nodes, stop) is not Verdict.FOUND:
                    missed = between
            if self.height - 1 <= max(target, self.impossible):
                break
            nodes *= 2

    def _try(
        self,
        height: int,
        nodes: int,
        stop: Callable[[], bool],
        turn: int = 0,
        tries: int | None = None,
    ) -> Verdict:
        """What one of the preferences finds about a height; UNDECIDED where none does."""
        for preference in PREFERENCES:
            outcome = fit(
                self.problem, height, preference, nodes=nodes, tries=tries, turn=turn, stop=stop
            )
            self.nodes += outcome.nodes
            if outcome.verdict is Verdict.FOUND:
                self.offsets = outcome.offsets
                sizes = self.problem.sizes
                self.height = max(a + b for a, b in zip(outcome.offsets, sizes, strict=True))
            elif outcome.verdict is Verdict.IMPOSSIBLE:
                self.impossible = max(self.impossible, height)
            if outcome.verdict is not Verdict.UNDECIDED:
                return outcome.verdict
        return Verdict.UNDECIDED
