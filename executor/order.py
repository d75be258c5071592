"""A plan's order, proved before anything is read: its queues cannot block each other, and no copy can meet a step on the same bytes.

Steps run in order in one queue, copies in the other; so which of them surely precede a copy (or a step) is one
number each: the furthest entry of the other queue that it, or anything before it in its own queue, waits for.
Whatever lies beyond that number may run at the same moment. The decode loop is unrolled.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

from planner.errors import PlanFileError
from planner.plan import Plan
from planner.plan.program import Buffer, Copy, Step

UNROLLED = (
    3  # the first iteration, the first that follows a whole one, and one that follows such a one
)


class Queues(NamedTuple):
    """Both queues unrolled. `after[j]`: the step, by place, that copy j comes after, -1 for none; `waits[i]`: the copies that step i waits for."""

    steps: list[tuple[Step, int]]
    copies: list[tuple[Copy, int]]
    after: list[int]
    waits: list[list[int]]


def check_order(plan: Plan) -> None:
    """Nothing, if every wait that the plan needs is in it; PlanFileError naming the first step or copy that lacks one."""
    found = problems(plan)
    if found:
        more = f" ({len(found)} such in all)" if len(found) > 1 else ""
        raise PlanFileError(f"the plan cannot be run: {found[0]}{more}; make the plan anew")


def problems(plan: Plan) -> list[str]:
    """What is wrong with the order, as sentences: what blocks, else what may meet on the same bytes, else what finds other bytes than its own."""
    queues, found = unroll(plan)
    if not found:
        order, found = _walk(queues)
    return found or _kept(plan, queues) or _races(plan, queues) or _contents(plan, queues, order)


def unroll(plan: Plan) -> tuple[Queues, list[str]]:
    """Both queues as the executor runs them, and what in them waits for something that never comes."""
    rounds = range(min(UNROLLED, plan.decode_repeats))
    steps = [(step, 0) for step in plan.steps if step.phase != "decode"]
    last_before = len(steps) - 1
    steps += [(step, k) for k in rounds for step in plan.steps if step.phase == "decode"]
    copies = [(copy, 0) for copy in plan.copies if copy.phase != "decode"]
    loop = [copy for copy in plan.copies if copy.phase == "decode"]
    copies += [(copy, k) for k in rounds for copy in loop if not (copy.once and k)]
    repeated = {copy.id for copy in loop if not copy.once}
    in_loop = {step.id for step in plan.steps if step.phase == "decode"}
    step_at = {(step.id, k): i for i, (step, k) in enumerate(steps)}
    copy_at = {(copy.id, k): j for j, (copy, k) in enumerate(copies)}
    found: list[str] = []
    after: list[int] = []
    for copy, k in copies:
        if copy.after is None:
            at: int | None = -1
        elif copy.wraps:
            at = step_at.get((copy.after, k - 1)) if k else last_before
        else:
            at = step_at.get((copy.after, k if copy.after in in_loop else 0))
        if at is None:
            found.append(f"{copy.id} comes after {copy.after}, which does not run so often")
        after.append(-1 if at is None else at)
    waits: list[list[int]] = []
    for step, k in steps:
        waits.append([])
        for name in step.waits:
            place = copy_at.get((name, k if name in repeated else 0))
            if place is None:
                found.append(f"step {step.id} waits for {name}, which does not run")
            else:
                waits[-1].append(place)
    return Queues(steps, copies, after, waits), found


def _walk(queues: Queues) -> tuple[list[tuple[bool, int]], list[str]]:
    """(is a copy, place) in an order in which both queues run to their ends; what blocks, if they cannot."""
    order: list[tuple[bool, int]] = []
    step = copy = 0
    while step < len(queues.steps) or copy < len(queues.copies):
        if copy < len(queues.copies) and queues.after[copy] < step:
            order.append((True, copy))
            copy += 1
        elif step < len(queues.steps) and all(place < copy for place in queues.waits[step]):
            order.append((False, step))
            step += 1
        else:
            waiting = f"{queues.copies[copy][0].id} waits for {queues.copies[copy][0].after}"
            if copy == len(queues.copies):
                waiting = "no copy is left"
            elif step < len(queues.steps):
                waiting = f"step {queues.steps[step][0].id} and the copies wait for each other, as {waiting}"
            return order, [waiting]
    return order, []


def _kept(plan: Plan, queues: Queues) -> list[str]:
    """Copies from host memory of what was not read into it, and reads into what earlier copies may still be taken from."""
    kept = {place.unit for place in plan.host_units}
    read: set[str] = set()
    found = []
    for copy, _ in queues.copies:
        if copy.source == "host":
            if copy.unit not in read:
                found.append(f"{copy.id} comes from host memory, where {copy.unit} is not yet")
        elif copy.unit in kept:
            if copy.unit in read:
                found.append(f"{copy.id} reads {copy.unit} anew, which is kept in host memory")
            read.add(copy.unit)
    return found


def _races(plan: Plan, queues: Queues) -> list[str]:
    """Copies that may write while their buffer is not alive, or beside a step that touches the same bytes."""
    clashing = _clashing(plan.buffers)
    touched = {step.id: _touched(step) for step in plan.steps}
    # copies up to this one have surely landed before the step, steps up to this one have surely ended before the copy
    landed = list(accumulate((max(places, default=-1) for places in queues.waits), max))
    ended = list(accumulate(queues.after, max))
    index = {step.id: i for i, step in enumerate(plan.steps)}
    lifetimes = {buffer.name: buffer.lifetimes for buffer in plan.buffers}

    def alive(name: str, step_id: str) -> bool:
        return any(birth <= index[step_id] < death for birth, death in lifetimes[name])

    found = []
    for place, (copy, _) in enumerate(queues.copies):
        bytes_of = clashing[copy.buffer]
        for at in range(ended[place] + 1, len(queues.steps)):
            step = queues.steps[at][0]
            if not alive(copy.buffer, step.id):
                found.append(f"{copy.id} may begin before {copy.buffer} is its own: at {step.id}")
                break
            if landed[at] >= place:
                break
            shared = sorted(touched[step.id] & bytes_of)
            if shared:
                found.append(
                    f"{copy.id} and step {step.id} do not wait for each other, and both touch {shared[0]}"
                )
                break
    return found


def _contents(plan: Plan, queues: Queues, order: list[tuple[bool, int]]) -> list[str]:
    """Steps that find other bytes than their own. Without races every order of the queues gives the same."""
    clashing = _clashing(plan.buffers)
    holds: dict[str, str | None] = {}  # by buffer of valid content: its unit
    found = []
    for is_copy, place in order:
        if is_copy:
            copy = queues.copies[place][0]
            for name in clashing[copy.buffer]:
                holds.pop(name, None)
            holds[copy.buffer] = copy.unit
            continue
        step = queues.steps[place][0]
        if step.weights is not None and holds.get(step.weights) != step.unit:
            held = holds.get(step.weights)
            found.append(f"step {step.id} wants {step.unit} in {step.weights}, which holds {held}")
        found += [
            f"step {step.id} reads {name}, whose bytes are not written or not any more"
            for name in step.reads
            if name not in holds
        ]
        for written in step.writes:
            for name in clashing[written]:
                if name != written and name not in step.writes:
                    holds.pop(name, None)
            holds[written] = None
    return found


def _touched(step: Step) -> frozenset[str]:
    return frozenset((*step.reads, *step.writes, *((step.weights,) if step.weights else ())))


def _clashing(buffers: tuple[Buffer, ...]) -> dict[str, set[str]]:
    """For every buffer those that share bytes with it, itself included."""
    found = {buffer.name: {buffer.name} for buffer in buffers}
    ordered = sorted(buffers, key=lambda buffer: buffer.offset_bytes)
    for index, first in enumerate(ordered):
        end = first.offset_bytes + first.size_bytes
        for second in ordered[index + 1 :]:
            if second.offset_bytes >= end:
                break
            found[first.name].add(second.name)
            found[second.name].add(first.name)
    return found
