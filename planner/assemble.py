"""The Plan that comes of one setting of the levers, worked out."""

from __future__ import annotations

from planner.again import shares_cache, with_further
from planner.checkpoint.template import units
from planner.evaluate import (
    Draft,
    Evaluated,
    loaded_bytes,
    pixel_buffers,
    priming_bytes,
    work_out,
)
from planner.plan import DeviceTerms, Levers, Plan, Residency
from planner.plan.prediction import MemoryTerm, Move, PhasePrediction, Prediction, Variant
from planner.plan.program import Buffer, Copy, HostUnit, Step
from planner.plan.shapes import Unit
from planner.problem import Problem
from planner.schedule import Choice, Program, resident_units


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
    primed = max(priming_bytes(drafted, found.outside), loaded_bytes(drafted))
    result = [
        PhasePrediction(
            phase="load",
            weights_resident_bytes=loaded_bytes(drafted),
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
