"""Budget against seconds: the frontier over the whole range, and the neighbours of one plan.

frontier: searched budgets, halving the largest gap that is left → every point is what `plan` finds at its budget
neighbours: closed forms alone, in a few hundredths of a second → estimates
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from planner.plan import Levers, Plan
from planner.plan.words import Frozen
from planner.problem import Problem, Request
from planner.profile import DeviceProfile
from planner.search import search
from planner.space import Space
from planner.units import GIB, MIB

POINTS = 17  # of a frontier, at most
NARROW_BYTES = 64 * MIB  # gaps below are not looked into
CLOSE = 0.02  # nor those where the seconds differ by less than this share
NOTICED = 0.05  # a neighbour differs by at least this share of the seconds
TRIES = 4  # budgets looked at for a neighbour, each twice as far away


class PhaseSeconds(Frozen):
    """Predicted seconds of one phase."""

    phase: Literal["load", "vision", "prefill", "decode"]
    seconds: float


class FrontierPoint(Frozen):
    """The least budget found that takes so many seconds."""

    budget_bytes: int
    seconds: float
    phases: tuple[PhaseSeconds, ...]
    levers: Levers


class Frontier(Frozen):
    """Budget against seconds of one request, fewest bytes first; seconds fall strictly."""

    schema_version: Literal[1]
    request: str
    model: str
    device: str
    usable_bytes: int  # what the device offers
    points: tuple[FrontierPoint, ...]

    def dumps(self) -> str:
        """One JSON document, the same bytes for the same frontier."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


def frontier(
    request: Request, device: DeviceProfile, *, points: int = POINTS
) -> tuple[FrontierPoint, ...]:
    """Pareto frontier from the smallest budget to the one at which more brings nothing."""

    def plan(budget: int | None) -> Plan:
        return search(replace(request, budget_bytes=budget), device, compared=False)

    def at(budget: int) -> FrontierPoint:
        """What a budget brings, at the bound of its plan if the search finds as much there, else at the budget itself."""
        found = plan(budget)
        again = plan(found.prediction.bound_peak_bytes)
        if again.prediction.seconds <= found.prediction.seconds:
            return _point(again, again.prediction.bound_peak_bytes)
        return _point(found, budget)

    whole = plan(None)
    least = whole.prediction.smallest_budget_bytes
    most = _point(whole, whole.prediction.bound_peak_bytes)
    return _bisected(at, _point(plan(least), least), most, points)


def _bisected(
    at: Callable[[int], FrontierPoint], least: FrontierPoint, most: FrontierPoint, points: int
) -> tuple[FrontierPoint, ...]:
    """The frontier between two points: always the gap with the largest area of bytes times seconds is halved next."""
    found = {least.budget_bytes: least, most.budget_bytes: most}
    gaps: list[tuple[float, int, FrontierPoint, FrontierPoint]] = []

    def add(low: int, left: FrontierPoint, right: FrontierPoint) -> None:
        """The gap between two points of which nothing below `low` is better than the left one."""
        width, fall = right.budget_bytes - low, left.seconds - right.seconds
        if width > NARROW_BYTES and fall > CLOSE * right.seconds:
            heapq.heappush(gaps, (-width * fall, low, left, right))

    add(least.budget_bytes, least, most)
    searched = 2
    while gaps and searched < 2 * points and len(found) < points:
        _, low, left, right = heapq.heappop(gaps)
        middle = low + (right.budget_bytes - low) // 2
        point = at(middle)
        searched += 1
        if point.seconds >= left.seconds or point.budget_bytes <= left.budget_bytes:
            add(middle, left, right)
            continue
        found[point.budget_bytes] = point
        add(low, left, point)
        add(middle, point, right)
    best: list[FrontierPoint] = []
    for _, point in sorted(found.items()):
        if not best or point.seconds < best[-1].seconds:
            best.append(point)
    return tuple(best)


def _point(plan: Plan, budget: int) -> FrontierPoint:
    rows = (PhaseSeconds(phase=r.phase, seconds=r.seconds) for r in plan.prediction.phases)
    return FrontierPoint(
        budget_bytes=budget,
        seconds=plan.prediction.seconds,
        phases=tuple(rows),
        levers=plan.levers,
    )


def swept(request: Request, device: DeviceProfile, *, points: int = POINTS) -> Frontier:
    """The frontier with what it is of: what `--sweep --json` prints."""
    return Frontier(
        schema_version=1,
        request=request.command,
        model=request.checkpoint.shape.name,
        device=device.id,
        usable_bytes=device.usable_bytes,
        points=frontier(request, device, points=points),
    )


# --- neighbours ---------------------------------------------------------------------------------------------------


class Neighbour(NamedTuple):
    """Another budget for the same request: estimates, to some per cent."""

    budget_bytes: int
    seconds: float


def neighbours(
    request: Request, device: DeviceProfile, plan: Plan
) -> tuple[Neighbour | None, Neighbour | None]:
    """The next cheaper and the next faster budget at which the seconds differ noticeably; None where there is none.

    By the closed form, set beside the plan: what it says of the other budget less what it says of the plan's own.
    """
    problem, prediction = Problem(request, device), plan.prediction
    space = Space(problem)
    bound, seconds = prediction.bound_peak_bytes, prediction.seconds
    # what is not the arena stays as it is: context, workspaces, on a card kernels' own blocks
    fixed = bound - prediction.arena_bytes
    if problem.on_cpu:
        fixed = plan.device.context_bytes + plan.device.context_error_bytes
    known = _estimate(space, bound, fixed)
    own_seconds = known.seconds if known else seconds - problem.start_s(plan.levers.tiles)
    step = _first_step(plan)

    def look(budgets: Sequence[int], sign: int) -> Neighbour | None:
        for budget in budgets:
            other = _estimate(space, budget, fixed)
            if other is None:
                return None
            change = other.seconds - own_seconds
            if sign * change >= NOTICED * seconds:
                return Neighbour(other.budget_bytes, seconds + change)
        return None

    below = [bound - step * 2**k for k in range(TRIES)]
    cheaper = look([b for b in below if b >= prediction.smallest_budget_bytes], 1)
    faster = None
    if request.budget_bytes is not None and _streams(plan):
        faster = look([request.budget_bytes + step * 2**k for k in range(TRIES)], -1)
    return cheaper, faster


def _streams(plan: Plan) -> bool:
    return any(copy.buffer.startswith("staging/") for copy in plan.copies)


def _first_step(plan: Plan) -> int:
    """How many more resident bytes of weights change the seconds noticeably, where the copies of decode are what takes the time."""
    for row in plan.prediction.phases:
        if row.phase == "decode" and row.weights_streamed_bytes:
            rate = row.weights_streamed_bytes / row.copy_seconds / plan.decode_repeats
            return max(GIB // 8, int(1.1 * NOTICED * plan.prediction.seconds * rate))
    return GIB // 4


def _estimate(space: Space, budget: int, fixed: int) -> Neighbour | None:
    """The fastest setting within a budget by its lower bound: its bytes and seconds."""
    found = space.estimate(budget - fixed)
    return found and Neighbour(found[1] + fixed, found[0])
