"""The orders of phases a choice can run in, and the same request with ideas off, to compare a plan with."""

from __future__ import annotations

from dataclasses import replace

from planner.evaluate import Evaluated, evaluate, program_of
from planner.graph import lifetimes_of, live_bytes
from planner.plan.prediction import Variant
from planner.plan.words import Order
from planner.problem import Problem
from planner.schedule import Choice, PhaseResidency
from planner.worked import early_starts


def evaluate_ordered(problem: Problem, choice: Choice, *, quick: bool = False) -> Evaluated:
    """Any setting worked out; under `prefetch` in the bytes that the plain order leaves free."""
    after = _early(problem, choice) if choice.order == "prefetch" else None
    return evaluate(problem, choice, prefetch_after=after, quick=quick)


def _early(problem: Problem, choice: Choice) -> dict[str, int]:
    """After which step each LLM resident arrives under `prefetch`: as early as its bytes are free until its death, under the peak that the plain order has anyway."""
    plain = program_of(problem, replace(choice, order="vision_then_llm"))
    sizes = {name: buffer.size_bytes for name, buffer in plain.buffers.items()}
    live = live_bytes(lifetimes_of(plain), sizes, len(plain.steps))
    early = sorted(
        (
            copy
            for copy in plain.copies
            if copy.phase == "prefill" and copy.buffer.startswith("weights/")
        ),
        key=lambda copy: copy.need,
    )
    room = max(live) - choice.spare_bytes
    free = [room - held for held in live[: plain.starts["prefill"]]]
    starts = early_starts(free, [copy.size_bytes for copy in early])
    return {copy.unit: start - 1 for copy, start in zip(early, starts, strict=True)}


def variants(problem: Problem, best: Evaluated) -> tuple[Variant, ...]:
    """The same request with each idea off, and all off."""
    if not problem.workload.images:
        return ()
    choice, model = best.choice, problem.model
    depth, layers = model.vision.depth, model.text.layers
    sizes = problem.unit_sizes(choice.tiles.vocabulary_rows)
    heads = sum(1 for unit in sizes if unit.startswith("text/lm_head["))
    vision = PhaseResidency(depth, depth)
    text = PhaseResidency(layers, layers, heads)
    untiled = choice.tiles.model_copy(
        update={
            "window_rows": 2**30,
            "query_rows": 2**30,
            "query_heads": model.vision.heads,
            "prompt_rows": 2**30,
            "prompt_heads": model.text.kv_heads,
        }
    )
    order: Order = "all_first"
    settings = [
        (
            "LLM beside the vision tower (SUM)",
            replace(choice, order=order, prefill=text, decode=text),
            "LLM weights first",
        ),
        (
            "vision weights resident",
            replace(choice, vision=vision),
            "the tower whole",
        ),
        (
            "attention untiled",
            replace(choice, tiles=untiled),
            "one call, no scores",
        ),
        (
            "all three off",
            replace(choice, order=order, vision=vision, prefill=text, decode=text, tiles=untiled),
            "",
        ),
    ]
    budget = problem.request.budget_bytes
    result = []
    for name, setting, note in settings:
        same = setting == choice
        found = best if same else evaluate_ordered(problem, setting, quick=True)
        result.append(
            Variant(
                name=name,
                bound_bytes=found.bound_bytes,
                seconds=found.seconds + problem.start_s(found.choice.tiles),
                fits=budget is None or found.bound_bytes <= budget,
                note="as in this plan" if same else note,
            )
        )
    return tuple(result)
