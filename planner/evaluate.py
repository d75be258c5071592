"""One setting of the levers, worked out: program, graph, layout, bytes, seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from planner import graph as graphs
from planner.again import cache_kept
from planner.graph import Intervals
from planner.layout import Layout, place
from planner.plan.program import HostBuffer, Outside
from planner.plan.words import DTYPE_BYTES
from planner.problem import Problem
from planner.schedule import Choice, Program, program
from planner.simulate import (
    CardBytes,
    StepBytes,
    Timeline,
    card_bytes,
    queue_order,
    step_bytes,
    timeline,
)
from planner.units import MIB
from planner.workload import host_bytes
from planner.workspace import peak_bytes

# Of what no walk sees on a card: whether cuBLASLt's workspace is its own or a temporary differs between versions of
# torch, and a reduction may take a few counters; either is one more small segment at most.
WORKSPACE_ERROR_BYTES = 2 * MIB
BLOCKS_ERROR_BYTES = 2 * MIB


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A choice with everything that follows from it. Device bytes are per step, `expected` and `bound`."""

    choice: Choice
    program: Program
    lifetimes: dict[str, Intervals]
    layout: Layout
    bytes: list[StepBytes]
    host: list[int]
    outside: list[tuple[Outside, ...]]
    step_seconds: list[float]
    copy_seconds: dict[str, float]
    time: Timeline
    context_bytes: int
    context_error_bytes: int
    load_bytes: int
    expected: list[int]
    card: CardBytes | None  # None on the CPU
    workspace_error_bytes: int = 0
    blocks_error_bytes: int = 0

    @property
    def seconds(self) -> float:
        return self.time.seconds

    @property
    def peak_bytes(self) -> int:
        return max(self.load_bytes, *self.expected)

    @property
    def peak_index(self) -> int:
        """The step at the peak; where the device holds the same throughout (a card), the one with most bytes in use."""
        in_use = [step.live + step.outside for step in self.bytes]
        return max(range(len(in_use)), key=lambda i: (self.expected[i], in_use[i]))

    @property
    def bound_bytes(self) -> int:
        return self.peak_bytes + self.error_bytes

    @property
    def error_bytes(self) -> int:
        """How much more than expected it may be, whatever the step."""
        return self.context_error_bytes + self.workspace_error_bytes + self.blocks_error_bytes


class Draft(NamedTuple):
    """A program with its seconds, before its bytes are known."""

    program: Program
    step_seconds: list[float]
    copy_seconds: dict[str, float]
    time: Timeline


def program_of(
    problem: Problem, choice: Choice, prefetch_after: dict[str, int] | None = None
) -> Program:
    """The program of a choice, its copies not yet in the order of their queue."""
    return program(
        choice,
        problem.model,
        problem.workload,
        problem.unit_sizes(choice.tiles.vocabulary_rows),
        prefetch_after=prefetch_after,
        pinned_bytes=problem.pinned_bytes,
    )


def draft(problem: Problem, choice: Choice, prefetch_after: dict[str, int] | None = None) -> Draft:
    """The program of a choice and its seconds; of two ways to order the copy queue the faster."""
    drafted = program_of(problem, choice, prefetch_after)
    head_rows = min(choice.tiles.vocabulary_rows, problem.model.text.vocabulary)
    step_seconds = [problem.seconds_of(step, choice.tiles, head_rows) for step in drafted.steps]
    copy_seconds = _copy_seconds(problem, drafted)
    orders = [
        queue_order(drafted, step_seconds, copy_seconds, patient=patient)
        for patient in (True, False)
    ]
    found: list[Draft] = []
    for copies in orders if orders[0] != orders[1] else orders[:1]:
        ordered = replace(drafted, copies=copies)
        time = timeline(ordered, step_seconds, copy_seconds, problem.costs.beside)
        found.append(Draft(ordered, step_seconds, copy_seconds, time))
    return min(found, key=lambda d: d.time.seconds)


def evaluate(
    problem: Problem,
    choice: Choice,
    prefetch_after: dict[str, int] | None = None,
    *,
    quick: bool = False,
) -> Evaluated:
    """Work one choice out, budget or not; `quick`: with a layout by first fit, for what is only compared."""
    return work_out(problem, draft(problem, choice, prefetch_after), quick=quick)


def work_out(
    problem: Problem, drafted_: Draft, *, for_further: bool = False, quick: bool = False
) -> Evaluated:
    """Graph, layout and bytes of a drafted program; `for_further`: keys and values outlive a request."""
    model, workload, profile = problem.model, problem.workload, problem.profile
    drafted, step_seconds, copy_seconds, time = drafted_
    choice = drafted.choice
    lifetimes = graphs.lifetimes_of(drafted)
    if for_further:
        lifetimes = cache_kept(drafted, lifetimes)
    buffer_sizes = {name: buffer.size_bytes for name, buffer in drafted.buffers.items()}
    layout = place(buffer_sizes, lifetimes, quick=quick)
    live = graphs.live_bytes(lifetimes, buffer_sizes, len(drafted.steps))
    outside = [problem.outside_of(step, choice.tiles) for step in drafted.steps]
    bytes_ = step_bytes(
        drafted,
        model,
        workload,
        lifetimes,
        layout.offsets,
        live,
        outside,
        arena_bytes=layout.height_bytes,
        by_pages=problem.on_cpu,
    )
    host = _host_bytes(problem, drafted)
    shapes = problem.gemm_shapes(choice.tiles, choice.images_together)
    context = problem.context_bytes(shapes)
    if problem.on_cpu:
        expected = [
            context + step.resident + step.outside + h for step, h in zip(bytes_, host, strict=True)
        ]
        load = context + max(
            problem.decoding_bytes,
            priming_bytes(drafted, outside),
            host[0] + loaded_bytes(drafted),
        )
        card = None
        workspace_error = blocks_error = 0
    else:
        card = card_bytes(
            layout.height_bytes,
            problem.kept,
            outside,
            scratch_bytes=max(step.outside for step in bytes_),
            alloc_conf=problem.alloc_conf,
        )
        # the arena and all that is kept are taken before the first weight is read
        load = context + card.reserved
        expected = [load] * len(bytes_)
        workspace_error = WORKSPACE_ERROR_BYTES
        blocks_error = BLOCKS_ERROR_BYTES + card.doubled - card.reserved
    return Evaluated(
        choice=choice,
        program=drafted,
        lifetimes=lifetimes,
        layout=layout,
        bytes=bytes_,
        host=host,
        outside=outside,
        step_seconds=step_seconds,
        copy_seconds=copy_seconds,
        time=time,
        context_bytes=context,
        context_error_bytes=profile.context_error_bytes,
        load_bytes=load,
        expected=expected,
        card=card,
        workspace_error_bytes=workspace_error,
        blocks_error_bytes=blocks_error,
    )


def card_bound(problem: Problem, arena_bytes: int, outside: Sequence[tuple[Outside, ...]]) -> int:
    """The bound of a plan on a card with such an arena and steps that take these blocks."""
    scratch = max((peak_bytes(blocks) for blocks in outside), default=0)
    card = card_bytes(
        arena_bytes,
        problem.kept,
        outside,
        scratch_bytes=scratch,
        alloc_conf=problem.alloc_conf,
    )
    return card_base(problem) + card.doubled


def card_base(problem: Problem) -> int:
    """The part of a bound on a card that no lever changes: the context, and the errors of its terms."""
    profile = problem.profile
    error = profile.context_error_bytes + WORKSPACE_ERROR_BYTES + BLOCKS_ERROR_BYTES
    return profile.context_bytes + error


def loaded_bytes(drafted: Program) -> int:
    """Weights that arrive before the first step: all residents, where they come first."""
    if drafted.choice.order != "all_first":
        return 0
    return sum(copy.size_bytes for copy in drafted.copies if copy.need == 0 and copy.after < 0)


def priming_bytes(drafted: Program, outside: list[tuple[Outside, ...]]) -> int:
    """The most that one primed step touches: a tile's scratch and residual rows, and what its kernels take."""
    most = 0
    for step, blocks in zip(drafted.steps, outside, strict=True):
        written = 0
        for name in step.writes:
            buffer = drafted.buffers[name]
            if buffer.kind == "scratch":
                # of keys and values of all rows a tile's are touched
                tile = max((view.shape[0] for view in buffer.views if view.name == "y"), default=0)
                for view in buffer.views:
                    rows = min(tile, view.shape[0]) if view.name == "kv" else view.shape[0]
                    written += math.prod((rows, *view.shape[1:])) * DTYPE_BYTES[view.dtype]
        most = max(most, written + peak_bytes(blocks))
    return most


def pixel_buffers(problem: Problem, drafted: Program) -> list[HostBuffer]:
    """Resized images on the host, each alive until its patches are embedded; none where the host is not the device."""
    if not problem.on_cpu:
        return []
    embedded = [(i, s.images) for i, s in enumerate(drafted.steps) if s.kind == "patch_embed"]
    result = []
    for number, image in enumerate(problem.workload.images):
        last = max(index for index, images in embedded if number in images)
        result.append(
            HostBuffer(
                name=f"pixels[{number}]",
                size_bytes=host_bytes(image).kept_bytes,
                lifetimes=((0, last + 1),),
            )
        )
    return result


def _host_bytes(problem: Problem, drafted: Program) -> list[int]:
    host = [0] * len(drafted.steps)
    for buffer in pixel_buffers(problem, drafted):
        for birth, death in buffer.lifetimes:
            for index in range(birth, death):
                host[index] += buffer.size_bytes
    return host


def _copy_seconds(problem: Problem, drafted: Program) -> dict[str, float]:
    """Seconds of each copy."""
    seen: set[str] = set()
    touched: set[str] = set()
    pinned = set(drafted.pinned)
    seconds: dict[str, float] = {}
    for copy in drafted.copies:
        first = copy.unit not in seen
        seen.add(copy.unit)
        # pages that nothing has touched yet; in a loop that is one of many
        fresh = copy.buffer not in touched and (copy.once or copy.phase != "decode")
        touched.add(copy.buffer)
        if copy.source == "host":
            seconds[copy.id] = problem.costs.from_host(copy.size_bytes)
            continue
        seconds[copy.id] = problem.costs.copy(
            copy.size_bytes, first=first, cached=problem.cached, fresh=fresh
        )
        if first and copy.unit in pinned:
            seconds[copy.id] += problem.costs.pin(copy.size_bytes)
    return seconds
