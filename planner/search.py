"""The planner's table of contents: from a request to the fastest plan that fits.

    the canonical space in order of lower bounds on seconds (`planner.space`), from coarse to fine
    → settings in order of their exact seconds (`planner.parts`) → those whose bytes fit by the closed form
    → program, graph, layout, bytes (`planner.evaluate`) → the first that fits is the fastest → Plan (`planner.assemble`)

Nothing is cut off: a setting is left out only where its bound is not below the seconds of the plan. Near the smallest
budget, where layers are few, and where the plan lies far over its bound, its neighbours outside that space are tried
too (`planner.climb`).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from planner.assemble import assemble
from planner.certificate import certificate, least_plan
from planner.climb import climbed
from planner.errors import BudgetTooSmall
from planner.evaluate import Evaluated, evaluate
from planner.moves import moves, usual, usual_choice
from planner.plan import Plan
from planner.plan.words import Order
from planner.problem import Problem, Request
from planner.profile import DeviceProfile
from planner.schedule import Choice
from planner.setting import residents, spared, weighed_seconds
from planner.space import Filling, Space
from planner.stack import Decoding, Root
from planner.units import format_gib
from planner.variants import evaluate_ordered, variants
from planner.worked import plain_bytes

# steps of all nodes of the space that are opened, at most
OPENED_CPU, OPENED_CARD = 240_000, 160_000
SLOPE, STEEPER = 1 / 256, 40  # by which refined nodes are preferred then; doubled after so many
REFUSED = 3  # settings with the same residents and prompt tiles that are worked out in full and do not fit, at most
LACKED = 3  # settings that did not fit, after which all are given as much less room as the least of them lacked
FOLLOWING = 80  # nodes opened after each plan found there, at most
DIVED = 480  # nodes opened on the way to a plan where the search was cut off, at most
CLIMBED_NEAR = 1.05  # times the smallest budget: plans for less are climbed from
OVER_CPU, OVER_CARD = 0.01, 0.05  # of the lower bound: plans that lie farther over it, likewise
CLIMBED_STEPS = 40_000  # steps of all settings that are worked out around a plan, at most
BUILT = 24  # settings whose program, graph and layout are built, at most

__all__ = ["Request", "build", "search", "usual_way"]


def search(request: Request, device: DeviceProfile, *, compared: bool = True) -> Plan:
    """The fastest plan whose bound fits the budget; BudgetTooSmall carries the certificate. `compared`: with variants and moves."""
    problem = Problem(request, device)
    space = Space(problem)
    smallest = least_plan(problem, space)
    budget = request.budget_bytes
    if budget is not None and budget < smallest.bound_bytes:
        raise certificate(problem, smallest)
    steps = len(smallest.program.steps)
    opened = (OPENED_CPU if problem.on_cpu else OPENED_CARD) // steps
    found = fastest(space, smallest, weighed_most=opened, built_most=max(BUILT, opened // 50))
    near = budget is not None and budget < smallest.bound_bytes * CLIMBED_NEAR
    most = OVER_CPU if problem.on_cpu else OVER_CARD
    if space.dear:
        # of other residents than those of the space nothing is known but what none of them undercuts
        bound = min(bound for bound, _ in space.roots())
        found = found._replace(lower_bound=min(found.lower_bound, bound))
    if space.short or near or weighed_seconds(space, found.best) > found.lower_bound * (1 + most):
        found = _climbed(space, found, CLIMBED_STEPS // steps)
    return assemble(
        problem,
        found.best,
        lower_bound=min(
            found.lower_bound - space.start(found.best.choice.tiles), found.best.seconds
        ),
        candidates=found.weighed,
        smallest_bytes=smallest.bound_bytes,
        variants=(*variants(problem, found.best), usual(problem)) if compared else (),
        moves=moves(problem, found.best) if compared else (),
    )


def build(request: Request, device: DeviceProfile, choice: Choice) -> Plan:
    """The plan of one given setting of the levers, without a search; BudgetTooSmall where it does not fit."""
    problem = Problem(request, device)
    found = evaluate_ordered(problem, choice)
    if request.budget_bytes is not None and found.bound_bytes > request.budget_bytes:
        raise BudgetTooSmall(
            f"this setting of the levers needs {format_gib(found.bound_bytes)}, "
            f"the budget is {format_gib(request.budget_bytes)}",
            smallest_bytes=found.bound_bytes,
        )
    return assemble(
        problem,
        found,
        lower_bound=found.seconds,
        candidates=1,
        smallest_bytes=found.bound_bytes,
        variants=(),
    )


def usual_way(request: Request, device: DeviceProfile) -> Plan:
    """The same request with every weight resident from the start (SUM) and no row tiles, whether it fits the budget or not; to compare with."""
    problem = Problem(request, device)
    found = evaluate(problem, usual_choice(problem))
    return assemble(
        problem,
        found,
        lower_bound=found.seconds,
        candidates=1,
        smallest_bytes=found.bound_bytes,
        variants=(),
    )


class Found(NamedTuple):
    """`lower_bound`: with what tiles add to the start, as all seconds that the search compares."""

    best: Evaluated
    weighed: int  # nodes of the space that were looked at
    lower_bound: float
    built: int


class Setting(NamedTuple):
    """All levers of a filling but the vision tower's number and the order; with `order`, those too."""

    filling: Filling
    number: int
    order: Order


class Timed(NamedTuple):
    """A setting whose seconds are exact and whose bytes may fit."""

    setting: Setting
    choice: Choice


Node = Root | Decoding | Filling | Setting | Timed


class Entry(NamedTuple):
    """A node in the queue: the least key first, of equal ones the more refined, then the earlier."""

    key: float
    coarseness: int
    number: int
    bound: float
    node: Node


def fastest(
    space: Space, smallest: Evaluated, *, weighed_most: int, built_most: int = BUILT
) -> Found:
    """The first setting in order of bounds that is worked out in full and fits: no other is faster.

    After `weighed_most` nodes, or `built_most` plans that did not fit, a plan near the least bound; the bound stays true.
    """
    queue, known = _Queue(space), weighed_seconds(space, smallest)
    while queue.heap:
        if queue.weighed >= weighed_most or queue.built >= built_most:
            lower_bound = min(known, queue.heap[0].bound)
            best = _dive(space, queue, smallest)
            return Found(best, queue.weighed, lower_bound, queue.built)
        entry = heapq.heappop(queue.heap)
        if entry.bound >= known:
            break
        found = queue.open(entry.node)
        if found:
            return Found(found, queue.weighed, entry.bound, queue.built)
    return Found(smallest, queue.weighed, known, queue.built)


def _climbed(space: Space, found: Found, most: int) -> Found:
    """The same, or better where the space has left out what would fit."""
    best, weighed = climbed(space, found.best, most=most)
    return found._replace(best=best, weighed=found.weighed + weighed)


def _dive(space: Space, queue: _Queue, smallest: Evaluated) -> Evaluated:
    """A plan near the least bound: refined nodes are preferred, in as much less room as the last ones lacked; and the better ones that soon follow it."""
    less, best, until = 0, smallest, DIVED
    least = weighed_seconds(space, smallest)
    for opened in range(DIVED):
        if opened % STEEPER == 0:
            queue.prefer_refined(SLOPE * 2 ** (opened // STEEPER))
        lacked = [size for size in queue.lacked if size > less]
        if len(lacked) >= LACKED or (lacked and not queue.heap):
            less = min(lacked)
            queue.heap.clear()
            queue.extend(space.roots(less))
        if not queue.heap or opened >= until:
            break
        entry = heapq.heappop(queue.heap)
        found = queue.open(entry.node) if entry.bound < least else None
        if found and weighed_seconds(space, found) < least:
            best, until = found, opened + FOLLOWING
            least = weighed_seconds(space, found)
    return best


class _Queue:
    """Nodes of the space in order of their bounds; equal ones in order of refinement, then of coming."""

    def __init__(self, space: Space) -> None:
        self.problem = space.problem
        self.space = space
        self.heap: list[Entry] = []
        self.slope = 0.0  # by which coarser nodes are put off
        self.budget = self.problem.request.budget_bytes
        self.weighed = self.pushed = self.built = 0
        self.lacked: list[int] = []  # bytes of room that settings lacked
        self.refused: Counter[Filling] = Counter()  # too large once worked out in full, so often
        self.failed: set[tuple[object, ...]] = set()  # the same, however they came about
        self.retried: set[Decoding] = set()
        self.extend(space.roots())

    def push(self, bound: float, node: Node) -> None:
        if bound < float("inf"):
            self.pushed += 1
            coarseness = _coarseness(node)
            # to nine digits, so that equal settings come in their order and not in that of rounding errors
            key = float(f"{bound * (1 + self.slope * coarseness):.8e}")
            heapq.heappush(self.heap, Entry(key, coarseness, self.pushed, bound, node))

    def prefer_refined(self, slope: float) -> None:
        """From now on a coarser node comes first only where its bound is lower by such a share for each level."""
        self.slope = slope
        self.heap = [e._replace(key=e.bound * (1 + slope * e.coarseness)) for e in self.heap]
        heapq.heapify(self.heap)

    def open(self, node: Node) -> Evaluated | None:
        """Put the parts of a node in its place; of a setting that is timed the plan, if it fits."""
        space = self.space
        self.weighed += 1
        if isinstance(node, Root):
            self.extend(space.decodings(node))
        elif isinstance(node, Decoding):
            worked_out = node.anchor is not None
            self.extend(space.fillings(node) if worked_out else space.worked_decodings(node))
        elif isinstance(node, Filling):
            if node.anchor is None:
                self.extend(space.worked_fillings(node))
            else:
                self.extend(self._settings(node, 0, None))
        elif self.refused[(node.setting if isinstance(node, Timed) else node).filling] >= REFUSED:
            pass
        elif isinstance(node, Setting):
            if node.order != "vision_then_llm":
                self._slower(node)
            self._time(node, 0)
        else:
            return self._build(node)
        return None

    def _build(self, node: Timed) -> Evaluated | None:
        """The plan of a setting, if it fits."""
        self.built += 1
        found = evaluate_ordered(self.problem, node.choice)
        if self.budget is None or found.bound_bytes <= self.budget:
            return found
        gap = found.layout.height_bytes - found.layout.lower_bound_bytes
        if gap and node.choice.order == "prefetch" and not node.choice.spare_bytes:
            # what arrives early may be what packs with gaps: let more than so much less arrive early
            self._time(node.setting, 2 * gap)
        elif node.choice.order != "all_first":
            self.refused[node.setting.filling] += 1
            self.failed.add(self._key(node.choice))
            if node.choice.order == "vision_then_llm":
                self._slower(node.setting)
            self._retry(node.setting, node.choice, found.bound_bytes - self.budget)
        return None

    def extend(self, nodes: Iterator[tuple[float, Node]]) -> None:
        for bound, node in nodes:
            self.push(bound, node)

    def _settings(
        self, filling: Filling, number: int, only: Order | None
    ) -> Iterator[tuple[float, Node]]:
        for bound, order in self.space.orders(filling, number):
            if only in (None, order):
                yield bound, Setting(filling, number, order)

    def _slower(self, setting: Setting) -> None:
        """The next slower tower beside the same rest: in the plain order it pays only where the faster one does not fit."""
        slower = self.space.following(*setting, soon=self.slope > 0)
        self.extend(self._settings(setting.filling, slower, setting.order))

    def _key(self, choice: Choice) -> tuple[object, ...]:
        """Equal for settings that run alike."""
        return *residents(self.space, choice), choice.tiles, choice.spare_bytes

    def _has_failed(self, choice: Choice) -> bool:
        return bool(self.failed) and self._key(choice) in self.failed

    def _time(self, setting: Setting, spare_bytes: int) -> None:
        """Exact seconds, and bytes by the closed form."""
        choice = replace(self.space.choice(*setting), spare_bytes=spare_bytes)
        if self._has_failed(choice):
            if setting.order == "vision_then_llm":
                self._slower(setting)
            return
        choice, found, excess = spared(self.space, choice)
        if excess <= 0:
            if not self._has_failed(choice):
                self.push(found.seconds + self.space.start(choice.tiles), Timed(setting, choice))
            return
        if setting.order == "all_first":  # it holds what others do not
            return
        if setting.order == "vision_then_llm":
            self._slower(setting)
        if self.slope:  # a plan is wanted soon: nothing else beside the same rest
            self.refused[setting.filling] = REFUSED
        less = self.space.lacking(setting.filling, choice)
        self._retry(setting, choice, less or excess)

    def _retry(self, setting: Setting, choice: Choice, excess: int) -> None:
        """A setting that does not fit after all: the same residents of decode, or fewer, in so much less room, or in as much less as leaves none for it."""
        filling = setting.filling
        decoding = filling.decoding
        live, held = plain_bytes(self.space.parts, choice)
        left = self.space.room(decoding.root, filling.cap) - (held if self.problem.on_cpu else live)
        excess = max(excess, int(left) + 1)
        self.lacked.append(decoding.root.less + excess)
        root = decoding.root._replace(less=decoding.root.less + excess)
        again = decoding._replace(root=root, anchor=None)
        if again not in self.retried:
            self.retried.add(again)
            self.extend(self.space.worked_decodings(again))


def _coarseness(node: Node) -> int:
    if isinstance(node, Root):
        return 5
    if isinstance(node, Decoding):
        return 4 if node.anchor is None else 3
    if isinstance(node, Filling):
        return 2 if node.anchor is None else 1
    return 0
