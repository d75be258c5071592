"""A plan verified slowly and independently: nothing here uses the planner's own arithmetic, only the Plan itself.

The decode loop is unrolled; every step and every copy becomes an *occurrence*. A copy may be writing at any moment
between the end of the step it comes after and the start of the first step that waits for it. What two occurrences
may do at the same moment must not touch the same bytes.
"""

from __future__ import annotations

from typing import NamedTuple

from planner.plan import Plan
from planner.plan.prediction import PhasePrediction
from planner.plan.program import Buffer, Copy, Step
from planner.plan.words import DTYPE_BYTES

UNROLLED = 3


class Occurrence(NamedTuple):
    step: Step
    iteration: int


class Transfer(NamedTuple):
    """A copy's occurrence: it writes at some moment in `[start, need)`, in steps of the unrolled order."""

    copy: Copy
    start: int
    need: int


def check(plan: Plan) -> list[str]:
    """Everything wrong with a plan, as sentences; empty where it holds."""
    unnamed = _name_problems(plan)
    if unnamed:
        return unnamed  # nothing else can be looked up
    buffers = {buffer.name: buffer for buffer in plan.buffers}
    order = _unroll(plan)
    problems = _shape_problems(plan, buffers) + _host_problems(plan)
    transfers, missing = _transfers(plan, order)
    problems += missing
    problems += _deadlocks(plan, order)
    problems += _content_problems(order, transfers)
    problems += _overlaps(buffers, order, transfers)
    problems += _peak_problems(plan)
    return problems


def _name_problems(plan: Plan) -> list[str]:
    """Names that stand for two things or for none."""
    buffers, units = {b.name for b in plan.buffers}, {u.id for u in plan.units}
    steps, copies = {s.id for s in plan.steps}, {c.id for c in plan.copies}
    problems = []
    for known, entries in (
        (buffers, plan.buffers),
        (units, plan.units),
        (steps, plan.steps),
        (copies, plan.copies),
    ):
        if len(known) != len(entries):
            problems.append("a buffer, unit, step or copy is named twice")
    for step in plan.steps:
        used = {*step.reads, *step.writes, *([step.weights] if step.weights else [])}
        problems += [f"{step.id}: {name} is no buffer" for name in sorted(used - buffers)]
        problems += [f"{step.id}: {name} is no copy" for name in step.waits if name not in copies]
        if step.unit is not None and step.unit not in units:
            problems.append(f"{step.id}: {step.unit} is no unit")
    for copy in plan.copies:
        if copy.buffer not in buffers or copy.unit not in units:
            problems.append(
                f"{copy.id}: {copy.unit} into {copy.buffer}: one of them does not exist"
            )
        if copy.after is not None and copy.after not in steps:
            problems.append(f"{copy.id}: {copy.after} is no step")
    return problems


def _unroll(plan: Plan) -> list[Occurrence]:
    order = [Occurrence(step, 0) for step in plan.steps if step.phase != "decode"]
    body = [step for step in plan.steps if step.phase == "decode"]
    for iteration in range(min(UNROLLED, plan.decode_repeats)):
        order += [Occurrence(step, iteration) for step in body]
    return order


def _shape_problems(plan: Plan, buffers: dict[str, Buffer]) -> list[str]:
    problems = []
    units = {unit.id: unit for unit in plan.units}
    limit = plan.device.max_tensor_bytes
    for buffer in plan.buffers:
        if buffer.offset_bytes % 512 or buffer.offset_bytes < 0:
            problems.append(f"{buffer.name}: offset {buffer.offset_bytes} is not a multiple of 512")
        if buffer.offset_bytes + buffer.size_bytes > plan.prediction.arena_bytes:
            problems.append(f"{buffer.name}: ends beyond the arena")
        end = 0
        for view in sorted(buffer.views, key=lambda view: view.offset_bytes):
            size = DTYPE_BYTES[view.dtype]
            for extent in view.shape:
                size *= extent
            if view.offset_bytes < end or view.offset_bytes + size > buffer.size_bytes:
                problems.append(
                    f"{buffer.name}: view {view.name} overlaps another or ends beyond it"
                )
            end = view.offset_bytes + size
            if size > limit:
                problems.append(
                    f"{buffer.name}: view {view.name} has {size} bytes, more than {limit}"
                )
    for copy in plan.copies:
        unit = units[copy.unit]
        if unit.size_bytes > buffers[copy.buffer].size_bytes:
            problems.append(f"{copy.id}: {unit.id} does not fit {copy.buffer}")
        if unit.size_bytes != copy.size_bytes:
            problems.append(
                f"{copy.id}: says {copy.size_bytes} bytes, its unit has {unit.size_bytes}"
            )
        problems += [
            f"{t.name}: more than {limit} bytes" for t in unit.tensors if t.size_bytes > limit
        ]
    if plan.workload.context_tokens < plan.workload.prompt_tokens + plan.workload.max_new_tokens:
        problems.append("the KV cache is too small for prompt and answer")
    if plan.decode_repeats != plan.workload.max_new_tokens - 1:
        problems.append("decode repeats do not give the wanted number of tokens")
    return problems


def _host_problems(plan: Plan) -> list[str]:
    """Units kept in host memory: places of their own, and no copy from there before the unit was read."""
    sizes = {unit.id: unit.size_bytes for unit in plan.units}
    problems = []
    end = 0
    for kept in sorted(plan.host_units, key=lambda kept: kept.offset_bytes):
        if kept.size_bytes != sizes.get(kept.unit):
            problems.append(
                f"{kept.unit}: kept in {kept.size_bytes} bytes, has {sizes.get(kept.unit)}"
            )
        if kept.offset_bytes < end:
            problems.append(f"{kept.unit}: its place in host memory overlaps another")
        end = kept.offset_bytes + kept.size_bytes
    places = {kept.unit for kept in plan.host_units}
    read: set[str] = set()
    for copy in sorted(plan.copies, key=lambda copy: copy.phase == "decode"):
        if copy.source == "host" and not (copy.unit in places and copy.unit in read):
            problems.append(f"{copy.id}: comes from host memory, where {copy.unit} is not yet")
        read.add(copy.unit)
    return problems


def _transfers(plan: Plan, order: list[Occurrence]) -> tuple[list[Transfer], list[str]]:
    """Occurrences of all copies, with the moments they may write in."""
    at = {(o.step.id, o.iteration): index for index, o in enumerate(order)}
    prefill_end = max(i for i, o in enumerate(order) if o.step.phase != "decode")
    needs: dict[str, list[int]] = {}
    for index, occurrence in enumerate(order):
        for waited in occurrence.step.waits:
            needs.setdefault(waited, []).append(index)
    problems, transfers = [], []
    for copy in plan.copies:
        needed = needs.get(copy.id, [])
        if not needed:
            problems.append(f"{copy.id}: no step waits for it")
            continue
        for iteration, need in enumerate(needed[:1] if copy.once else needed):
            if copy.after is None:
                start = 0
            elif copy.wraps:
                last = at[copy.after, iteration - 1] if iteration else prefill_end
                start = last + 1
            else:
                start = (
                    at[copy.after, iteration]
                    if (copy.after, iteration) in at
                    else at[copy.after, 0]
                ) + 1
            if start > need:
                problems.append(f"{copy.id}: may only start after the step that waits for it")
            transfers.append(Transfer(copy, start, need))
    return transfers, problems


def _deadlocks(plan: Plan, order: list[Occurrence]) -> list[str]:
    """Run both queues, each as far as its waits allow, until both are done or neither moves."""
    queue: list[tuple[Copy, int]] = [(c, 0) for c in plan.copies if c.phase != "decode"]
    for iteration in range(min(UNROLLED, plan.decode_repeats)):
        queue += [
            (c, iteration)
            for c in plan.copies
            if c.phase == "decode" and (iteration == 0 or not c.once)
        ]
    done: set[tuple[str, int]] = set()
    prefill_last = [o for o in order if o.step.phase != "decode"][-1].step.id
    landed: set[tuple[str, int]] = set()
    once = {copy.id for copy in plan.copies if copy.once or copy.phase != "decode"}
    step, position = 0, 0
    while step < len(order) or position < len(queue):
        moved = False
        while position < len(queue):
            copy, iteration = queue[position]
            after = (copy.after, iteration)
            if copy.wraps:
                after = (copy.after, iteration - 1) if iteration else (prefill_last, 0)
            elif copy.phase == "decode" and not _in_loop(plan, copy.after):
                after = (copy.after, 0)
            if copy.after is not None and after not in done:
                break
            landed.add((copy.id, iteration))
            position += 1
            moved = True
        if step < len(order):
            waiting = order[step]
            if all(
                (w, 0 if w in once else waiting.iteration) in landed for w in waiting.step.waits
            ):
                done.add((waiting.step.id, waiting.iteration))
                step += 1
                moved = True
        if not moved:
            return [f"deadlock: {order[step].step.id} and the copy queue wait for each other"]
    return []


def _in_loop(plan: Plan, step_id: str | None) -> bool:
    return step_id is not None and step_id.startswith("decode/")


def _content_problems(order: list[Occurrence], transfers: list[Transfer]) -> list[str]:
    """Every read after its write; every weight read finds its own unit, waited for."""
    problems = []
    arrivals: dict[int, list[Transfer]] = {}
    for transfer in transfers:
        arrivals.setdefault(transfer.need, []).append(transfer)
    holds: dict[str, str] = {}
    written: set[str] = set()
    for index, (step, _) in enumerate(order):
        for transfer in arrivals.get(index, ()):
            holds[transfer.copy.buffer] = transfer.copy.unit
        if step.unit is not None and (step.weights is None or holds.get(step.weights) != step.unit):
            found = holds.get(step.weights or "")
            problems.append(f"{step.id}: wants {step.unit} in {step.weights}, which holds {found}")
        problems += [
            f"{step.id}: reads {b} before it is written" for b in step.reads if b not in written
        ]
        written.update(step.writes)
    return problems


def _overlaps(
    buffers: dict[str, Buffer], order: list[Occurrence], transfers: list[Transfer]
) -> list[str]:
    """No two buffers whose contents matter at the same moment share a byte."""
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in buffers}
    begun: dict[str, int] = {}
    starts: dict[int, list[Transfer]] = {}
    for transfer in transfers:
        starts.setdefault(transfer.start, []).append(transfer)
        # a refill must not begin while the version before is still to be read
    last_use: dict[str, int] = {}
    first_wait = {(t.copy.buffer, t.need): t.start for t in transfers}
    problems = []
    for index, (step, _) in enumerate(order):
        for transfer in (t for t in transfers if t.need == index):
            name = transfer.copy.buffer
            if name in last_use and last_use[name] >= transfer.start:
                problems.append(f"{transfer.copy.id}: may overwrite {name} before its last use")
            begun[name] = first_wait[name, index]
        for name in step.writes:
            if name not in step.reads or name not in begun:
                begun[name] = index
            spans[name].append((begun[name], index + 1))
        for name in (*step.reads, *((step.weights,) if step.weights else ())):
            if name in begun:
                spans[name].append((begun[name], index + 1))
            if name == step.weights:
                last_use[name] = index
    merged = {name: _merged(found) for name, found in spans.items() if found}
    names = sorted(merged, key=lambda name: buffers[name].offset_bytes)
    for position, first in enumerate(names):
        end = buffers[first].offset_bytes + buffers[first].size_bytes
        for second in names[position + 1 :]:
            if buffers[second].offset_bytes >= end:
                break
            if _intersect(merged[first], merged[second]):
                problems.append(f"{first} and {second} share bytes while both are alive")
    return problems


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        else:
            result.append((start, end))
    return result


def _intersect(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> bool:
    return any(a < d and c < b for a, b in first for c, d in second)


def _peak_problems(plan: Plan) -> list[str]:
    problems = []
    prediction, device = plan.prediction, plan.device
    for index, step in enumerate(plan.steps):
        live = sum(
            buffer.size_bytes
            for buffer in plan.buffers
            if any(birth <= index < death for birth, death in buffer.lifetimes)
        )
        if live != step.live_bytes:
            problems.append(f"{step.id}: {live} bytes are alive, the plan says {step.live_bytes}")
        if live > prediction.arena_bytes:
            problems.append(f"{step.id}: more is alive than the arena has")
        if device.kind == "cpu":
            total = (
                device.context_bytes + step.resident_bytes + step.outside_bytes + step.host_bytes
            )
            if total != step.expected_bytes:
                problems.append(f"{step.id}: the terms do not add up to the expected bytes")
        if step.expected_bytes > prediction.expected_peak_bytes:
            problems.append(f"{step.id}: expects more than the plan's peak")
        problems += _block_problems(step)
    if prediction.bound_peak_bytes < prediction.expected_peak_bytes + device.context_error_bytes:
        problems.append("the bound leaves out a stated error")
    if prediction.peak_step != "load":
        if sum(term.expected_bytes for term in prediction.terms) != prediction.expected_peak_bytes:
            problems.append("the terms of the peak do not add up to it")
        errors = sum(term.error_bytes for term in prediction.terms)
        if prediction.expected_peak_bytes + errors != prediction.bound_peak_bytes:
            problems.append("the terms' errors do not add up to the bound's")
    if device.kind == "cuda":
        problems += [
            problem for phase in prediction.phases for problem in _card_problems(plan, phase)
        ]
    if device.budget_bytes is not None and prediction.bound_peak_bytes > device.budget_bytes:
        problems.append("the bound is above the budget")
    return problems


def _block_problems(step: Step) -> list[str]:
    """Blocks outside the arena that a step lists against the bytes it states."""
    alive = [
        sum(b.size_bytes for b in step.outside if b.birth <= number < b.death)
        for number in range(len(step.outside))
    ]
    if [block.birth for block in step.outside] != list(range(len(alive))):
        return [f"{step.id}: its blocks are not in the order in which they are taken"]
    if max(alive, default=0) != step.outside_bytes:
        return [f"{step.id}: its blocks do not add up to the {step.outside_bytes} bytes outside"]
    return []


def _card_problems(plan: Plan, phase: PhasePrediction) -> list[str]:
    """A card holds the same throughout: context, and what is reserved for arena, kept blocks and the steps' own."""
    problems = []
    held = plan.prediction.arena_bytes + sum(block.size_bytes for block in plan.device.kept)
    own = [s.outside_bytes for s in plan.steps if phase.phase in ("load", s.phase)]
    if phase.allocated_peak_bytes > phase.reserved_peak_bytes:
        problems.append(f"{phase.phase}: more is allocated than reserved")
    if phase.allocated_peak_bytes < held + max(own, default=0):
        problems.append(f"{phase.phase}: allocated leaves out arena, kept blocks or the steps' own")
    if phase.expected_peak_bytes != plan.device.context_bytes + phase.reserved_peak_bytes:
        problems.append(f"{phase.phase}: context and reserved do not add up to the expected peak")
    return problems
