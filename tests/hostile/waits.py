"""Every wait that a run has, one mutant for each, and a graph that says whether the others imply it.

The graph is made from the plan and the protocol, not from a run: which event surely comes before which. A *mutant*
lacks one wait, that is some edges. If some two events that touch the same bytes are then unordered, some order of the
queues must give another answer; if none are, the wait was implied, and no order may.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

from executor.order import Queues, unroll
from executor.queues import RING_PIECES, pieces_of
from executor.weights import chunks, pieces
from planner.plan import Plan
from planner.plan.program import Buffer
from planner.plan.shapes import TensorLocation
from tests.hostile.device import PIECE_BYTES, Wait


class Mutant(NamedTuple):
    """A run without one wait. `edges` go from the graph; `plan`, `without` and `rounds` say how the run lacks it."""

    sort: str
    name: str
    edges: frozenset[Wait]
    plan: Plan | None = None  # None: the right one
    without: tuple[Wait, ...] = ()  # left out by the device
    rounds: tuple[
        tuple[str, bool], ...
    ] = ()  # copies of decode that do not wait in (False) the first round, (True) later ones


SORTS = (
    "a step waits for a copy",
    "a copy waits for a step",
    "a wrapping copy waits, first round",
    "a wrapping copy waits, later rounds",
    "the compute queue waits for a mark",
    "the copy queue waits for a mark",
    "the host waits for a ring piece",
    "the host waits before it reads",
    "the host waits after priming",
    "the host waits at a phase's end",
)


def mutants(plan: Plan, locations: dict[str, TensorLocation]) -> Iterator[Mutant]:
    """One for every wait of a run of the plan."""
    queues, _ = unroll(plan)
    places: dict[str, list[int]] = {}
    for place, (copy, _) in enumerate(queues.copies):
        places.setdefault(copy.id, []).append(place)
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for at, (step, _) in enumerate(queues.steps):
        for place in queues.waits[at]:
            pairs.setdefault((step.id, queues.copies[place][0].id), []).append((at, place))
    for (step_id, copy_id), found in pairs.items():
        name = f"{step_id} for {copy_id}"
        host = {("issued copy", at, place) for at, place in found}
        marks = {("step waits", at, place) for at, place in found}
        yield Mutant(
            SORTS[0], name, frozenset(host | marks), plan=_unwaiting(plan, step_id, copy_id)
        )
        yield Mutant(SORTS[4], name, frozenset(marks), without=tuple(sorted(marks)))
    for copy in plan.copies:
        if copy.after is None:
            continue
        name = f"{copy.id} for {copy.after}"
        issued = {("issued step", place) for place in places[copy.id]}
        marked = {("copy waits", place) for place in places[copy.id]}
        yield Mutant(SORTS[1], name, frozenset(issued | marked), plan=_eager(plan, copy.id))
        yield Mutant(SORTS[5], name, frozenset(marked), without=tuple(sorted(marked)))
        if copy.wraps:
            for later, chosen in ((False, places[copy.id][:1]), (True, places[copy.id][1:])):
                edges = {(s, place) for s in ("issued step", "copy waits") for place in chosen}
                rounds = ((copy.id, later),)
                yield Mutant(SORTS[3 if later else 2], name, frozenset(edges), rounds=rounds)
    moves = sum(n for n, ring in _moves(plan, queues, locations) if ring)
    for sort, key, numbers in (
        (SORTS[6], "ring", range(moves - RING_PIECES)),
        (SORTS[7], "host reads", range(len(_reads(queues)))),
        (SORTS[8], "synchronize", range(1)),
        # of the load, and of each phase
        (SORTS[9], "synchronize", range(1, 2 + len({step.phase for step in plan.steps}))),
    ):
        for number in numbers:
            wait = (key, number)
            yield Mutant(sort, f"{key} {number}", frozenset([wait]), without=(wait,))


def _unwaiting(plan: Plan, step_id: str, copy_id: str) -> Plan:
    steps = tuple(
        step.model_copy(update={"waits": tuple(w for w in step.waits if w != copy_id)})
        if step.id == step_id
        else step
        for step in plan.steps
    )
    return plan.model_copy(update={"steps": steps})


def _eager(plan: Plan, copy_id: str) -> Plan:
    copies = tuple(
        copy.model_copy(update={"after": None, "wraps": False}) if copy.id == copy_id else copy
        for copy in plan.copies
    )
    return plan.model_copy(update={"copies": copies})


def _moves(
    plan: Plan, queues: Queues, locations: dict[str, TensorLocation]
) -> list[tuple[int, bool]]:
    """In how many moves each copy comes, and whether through the ring (or from a place in host memory)."""
    buffers = {buffer.name: buffer for buffer in plan.buffers}
    units = {unit.id: unit for unit in plan.units}
    kept = {place.unit for place in plan.host_units}
    found = []
    for copy, _ in queues.copies:
        parts = chunks(pieces(units[copy.unit], buffers[copy.buffer], locations))
        ring = copy.unit not in kept
        cut = sum(len(pieces_of(part, PIECE_BYTES)) for part in parts) if ring else len(parts)
        found.append((cut, ring))
    return found


def _reads(queues: Queues) -> list[int]:
    """Steps after or in which the host reads what they wrote: features, then logits."""
    steps = [step for step, _ in queues.steps]
    return [i for kind in ("merger", "sample") for i, s in enumerate(steps) if s.kind == kind]


# --- the graph ----------------------------------------------------------------------------------------------------


class Meeting(NamedTuple):
    """Events `first` to `last`, and `start` to `end`, touch the same bytes: one of the two must come first. `copy`: the place of the copy that is the other."""

    first: int
    last: int
    start: int
    end: int
    one: str
    copy: int | None = None


class Graph:
    """What surely comes before what in a run of a plan; `unordered` asks it with some waits left out.

    Events: the host issues a step, the compute queue runs it, the host has counted it; the reader fills a ring piece,
    the copy queue moves it; the host reads; the host waits for everything. The first event is the run of priming.
    """

    def __init__(self, plan: Plan, locations: dict[str, TensorLocation]) -> None:
        self._plan = plan
        self._queues, _ = unroll(plan)
        self._edges: list[tuple[int, int, tuple[Wait, ...]]] = []
        self._count = 0
        self._build(_moves(plan, self._queues, locations))
        self._conflicts = list(self._meetings())

    def _event(self, *before: int) -> int:
        event, self._count = self._count, self._count + 1
        for earlier in before:
            self._edge(earlier, event)
        return event

    def _edge(self, first: int, second: int, *waits: Wait) -> None:
        """`first` comes before `second` as long as all the waits are there."""
        self._edges.append((first, second, waits))

    def _build(self, moves: list[tuple[int, bool]]) -> None:
        issue_prime = self._event()
        self.prime = self._event(issue_prime)
        primed = self._event(issue_prime)
        self._edge(self.prime, primed, ("synchronize", 0))
        loaded = self._event(primed)
        self._edge(self.prime, loaded, ("synchronize", 1))
        first = primed if self._plan.levers.order == "all_first" else loaded
        self.fills: list[list[int]] = []
        self.moves: list[list[int]] = []
        host, queue = first, first
        ring = []
        for count, through_ring in moves:
            self.fills.append([])
            self.moves.append([])
            for _ in range(count):
                host = self._event(host)
                queue = self._event(host, queue)
                self.fills[-1].append(host)
                self.moves[-1].append(queue)
                if through_ring:
                    ring.append((host, queue))
        self.refills = []
        for number, (fill, _) in enumerate(ring[RING_PIECES:]):
            moved = ring[number][1]
            self._edge(moved, fill, ("ring", number))
            self.refills.append((moved, fill))
        self._steps(loaded)
        for place, after in enumerate(self._queues.after):
            if after >= 0:
                self._edge(self.counted[after], self.fills[place][0], ("issued step", place))
                self._edge(self.run[after], self.moves[place][0], ("copy waits", place))

    def _steps(self, start: int) -> None:
        steps = self._queues.steps
        self.issued: list[int] = []
        self.run: list[int] = []
        self.counted: list[int] = []
        self.reads: list[tuple[int, int]] = []
        reads = {at: number for number, at in enumerate(_reads(self._queues))}
        host, phases = self._event(start), 0
        # before the first step whatever is dead becomes NaN
        queue = self.first = self._event(host, self.prime)
        known: list[tuple[int, Wait]] = []
        for at, (step, _) in enumerate(steps):
            host = self._event(host)
            self.issued.append(host)
            queue = self._event(host, queue)
            self.run.append(queue)
            for place in self._queues.waits[at]:
                issued = ("issued copy", at, place)
                self._edge(self.fills[place][-1], host, issued)
                self._edge(self.moves[place][-1], queue, ("step waits", at, place))
                known.append((self.moves[place][-1], issued))
            if step.kind == "sample":
                host = self._read(at, reads[at], host)
            host = self._event(host)
            self.counted.append(host)
            if step.kind == "merger":
                host = self._read(at, reads[at], host)
            last = at + 1 == len(steps) or steps[at + 1][0].phase != step.phase
            if last:
                host = self._event(host)
                wait = ("synchronize", 2 + phases)
                self._edge(queue, host, wait)
                for move, issued in known:  # it holds for what the host knows to be in the queue
                    self._edge(move, host, wait, issued)
                phases += 1

    def _read(self, at: int, number: int, host: int) -> int:
        event = self._event(host)
        self._edge(self.run[at], event, ("host reads", number))
        self.reads.append((self.run[at], event))
        return event

    def _meetings(self) -> Iterator[Meeting]:
        """All that must not happen at once."""
        plan, queues = self._plan, self._queues
        index = {step.id: i for i, step in enumerate(plan.steps)}
        buffers = {buffer.name: buffer for buffer in plan.buffers}
        touched = {
            step.id: [
                *(_range(buffers[name]) for name in {*step.reads, *step.writes}),
                *([_range(buffers[step.weights])] if step.weights else []),
                # after a step whatever is dead before the next is NaN
                *(_dead(plan, index[step.id] + 1) if index[step.id] + 1 < len(plan.steps) else ()),
            ]
            for step in plan.steps
        }
        scratch = {name for step in plan.steps for name in step.writes}
        dead = list(_dead(plan, 0))
        for place, (copy, _) in enumerate(queues.copies):
            written = _range(buffers[copy.buffer])
            first, last = self.moves[place][0], self.moves[place][-1]
            if any(_meet(written, _range(buffers[name])) for name in scratch):
                yield Meeting(self.prime, self.prime, first, last, "priming", place)
            if any(_meet(written, span) for span in dead):
                yield Meeting(self.first, self.first, first, last, "what is dead", place)
            for at, (step, _) in enumerate(queues.steps):
                if any(_meet(written, span) for span in touched[step.id]):
                    run = self.run[at]
                    yield Meeting(run, run, first, last, step.id, place)
        for moved, fill in self.refills:
            yield Meeting(moved, moved, fill, fill, "a ring piece")
        for run, read in self.reads:
            yield Meeting(run, run, read, read, "the host's reading")

    def stops(self, meetings: Iterable[Meeting]) -> list[int]:
        """How many moves come before those that take part, for the first few."""
        before = list(accumulate((len(moves) for moves in self.moves), initial=0))
        return sorted({before[m.copy] for m in meetings if m.copy is not None})[:3]

    def unordered(self, without: Collection[Wait] = ()) -> list[Meeting]:
        """Pairs of events that touch the same bytes, and of which either may come first."""
        before = [0] * self._count  # bit set of the events that surely come before
        into: list[list[int]] = [[] for _ in range(self._count)]
        out = [0] * self._count
        leaving: list[list[int]] = [[] for _ in range(self._count)]
        for first, second, waits in self._edges:
            if not any(wait in without for wait in waits):
                into[second].append(first)
                leaving[first].append(second)
                out[second] += 1
        ready = [event for event in range(self._count) if not out[event]]
        done = 0
        while ready:
            event = ready.pop()
            done += 1
            for earlier in into[event]:
                before[event] |= before[earlier] | 1 << earlier
            for later in leaving[event]:
                out[later] -= 1
                if not out[later]:
                    ready.append(later)
        assert done == self._count, "a wait of the plan is circular"
        return [
            m
            for m in self._conflicts
            if not before[m.start] >> m.last & 1 and not before[m.first] >> m.end & 1
        ]


def _range(buffer: Buffer) -> tuple[int, int]:
    return buffer.offset_bytes, buffer.offset_bytes + buffer.size_bytes


def _meet(first: tuple[int, int], second: tuple[int, int]) -> bool:
    return max(first[0], second[0]) < min(first[1], second[1])


def _dead(plan: Plan, index: int) -> Iterable[tuple[int, int]]:
    """Ranges in which nothing is alive just before a step."""
    at = 0
    for start, stop in sorted(
        _range(b) for b in plan.buffers if any(s <= index < e for s, e in b.lifetimes)
    ):
        if start > at:
            yield at, start
        at = max(at, stop)
    if at < plan.prediction.arena_bytes:
        yield at, plan.prediction.arena_bytes
