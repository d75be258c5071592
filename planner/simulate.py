"""A program, interpreted into seconds and bytes."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from planner.allocator import CachingAllocator
from planner.graph import Intervals, start_index
from planner.plan import DTYPE_BYTES, ModelShape, Outside, Phase, Workload
from planner.schedule import CopyDraft, Program
from planner.workspace import peak_bytes

ITERATIONS = 3  # of the decode loop: first, steady, and one more to measure the steady period


class PhaseTime(NamedTuple):
    seconds: float  # from the end of the phase before to the end of its last step
    compute_seconds: float
    copy_seconds: float


class Timeline(NamedTuple):
    load_seconds: (
        float  # until the first step may start, where all weights come first; part of `seconds`
    )
    phases: dict[Phase, PhaseTime]
    seconds: float


def queue_order(
    program: Program,
    step_seconds: Sequence[float],
    copy_seconds: Mapping[str, float],
    *,
    patient: bool,
) -> tuple[CopyDraft, ...]:
    """The copies in the order of a queue that takes, of those that may start, the one needed first.

    A `patient` queue rather stays idle than take a copy that would make the next refill of a staging slot late.
    Found by walking both queues with predicted seconds; being the order of a walk that ended, it cannot deadlock.
    The copies of decode keep their order.
    """
    by_after: dict[int, list[CopyDraft]] = {}
    for copy in sorted(program.copies, key=lambda copy: copy.need):
        if copy.phase != "decode":
            by_after.setdefault(copy.after, []).append(copy)
    released = by_after.pop(-1, [])  # may start, by need
    upcoming = sorted(after for after in by_after)
    order: list[CopyDraft] = []
    ends: dict[str, float] = {}
    before = [0.0]  # seconds of all steps before each
    for seconds in step_seconds:
        before.append(before[-1] + seconds)
    compute = copying = 0.0

    def take(copy: CopyDraft) -> None:
        nonlocal copying
        released.remove(copy)
        copying += copy_seconds[copy.id]
        ends[copy.id] = copying
        order.append(copy)

    for index, step in enumerate(program.steps[: program.decode_start]):
        while not all(waited in ends for waited in step.waits):
            take(released[0])
        compute = max([compute, *(ends[waited] for waited in step.waits)]) + step_seconds[index]
        while upcoming and upcoming[0] < index:
            upcoming.pop(0)
        latest = float("inf")
        if patient and upcoming:
            refill = by_after[upcoming[0]][0]
            idle = before[refill.need] - before[index + 1]
            latest = compute + idle - copy_seconds[refill.id]
        while released and copying < compute and copying + copy_seconds[released[0].id] <= latest:
            take(released[0])
        arrived = by_after.get(index, [])
        if arrived:
            copying = max(copying, compute)
            released = sorted([*released, *arrived], key=lambda copy: copy.need)
    order += released
    order += [copy for copy in program.copies if copy.phase == "decode"]
    return tuple(order)


def timeline(
    program: Program,
    step_seconds: Sequence[float],
    copy_seconds: Mapping[str, float],
    stolen_seconds: Mapping[str, float] | None = None,
) -> Timeline:
    """Longest path over the two queues.

    A step starts when the step before it and the copies it waits for have ended; a copy starts when the copy before it
    and the step it comes after have ended. `stolen_seconds` of a copy are taken from the step beside which it ends
    (on the CPU both use the same cores). The decode loop is walked a few times and its steady period repeated.
    """
    stolen = stolen_seconds or {}
    ends: list[float] = []  # of steps, prefill and before
    copy_end: dict[str, float] = {}
    landing: deque[tuple[float, float]] = (
        deque()
    )  # (end, stolen seconds) of copies no step has paid for
    compute = copying = 0.0
    queue = [copy for copy in program.copies if copy.phase != "decode"]
    position = 0
    load = 0.0
    boundaries: dict[Phase, float] = {}
    for index, step in enumerate(program.steps[: program.decode_start]):
        # the queue stops at the first copy that comes after a step not yet run
        while position < len(queue) and queue[position].after < index:
            copy = queue[position]
            ready = ends[copy.after] if copy.after >= 0 else 0.0
            copying = max(copying, ready) + copy_seconds[copy.id]
            copy_end[copy.id] = copying
            landing.append((copying, stolen.get(copy.id, 0.0)))
            position += 1
        start = max([compute, *(copy_end[waited] for waited in step.waits)])
        if index == 0 and program.choice.order == "all_first":
            load = start
        while landing and landing[0][0] <= start:
            landing.popleft()  # landed while nothing ran
        compute = _pay(landing, start + step_seconds[index])
        ends.append(compute)
        boundaries[step.phase] = compute
    phases: dict[Phase, PhaseTime] = {}
    before = load
    for phase, end in boundaries.items():
        busy = sum(
            s for s, step in zip(step_seconds, program.steps, strict=True) if step.phase == phase
        )
        moved = sum(copy_seconds[c.id] for c in program.copies if c.phase == phase)
        phases[phase] = PhaseTime(end - before, busy, moved)
        before = end
    if not program.decode_repeats:
        return Timeline(load, phases, before)
    first, period, moved = _loop(program, step_seconds, copy_seconds, stolen, compute, copying)
    repeats = program.decode_repeats
    seconds = first + (repeats - 1) * period
    busy = sum(step_seconds[program.decode_start :]) * repeats
    phases["decode"] = PhaseTime(seconds, busy, moved)
    return Timeline(load, phases, before + seconds)


def _pay(landing: deque[tuple[float, float]], end: float) -> float:
    """The end of a step that would end at `end`, later by what copies that land before it steal."""
    while landing and landing[0][0] <= end:
        end += landing.popleft()[1]
    return end


def _loop(
    program: Program,
    step_seconds: Sequence[float],
    copy_seconds: Mapping[str, float],
    stolen: Mapping[str, float],
    compute: float,
    copying: float,
) -> tuple[float, float, float]:
    """Seconds of the first iteration and of a steady one, and copy seconds of the whole loop."""
    start = program.decode_start
    begin = compute
    copies = [copy for copy in program.copies if copy.phase == "decode"]
    marks = []
    previous: dict[int, float] = {}
    landing: deque[tuple[float, float]] = deque()
    for iteration in range(min(ITERATIONS, program.decode_repeats)):
        ends: dict[int, float] = {}
        copy_end: dict[str, float] = {}
        queue = [copy for copy in copies if iteration == 0 or not copy.once]
        position = 0
        for index in range(start, len(program.steps)):
            # a queue sorted by need: run on as long as the step it comes after has ended
            while position < len(queue) and _known(queue[position], ends, start):
                copy = queue[position]
                ready = begin
                if copy.wraps:
                    ready = previous.get(copy.after, begin)
                elif copy.after >= start:
                    ready = ends[copy.after]
                copying = max(copying, ready) + copy_seconds[copy.id]
                copy_end[copy.id] = copying
                landing.append((copying, stolen.get(copy.id, 0.0)))
                position += 1
            waits = [copy_end[w] for w in program.steps[index].waits if w in copy_end]
            begun = max([compute, *waits])
            while landing and landing[0][0] <= begun:
                landing.popleft()
            compute = _pay(landing, begun + step_seconds[index])
            ends[index] = compute
        previous = ends
        marks.append(compute)
    first = marks[0] - begin
    period = marks[-1] - marks[-2] if len(marks) > 1 else 0.0
    once = sum(copy_seconds[copy.id] for copy in copies if copy.once)
    each = sum(copy_seconds[copy.id] for copy in copies if not copy.once)
    return first, period, once + each * program.decode_repeats


def _known(copy: CopyDraft, ends: Mapping[int, float], start: int) -> bool:
    return copy.wraps or copy.after < start or copy.after in ends


# --- bytes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Of one step: arena bytes alive, arena bytes the device holds, and the largest simultaneous sum of outside blocks."""

    live: int
    resident: int
    outside: int


def step_bytes(
    program: Program,
    model: ModelShape,
    workload: Workload,
    lifetimes: Mapping[str, Intervals],
    offsets: Mapping[str, int],
    live: Sequence[int],
    outside: Sequence[tuple[Outside, ...]],
    *,
    arena_bytes: int,
    by_pages: bool,
) -> list[StepBytes]:
    """Bytes of every step. `by_pages` (the CPU): arena pages count from their first write until a phase end at which nothing alive lies on them."""
    if not by_pages:
        return [
            StepBytes(live[i], arena_bytes, peak_bytes(outside[i]))
            for i in range(len(program.steps))
        ]
    arriving: dict[int, list[CopyDraft]] = {}
    for copy in program.copies:
        arriving.setdefault(start_index(copy, program), []).append(copy)
    touched = Ranges()
    result = []
    phase: Phase | None = None
    for index, step in enumerate(program.steps):
        if phase is not None and step.phase != phase:
            touched = touched.only(
                [
                    (offsets[name], offsets[name] + program.buffers[name].size_bytes)
                    for name, spans in lifetimes.items()
                    if any(birth <= index < death for birth, death in spans)
                ]
            )
        phase = step.phase
        for copy in arriving.get(index, ()):
            touched.add(offsets[copy.buffer], offsets[copy.buffer] + copy.size_bytes)
        for name in step.writes:
            start = offsets[name]
            for low, high in _written(name, program, model, workload, phase):
                touched.add(start + low, start + high)
        result.append(StepBytes(live[index], touched.total, peak_bytes(outside[index])))
    return result


def _written(
    name: str, program: Program, model: ModelShape, workload: Workload, phase: Phase
) -> list[tuple[int, int]]:
    buffer = program.buffers[name]
    if buffer.kind != "kv_cache" or phase != "prefill":
        return [(0, buffer.size_bytes)]
    # prefill fills the leading rows of keys and of values; the rest comes with the tokens of decode
    row = model.text.kv_heads * model.text.head_dim * DTYPE_BYTES[model.dtype]
    return [
        (view.offset_bytes, view.offset_bytes + workload.prompt_tokens * row)
        for view in buffer.views
    ]


def reserved_bytes(
    arena_bytes: int, workspaces: Sequence[int], outside: Sequence[tuple[Outside, ...]]
) -> int:
    """What the CUDA caching allocator reserves for the arena, library workspaces and the steps' own blocks.

    At start one block of the largest simultaneous size is taken and freed, so that the rest of the run finds its room.
    """
    allocator = CachingAllocator()
    allocator.malloc(arena_bytes)
    for size in workspaces:
        allocator.malloc(size)
    scratch = max((peak_bytes(blocks) for blocks in outside), default=0)
    if scratch:
        allocator.release(allocator.malloc(scratch))
    for blocks in dict.fromkeys(outside):
        moments = [(b.birth, 1, b) for b in blocks] + [(b.death, 0, b) for b in blocks]
        held = {}
        for _, born, block in sorted(moments, key=lambda moment: moment[:2]):
            if born:
                held[id(block)] = allocator.malloc(block.size_bytes)
            else:
                allocator.release(held.pop(id(block)))
    return allocator.reserved_bytes


class Ranges:
    """A set of bytes as disjoint, sorted half-open ranges."""

    def __init__(self, spans: Sequence[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.total = 0
        for start, end in spans:
            self.add(start, end)

    def add(self, start: int, end: int) -> None:
        """Join `[start, end)`."""
        low = bisect.bisect_left(self._ends, start)
        high = bisect.bisect_right(self._starts, end)
        if low < high:
            if self._starts[low] <= start and end <= self._ends[low]:
                return
            start = min(start, self._starts[low])
            end = max(end, self._ends[high - 1])
            self.total -= sum(
                e - s for s, e in zip(self._starts[low:high], self._ends[low:high], strict=True)
            )
        self._starts[low:high] = [start]
        self._ends[low:high] = [end]
        self.total += end - start

    def only(self, spans: Sequence[tuple[int, int]]) -> Ranges:
        """The part that lies inside `spans`."""
        kept = Ranges()
        for start, end in spans:
            for s, e in zip(self._starts, self._ends, strict=True):
                if s < end and start < e:
                    kept.add(max(s, start), min(e, end))
        return kept
