"""From a plan to better ones beside it.

The canonical space takes for so many residents the fastest tiles that may fit, and where these do not fit after all
gives everything less room. A few MiB above the smallest budget that leaves nothing but the plan that needs least, and
on the CPU, whose pages the closed form knows less well, it may leave out a few per cent elsewhere. So from the plan
found one lever after another is moved, with the tiles fitted anew to what each setting really needs.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, product
from operator import add

from planner.evaluate import Evaluated
from planner.plan.words import Order
from planner.refit import Refit
from planner.schedule import Anchor, Choice, PhaseResidency
from planner.setting import residents, weighed_seconds
from planner.space import DEPTHS, Space
from planner.variants import evaluate_ordered

BETTER = 1e-6  # in proportion, or it is not worth a step
STEPS = 3  # units more or fewer where layers are few, at most
NOTHING = PhaseResidency(0, 0)
ORDERS: tuple[Order, ...] = ("vision_then_llm", "prefetch", "all_first")


def climbed(space: Space, best: Evaluated, *, most: int) -> tuple[Evaluated, int]:
    """The plan, or a faster one that fits, and how many settings were worked out: from plan to plan, the fastest of all neighbours first, until none is faster or there were `most` settings."""
    refit = Refit(space)
    while better := _better(space, refit, best, most):
        best = better
    return best, refit.worked_out


def _better(space: Space, refit: Refit, best: Evaluated, most: int) -> Evaluated | None:
    """The fastest neighbour that fits, if one is faster."""
    below = weighed_seconds(space, best) * (1 - BETTER)
    # of each neighbour its next setting
    heap: list[tuple[float, int, Choice, Iterator[tuple[float, Choice]]]] = []
    for number, asked in enumerate(_distinct(space, neighbours(space, best.choice))):
        if refit.worked_out >= most:
            break
        settings = refit.fitting(asked, below)
        heap += [(*found, settings) for found in _next(settings, number)]
    heapq.heapify(heap)
    while heap:
        _, number, choice, settings = heapq.heappop(heap)
        plan = evaluate_ordered(space.problem, choice)
        if plan.bound_bytes <= refit.budget and weighed_seconds(space, plan) < below:
            return plan
        if refit.worked_out < most:
            for found in _next(settings, number):
                heapq.heappush(heap, (*found, settings))
    return None


def _next(
    settings: Iterator[tuple[float, Choice]], number: int
) -> Iterator[tuple[float, int, Choice]]:
    """At most one more of a neighbour's settings, with its number."""
    for seconds, choice in islice(settings, 1):
        yield seconds, number, choice


def _distinct(space: Space, choices: Iterable[Choice]) -> list[Choice]:
    """Of settings whose residents are the same units one."""
    found: dict[tuple[object, ...], Choice] = {}
    for choice in choices:
        key = choice.tiles.vocabulary_rows, *residents(space, choice)
        found.setdefault(key, choice)
    return list(found.values())


# --- neighbours ---------------------------------------------------------------------------------------------------


def neighbours(space: Space, choice: Choice) -> Iterator[Choice]:
    """The setting, and those that differ in one lever; residents of prefill and of decode are one."""
    yield choice
    for order in ORDERS if space.problem.workload.images else ORDERS[:1]:
        yield replace(choice, order=order, spare_bytes=0)
    for depth in DEPTHS:
        yield replace(choice, depth=depth)
    for together in space.modes:
        yield replace(choice, images_together=together)
    for residency in space.vision_residencies(choice.images_together):
        yield replace(choice, vision=residency)
    for decode, prefill in _language(space, choice):
        yield replace(choice, decode=decode, prefill=prefill)
    for rows in space.vocabulary_rows():
        tiles = choice.tiles.model_copy(update={"vocabulary_rows": rows})
        if rows != choice.tiles.vocabulary_rows:
            yield replace(choice, tiles=tiles, prefill=NOTHING, decode=NOTHING)


def _language(space: Space, choice: Choice) -> Iterator[tuple[PhaseResidency, PhaseResidency]]:
    """Residents of decode and of prefill, a few units more or fewer."""
    totals = space.parts.totals(choice.tiles.vocabulary_rows)
    decode, prefill = ((r.attn, r.mlp, r.head) for r in (choice.decode, choice.prefill))
    anchors = space.anchors
    most = STEPS if space.short else 1
    steps = range(-most, most + 1)
    changes = [change for change in product(steps, repeat=3) if sum(map(abs, change)) <= most]
    for change in (*changes, *(_doubled(totals) if space.dear else ())):
        looped = tuple(map(add, decode, change))
        if not all(0 <= count <= total for count, total in zip(looped, totals, strict=True)):
            continue
        kept = tuple(map(min, prefill, looped))
        firsts = {kept, looped, (0, 0, 0), *(tuple(map(add, kept, c)) for c in changes)}
        for first in firsts:
            if not all(0 <= count <= outer for count, outer in zip(first, looped, strict=True)):
                continue
            for mine, other in product(anchors, anchors):
                yield _residency(looped, mine), _residency(first, other)


def _doubled(totals: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Twice, four times and so on as many units of one class more or fewer: where residents hardly pay the best number may be far."""
    for place, total in enumerate(totals):
        for power in range(1, total.bit_length()):
            for signed in (2**power, -(2**power)):
                yield tuple(signed if n == place else 0 for n in range(len(totals)))


def _residency(counts: Sequence[int], anchor: Anchor) -> PhaseResidency:
    attn, mlp, head = counts
    return PhaseResidency(attn, mlp, head, anchor)
