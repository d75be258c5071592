"""A program, interpreted into seconds and bytes."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from planner.allocator import Block, CachingAllocator, Settings, parse_settings
from planner.graph import Intervals, start_index
from planner.plan import Kept
from planner.plan.program import Outside
from planner.plan.shapes import ModelShape, Workload
from planner.plan.words import DTYPE_BYTES, Phase
from planner.queues import APART, Beside, Job, line, loop, queue
from planner.schedule import CopyDraft, Program
from planner.workspace import peak_bytes


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
    """The copies in the order of their queue (`planner.queues.queue`); those of decode keep theirs."""
    copies = [copy for copy in program.copies if copy.phase != "decode"]
    steps = step_seconds[: program.decode_start]
    order = queue(steps, _jobs(copies, copy_seconds), patient=patient)
    decode = (copy for copy in program.copies if copy.phase == "decode")
    return (*(copies[number] for number in order), *decode)


def timeline(
    program: Program,
    step_seconds: Sequence[float],
    copy_seconds: Mapping[str, float],
    beside: Beside = APART,
) -> Timeline:
    """Longest path over the two queues.

    A step starts when the step before it and the copies it waits for have ended; a copy starts when the copy before it
    and the step it comes after have ended. `beside`: how fast each queue is while both run. The decode loop is walked a few times and its steady period repeated.
    """
    start = program.decode_start
    copies = [copy for copy in program.copies if copy.phase != "decode"]
    ends, begin = line(step_seconds[:start], _jobs(copies, copy_seconds), beside)
    load = begin if program.choice.order == "all_first" else 0.0
    boundaries: dict[Phase, float] = {}
    for step, end in zip(program.steps, ends, strict=False):
        boundaries[step.phase] = end
    phases: dict[Phase, PhaseTime] = {}
    before = load
    for phase, end in boundaries.items():
        busy = sum(
            s for s, step in zip(step_seconds, program.steps, strict=True) if step.phase == phase
        )
        moved = sum(copy_seconds[c.id] for c in program.copies if c.phase == phase)
        phases[phase] = PhaseTime(end - before, busy, moved)
        before = end
    repeats = program.decode_repeats
    if not repeats:
        return Timeline(load, phases, before)
    copies = [copy for copy in program.copies if copy.phase == "decode"]
    jobs = _jobs(copies, copy_seconds, start)
    seconds = loop(step_seconds[start:], jobs, repeats, beside).seconds(repeats)
    busy = sum(step_seconds[start:]) * repeats
    moved = sum(copy_seconds[c.id] * (1 if c.once else repeats) for c in copies)
    phases["decode"] = PhaseTime(seconds, busy, moved)
    return Timeline(load, phases, before + seconds)


def _jobs(
    copies: Sequence[CopyDraft],
    copy_seconds: Mapping[str, float],
    start: int = 0,
) -> list[Job]:
    """The copies as the queues see them, steps counted from `start`; what comes after an earlier step may start at once."""
    return [
        Job(
            copy.need - start,
            max(copy.after - start, -1),
            copy_seconds[copy.id],
            copy.wraps,
            copy.once,
        )
        for copy in copies
    ]


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
    distinct = {id(blocks): blocks for blocks in outside}  # equal steps share theirs
    peaks = {key: peak_bytes(blocks) for key, blocks in distinct.items()}
    if not by_pages:
        return [
            StepBytes(live[i], arena_bytes, peaks[id(outside[i])])
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
        result.append(StepBytes(live[index], touched.total, peaks[id(outside[index])]))
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


class CardBytes(NamedTuple):
    """What the caching allocator does with a plan's blocks: bytes reserved to the end, and bytes allocated at most in each step."""

    reserved: int
    doubled: int  # reserved if all declared blocks were twice as large
    start: int  # reserved before the first step; the same as `reserved` where the steps find their room
    start_allocated: int  # at most, before the first step
    allocated: list[int]


def card_bytes(
    arena_bytes: int,
    kept: Sequence[Kept],
    outside: Sequence[tuple[Outside, ...]],
    *,
    scratch_bytes: int,
    alloc_conf: str = "",
) -> CardBytes:
    """The allocator's bytes for the arena, what is kept beside it, and the steps' own blocks, in executor/cuda.py's order.

    After the arena and the kept blocks, one block of `scratch_bytes` (the steps' largest simultaneous size) is taken
    and given back, so that the rest of the run finds its room. `alloc_conf` as in PYTORCH_ALLOC_CONF.
    """
    allocator = CachingAllocator(_settings(alloc_conf))
    base = allocator.malloc(arena_bytes).size_bytes
    base += sum(allocator.malloc(block.size_bytes).size_bytes for block in kept)
    start_allocated = base
    if scratch_bytes:
        taken = allocator.malloc(scratch_bytes)
        start_allocated += taken.size_bytes
        allocator.release(taken)
    start = allocator.reserved_bytes
    distinct = {id(blocks): blocks for blocks in outside}  # equal steps share theirs
    most = {key: base + _replayed_peak(allocator, blocks) for key, blocks in distinct.items()}
    allocated = [most[id(blocks)] for blocks in outside]
    reserved = allocator.reserved_bytes
    for blocks in distinct.values():
        if any(block.declared for block in blocks):
            _replayed_peak(allocator, blocks, declared=2)
    return CardBytes(reserved, allocator.reserved_bytes, start, start_allocated, allocated)


@lru_cache(maxsize=8)
def _settings(alloc_conf: str) -> Settings:
    return parse_settings(alloc_conf)


def _replayed_peak(
    allocator: CachingAllocator, blocks: Sequence[Outside], *, declared: int = 1
) -> int:
    """The most bytes allocated at once while a step's blocks are taken and given back in their order.

    Declared ones at `declared` times their size.
    """
    held: list[tuple[int, Block]] = []
    allocated = most = 0
    for block in blocks:
        for death, given in held:
            if death <= block.birth:
                allocated -= given.size_bytes
                allocator.release(given)
        held = [(death, given) for death, given in held if death > block.birth]
        taken = allocator.malloc(block.size_bytes * (declared if block.declared else 1))
        held.append((block.death, taken))
        allocated += taken.size_bytes
        most = max(most, allocated)
    for _, given in held:
        allocator.release(given)
    return most


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
