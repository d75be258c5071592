"""The plan that needs least, and the refusal where even that is above the budget: which step, which terms, what to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from planner.assemble import Evaluated, evaluate
from planner.errors import BudgetTooSmall
from planner.fronts import START
from planner.graph import Intervals
from planner.parts import plain_bytes
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
    best: Evaluated | None = None
    settings = sorted(_streamed(space), key=lambda setting: setting[0])
    for number, (bound, choice) in enumerate(settings):
        if best is not None and (bound >= best.bound_bytes or number == TRIED):
            break
        found = evaluate(problem, choice)
        if best is None or found.bound_bytes < best.bound_bytes:
            best = found
    assert best is not None
    return best


def _streamed(space: Space) -> Iterator[tuple[int, Choice]]:
    """Settings with everything streamed through one slot, and at least how many bytes they need; for each peak the tiles for which libraries keep least."""
    problem, nothing = space.problem, PhaseResidency(0, 0)
    seen: set[Choice] = set()
    for together in space.modes:
        for rows in space.vocabulary_rows():
            frames = [space.parts.vision(together, nothing, 1, False)]
            frames.append(space.parts.prefill(nothing, nothing, 1, rows))
            kinds = [
                (frame.base[kind], found)
                for frame, options in zip(
                    frames, (space.vision[together], space.prefill), strict=True
                )
                for kind, found in options.items()
            ]
            for cap in space.caps:
                within = [
                    (base, [o for o in found if o.outside <= cap] or found) for base, found in kinds
                ]
                floor = max(
                    (min(base + o.bytes for o in found) for base, found in within), default=0
                )
                peaks = {base + o.bytes for base, found in within for o in found}
                for peak in sorted({floor, *peaks}):
                    if peak < floor or (peak > floor and not problem.on_cpu):
                        continue
                    tiles: dict[str, int] = {"vocabulary_rows": rows}
                    for base, found in within:
                        fitting = [o for o in found if base + o.bytes <= peak]
                        tiles.update(min(fitting, key=lambda o: (o.kept, o.bytes)).tiles)
                    start = (problem.request.tiles or START).model_copy(update=tiles)
                    choice = Choice(
                        "vision_then_llm", together, 1, nothing, nothing, nothing, start
                    )
                    if choice not in seen:
                        seen.add(choice)
                        live, held = plain_bytes(space.parts, choice)
                        yield space.footprint.bound(choice, live, held), choice


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
        f"  largest step  {step}: {' + '.join(terms)}\n"
        f"  to fit        {'    or  '.join(fitting)}",
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
