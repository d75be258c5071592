"""The plan that needs least, and the refusal where even that is above the budget: which step, which terms, what to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

from planner import smallest_card, smallest_cpu
from planner.errors import BudgetTooSmall
from planner.evaluate import Evaluated, evaluate
from planner.fronts import START
from planner.graph import Intervals
from planner.lines import wrapped
from planner.problem import Problem
from planner.schedule import Choice, PhaseResidency
from planner.space import Space
from planner.units import format_gb_up, format_gib
from planner.workload import plan_image

SHOWN_BYTES = 5 * 2**20 + 2**18  # terms below would read 0.00 GiB
TRIED = 24  # settings worked out, at most, to find the one that needs least
FEWEST_TOKENS = 16  # an answer shorter than this is not suggested


def least_plan(problem: Problem, space: Space | None = None) -> Evaluated:
    """The plan with the least bound: everything streamed through one slot, in tiles of which none needs less.

    Settings are worked out in order of their least bytes by the closed form, until none can need less than the best.
    """
    space = space or Space(problem)
    in_order = smallest_cpu.in_order if problem.on_cpu else smallest_card.in_order
    best: Evaluated | None = None
    for number, (bound, choice) in enumerate(in_order(space, streamed(space))):
        if best is not None and (bound >= best.bound_bytes or number == TRIED):
            break
        found = evaluate(problem, choice)
        if best is None or found.bound_bytes < best.bound_bytes:
            best = found
    assert best is not None
    return best


def streamed(space: Space) -> list[Choice]:
    """Everything streamed through one slot, in each way of handling images and tiling of lm_head."""
    nothing, start = PhaseResidency(0, 0), space.problem.request.tiles or START
    tilings = (start.model_copy(update={"vocabulary_rows": r}) for r in space.vocabulary_rows())
    return [
        Choice("vision_then_llm", together, 1, nothing, nothing, nothing, tiles)
        for together, tiles in product(space.modes, tilings)
    ]


def certificate(problem: Problem, smallest: Evaluated) -> BudgetTooSmall:
    """The refusal: the step at the peak of the smallest plan, its terms, and changes each of which makes the request fit."""
    budget = problem.request.budget_bytes
    assert budget is not None
    index = smallest.peak_index
    step = smallest.program.steps[index].id
    parts: dict[str, int] = {}
    for name, spans in smallest.lifetimes.items():
        if _alive(spans, index):
            kind = smallest.program.buffers[name].kind
            parts[kind] = parts.get(kind, 0) + smallest.program.buffers[name].size_bytes
    if smallest.load_bytes > max(smallest.expected):
        step, parts = "load", {}
    words = {
        "staging": "staging",
        "weights": "weights",
        "scratch": "activations",
        "residual": "residual streams",
        "kv_cache": "KV cache",
    }
    shown = {k: parts[k] for k in words if parts.get(k, 0) >= SHOWN_BYTES}
    terms = [f"{words[kind]} {format_gib(size)[:-4]}" for kind, size in shown.items()]
    rest = smallest.bound_bytes - sum(shown.values())
    terms.append(f"context and reserved {format_gib(rest)}")
    fitting = [
        f"--vram {format_gb_up(smallest.bound_bytes)}",
        *_fewer_pixels(problem, budget),
        *_fewer_tokens(problem, budget),
    ]
    return BudgetTooSmall(
        f"no plan fits {format_gib(budget)}: the smallest needs {format_gib(smallest.bound_bytes)}\n"
        + wrapped(f"{step}: {' + '.join(terms)}", "  largest step  ", " " * 16)
        + "\n"
        + wrapped(" or ".join(fitting), "  to fit        ", " " * 16),
        smallest_bytes=smallest.bound_bytes,
    )


def _fewer_pixels(problem: Problem, budget: int) -> list[str]:
    """`--max-pixels N`, the largest halving of the largest image at which a plan fits; nothing where none does."""
    workload, vision = problem.workload, problem.model.vision
    if not workload.images:
        return []
    token_px = (vision.patch_px * vision.merge) ** 2  # pixels of one image token
    pixels = max(image.width_px * image.height_px for image in workload.images)
    while (pixels := pixels // 2 // token_px * token_px) >= max(workload.min_pixels, token_px):
        images = tuple(
            plan_image(
                image.name,
                image.source_width_px,
                image.source_height_px,
                min_pixels=workload.min_pixels,
                max_pixels=pixels,
                patch_px=vision.patch_px,
                merge=vision.merge,
                window_px=vision.window_px,
            )
            for image in workload.images
        )
        saved = sum(image.tokens for image in workload.images) - sum(i.tokens for i in images)
        if _would_fit(
            problem,
            budget,
            {"images": images, "max_pixels": pixels},
            workload.prompt_tokens - saved,
            workload.max_new_tokens,
        ):
            return [f"--max-pixels {pixels}"]
    return []


def _fewer_tokens(problem: Problem, budget: int) -> list[str]:
    """`--max-new-tokens N`, the largest halving at which a plan fits; nothing where none does."""
    workload = problem.workload
    tokens = workload.max_new_tokens
    while (tokens := tokens // 2) >= FEWEST_TOKENS:
        changed = {"max_new_tokens": tokens}
        if _would_fit(problem, budget, changed, workload.prompt_tokens, tokens):
            return [f"--max-new-tokens {tokens}"]
    return []


def _would_fit(
    problem: Problem,
    budget: int,
    changed: Mapping[str, object],
    prompt_tokens: int,
    max_new_tokens: int,
) -> bool:
    """Whether a plan fits for this changed workload; a capacity that was no more than needed shrinks with the need."""
    workload = problem.workload
    context = workload.context_tokens
    if context == workload.prompt_tokens + workload.max_new_tokens:
        context = prompt_tokens + max_new_tokens
    asked = workload.model_copy(
        update={**changed, "prompt_tokens": prompt_tokens, "context_tokens": context}
    )
    request = replace(problem.request, workload=asked)
    return least_plan(Problem(request, problem.profile)).bound_bytes <= budget


def _alive(spans: Intervals, index: int) -> bool:
    return any(birth <= index < death for birth, death in spans)
