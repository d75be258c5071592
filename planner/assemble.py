"""One setting of the levers, worked out: program, graph, layout, bytes, seconds; and the Plan that comes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from planner import graph as graphs
from planner.again import cache_kept, shares_cache, with_further
from planner.checkpoint.template import units
from planner.graph import Intervals
from planner.layout import Layout, place
from planner.plan import (
    DTYPE_BYTES,
    Buffer,
    Copy,
    DeviceTerms,
    HostBuffer,
    HostUnit,
    Levers,
    MemoryTerm,
    Move,
    Outside,
    PhasePrediction,
    Plan,
    Prediction,
    Residency,
    Step,
    Unit,
    Variant,
)
from planner.problem import Problem
from planner.schedule import Choice, Program, program, resident_units
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
            _priming_bytes(drafted, outside),
            host[0] + _loaded_bytes(drafted),
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


def _loaded_bytes(drafted: Program) -> int:
    """Weights that arrive before the first step: all residents, where they come first."""
    if drafted.choice.order != "all_first":
        return 0
    return sum(copy.size_bytes for copy in drafted.copies if copy.need == 0 and copy.after < 0)


def _priming_bytes(drafted: Program, outside: list[tuple[Outside, ...]]) -> int:
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


# --- the plan -----------------------------------------------------------------------------------------------------


def assemble(
    problem: Problem,
    found: Evaluated,
    *,
    lower_bound: float,
    candidates: int,
    smallest_bytes: int,
    variants: tuple[Variant, ...],
    moves: tuple[Move, ...] = (),
) -> Plan:
    """The Plan of an evaluated choice. Deterministic: the same request gives the same bytes."""
    request, profile = problem.request, problem.profile
    found = _for_further(problem, found)
    drafted, choice = found.program, found.choice
    steps = tuple(
        Step(
            id=step.id,
            phase=step.phase,
            kind=step.kind,
            images=step.images,
            unit=step.unit,
            weights=step.weights,
            reads=step.reads,
            writes=step.writes,
            waits=step.waits,
            kernel=problem.kernel
            if step.kind in ("window_attn", "full_attn", "self_attn")
            else None,
            outside=found.outside[index],
            live_bytes=found.bytes[index].live,
            resident_bytes=found.bytes[index].resident,
            outside_bytes=found.bytes[index].outside,
            host_bytes=found.host[index],
            expected_bytes=found.expected[index],
            seconds=found.step_seconds[index],
        )
        for index, step in enumerate(drafted.steps)
    )
    copies = tuple(
        Copy(
            id=copy.id,
            phase=copy.phase,
            unit=copy.unit,
            buffer=copy.buffer,
            after=drafted.steps[copy.after].id if copy.after >= 0 else None,
            wraps=copy.wraps,
            once=copy.once,
            size_bytes=copy.size_bytes,
            seconds=found.copy_seconds[copy.id],
            source=copy.source,
        )
        for copy in drafted.copies
    )
    arena = tuple(
        Buffer(
            name=name,
            kind=draft.kind,
            offset_bytes=found.layout.offsets[name],
            size_bytes=draft.size_bytes,
            lifetimes=found.lifetimes[name],
            views=draft.views,
        )
        for name, draft in drafted.buffers.items()
    )
    peak_index = found.peak_index
    terms = peak_terms(problem, found, peak_index)
    plan = Plan(
        schema_version=1,
        request=request.command,
        model=problem.model,
        workload=problem.workload,
        device=DeviceTerms(
            profile=profile.id,
            kind=profile.kind,
            budget_bytes=request.budget_bytes,
            context_bytes=found.context_bytes,
            context_error_bytes=found.context_error_bytes,
            max_tensor_bytes=profile.max_tensor_bytes,
            allocator=problem.allocator,
            alloc_conf=problem.alloc_conf,
            kept=problem.kept,
        ),
        levers=Levers(
            order=choice.order,
            images_together=choice.images_together,
            staging_depth=choice.depth,
            tiles=choice.tiles,
            residency=residency(problem, drafted),
        ),
        units=used_units(problem, choice),
        buffers=arena,
        host_buffers=tuple(pixel_buffers(problem, drafted)),
        steps=steps,
        copies=copies,
        host_units=_host_units(problem, drafted),
        decode_repeats=drafted.decode_repeats,
        prediction=Prediction(
            phases=_phases(problem, found),
            peak_step=steps[peak_index].id if max(found.expected) == found.peak_bytes else "load",
            terms=terms,
            expected_peak_bytes=found.peak_bytes,
            bound_peak_bytes=found.bound_bytes,
            arena_bytes=found.layout.height_bytes,
            live_peak_bytes=found.layout.lower_bound_bytes,
            seconds=found.seconds + problem.start_s(choice.tiles),
            seconds_lower_bound=lower_bound + problem.start_s(choice.tiles),
            candidates=candidates,
            smallest_budget_bytes=smallest_bytes,
            variants=variants,
            moves=moves,
        ),
    )
    return with_further(problem, plan)


def _host_units(problem: Problem, drafted: Program) -> tuple[HostUnit, ...]:
    """Places of the pinned units, one behind another in order of use."""
    sizes = problem.unit_sizes(drafted.choice.tiles.vocabulary_rows)
    places, end = [], 0
    for unit in drafted.pinned:
        places.append(HostUnit(unit=unit, offset_bytes=end, size_bytes=sizes[unit]))
        end += sizes[unit]
    return tuple(places)


def _for_further(problem: Problem, found: Evaluated) -> Evaluated:
    """The same with keys and values that a further question finds, where the budget has the bytes, often none."""
    drafted = found.program
    if not drafted.decode_repeats or not shares_cache(
        drafted, found.lifetimes, found.layout.offsets
    ):
        return found
    copy_seconds = found.copy_seconds
    other = work_out(
        problem, Draft(drafted, found.step_seconds, copy_seconds, found.time), for_further=True
    )
    budget = problem.request.budget_bytes
    return other if budget is None or other.bound_bytes <= budget else found


def used_units(problem: Problem, choice: Choice) -> tuple[Unit, ...]:
    """Units of the model at this choice's lm_head tiles."""
    return units(problem.model, choice.tiles.vocabulary_rows)


def residency(problem: Problem, drafted: Program) -> tuple[Residency, ...]:
    """Resident units by class and phase, counted in the program."""
    sizes = problem.unit_sizes(drafted.choice.tiles.vocabulary_rows)
    heads = sum(1 for unit in sizes if unit.startswith("text/lm_head["))
    phases = ["vision", "prefill"] + (["decode"] if drafted.decode_repeats else [])
    result = []
    for phase in phases:
        resident = resident_units(phase, drafted.choice, problem.model, heads)  # type: ignore[arg-type]
        stage = "visual/" if phase == "vision" else "text/"
        classes: dict[str, list[int]] = {}
        for unit in sizes:
            if unit.startswith(stage):
                counts = classes.setdefault(unit_class(unit), [0, 0])
                counts[0] += unit in resident
                counts[1] += 1
        result += [
            Residency(phase=phase, unit_class=name, resident=counts[0], total=counts[1])  # type: ignore[arg-type]
            for name, counts in classes.items()
        ]
    return tuple(result)


def unit_class(unit: str) -> str:
    """`visual/blocks.7.attn` is of class `vision.attn`."""
    stage, _, module = unit.partition("/")
    last = module.rsplit(".", 1)[-1].partition("[")[0]
    return f"{'vision' if stage == 'visual' else 'text'}.{ {'self_attn': 'attn'}.get(last, last) }"


def peak_terms(problem: Problem, found: Evaluated, index: int) -> tuple[MemoryTerm, ...]:
    """What the device holds at one step, term by term; they add up to the step's expected bytes."""
    profile, drafted = problem.profile, found.program
    by_kind: dict[str, int] = {}
    for name, spans in found.lifetimes.items():
        if any(birth <= index < death for birth, death in spans):
            buffer = drafted.buffers[name]
            by_kind[buffer.kind] = by_kind.get(buffer.kind, 0) + buffer.size_bytes
    source = profile.sources.get("context_bytes", profile.id)
    terms = [("context", found.context_bytes, found.context_error_bytes, source)]
    names = {
        "weights": "resident weights",
        "staging": "staging of streamed weights",
        "kv_cache": "KV cache",
        "residual": "residual streams",
        "scratch": "activations of a tile",
    }
    terms += [(names[kind], by_kind[kind], 0, "tensor shapes") for kind in names if kind in by_kind]
    step = found.bytes[index]
    # what lies in the arena without being alive: gaps, and pages not written yet (negative)
    terms.append(("rest of the arena", step.resident - step.live, 0, "layout"))
    if found.card is None:
        terms.append(("kernels' own blocks", step.outside, 0, "measured formulas per kernel"))
        terms.append(("images on the host", found.host[index], 0, "image sizes"))
    else:
        positions = sum(block.size_bytes for block in problem.kept if not block.declared)
        libraries = sum(block.size_bytes for block in problem.kept if block.declared)
        blocks = max(step.outside for step in found.bytes)
        rest = found.card.reserved - step.resident - positions - libraries - blocks
        terms += [
            ("positions on the card", positions, 0, "tensor shapes"),
            (
                "library workspaces",
                libraries,
                found.workspace_error_bytes,
                "torch's CublasHandlePool.cpp by compute capability",
            ),
            (
                "kernels' own blocks",
                blocks,
                found.blocks_error_bytes,
                "formulas that walks of the steps confirm",
            ),
            ("allocator's rounding", rest, 0, "allocator rules"),
        ]
    return tuple(
        MemoryTerm(
            name=name,
            expected_bytes=size,
            error_bytes=error,
            source=source,
        )
        for name, size, error, source in terms
        if size or error or name == "context"
    )


def _phases(problem: Problem, found: Evaluated) -> tuple[PhasePrediction, ...]:
    drafted, card = found.program, found.card
    primed = max(_priming_bytes(drafted, found.outside), _loaded_bytes(drafted))
    result = [
        PhasePrediction(
            phase="load",
            weights_resident_bytes=_loaded_bytes(drafted),
            weights_streamed_bytes=0,
            activations_bytes=0,
            kv_cache_bytes=0,
            staging_bytes=0,
            outside_bytes=0,
            context_bytes=found.context_bytes,
            allocated_peak_bytes=max(card.start_allocated, *card.allocated) if card else primed,
            reserved_peak_bytes=card.reserved if card else primed,
            expected_peak_bytes=found.load_bytes,
            bound_peak_bytes=found.load_bytes + found.error_bytes,
            seconds=problem.start_s(found.choice.tiles) + found.time.load_seconds,
            compute_seconds=0.0,
            copy_seconds=0.0,
        )
    ]
    for phase, time in found.time.phases.items():
        indexes = [i for i, step in enumerate(drafted.steps) if step.phase == phase]
        kinds = {
            kind: _peak_of_kind(found, kind, indexes[0], indexes[-1] + 1)
            for kind in ("weights", "staging", "kv_cache", "residual", "scratch")
        }
        peak = max(found.expected[i] for i in indexes)
        streamed = sum(
            copy.size_bytes
            * (drafted.decode_repeats if copy.phase == "decode" and not copy.once else 1)
            for copy in drafted.copies
            if copy.phase == phase and copy.buffer.startswith("staging/")
        )
        result.append(
            PhasePrediction(
                phase=phase,
                weights_resident_bytes=kinds["weights"],
                weights_streamed_bytes=streamed,
                activations_bytes=kinds["residual"] + kinds["scratch"],
                kv_cache_bytes=kinds["kv_cache"],
                staging_bytes=kinds["staging"],
                outside_bytes=max(found.bytes[i].outside for i in indexes),
                context_bytes=found.context_bytes,
                allocated_peak_bytes=max(
                    card.allocated[i] if card else found.bytes[i].live + found.bytes[i].outside
                    for i in indexes
                ),
                reserved_peak_bytes=max(
                    card.reserved if card else found.bytes[i].resident + found.bytes[i].outside
                    for i in indexes
                ),
                expected_peak_bytes=peak,
                bound_peak_bytes=peak + found.error_bytes,
                seconds=time.seconds,
                compute_seconds=time.compute_seconds,
                copy_seconds=time.copy_seconds,
            )
        )
    return tuple(result)


def _peak_of_kind(found: Evaluated, kind: str, start: int, stop: int) -> int:
    change = [0] * (stop - start + 1)
    for name, spans in found.lifetimes.items():
        buffer = found.program.buffers[name]
        if buffer.kind == kind:
            for birth, death in spans:
                low, high = max(birth, start), min(death, stop)
                if low < high:
                    change[low - start] += buffer.size_bytes
                    change[high - start] -= buffer.size_bytes
    total = peak = 0
    for delta in change:
        total += delta
        peak = max(peak, total)
    return peak
