"""What a plan does to fit, move by move, and what the usual way would need.

A move is a lever in which the plan differs from the usual way (every weight resident from the start, all rows at
once). Its price is the plan beside the same plan with that one lever put back, everything else as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from planner.evaluate import Evaluated, evaluate
from planner.plan.prediction import Move, Variant
from planner.plan.tiles import Tiles
from planner.problem import Problem
from planner.schedule import Choice, PhaseResidency
from planner.variants import evaluate_ordered

WHOLE = 2**30  # rows: a tile as large as anything
USUAL = "the usual way"


def moves(problem: Problem, best: Evaluated) -> tuple[Move, ...]:
    """The moves of a worked-out choice, in the order of a run; those that change neither bytes nor seconds are left out."""
    prefetch_after = {
        copy.unit: copy.after
        for copy in best.program.copies
        if copy.phase == "prefill" and copy.buffer.startswith("weights/")
    }
    found = []
    for name, undone in _undone(problem, best.choice):
        after = prefetch_after if undone.order == "prefetch" else None
        if after and undone.images_together != best.choice.images_together:
            # other steps: residents arrive where they fit beside those
            other = evaluate_ordered(problem, undone, quick=True)
        else:
            other = evaluate(problem, undone, prefetch_after=after, quick=True)
        started = problem.start_s(best.choice.tiles) - problem.start_s(undone.tiles)
        move = Move(
            name=name,
            saved_bytes=other.bound_bytes - best.bound_bytes,
            paid_seconds=best.seconds - other.seconds + started,
        )
        if move.saved_bytes or move.paid_seconds:
            found.append(move)
    return tuple(found)


def usual_choice(problem: Problem) -> Choice:
    """Every weight resident from the start (SUM) and no row tiles."""
    model = problem.model
    tiles = Tiles(
        patch_rows=WHOLE,
        window_rows=WHOLE,
        query_rows=WHOLE,
        query_heads=model.vision.heads,
        vision_mlp_rows=WHOLE,
        merger_rows=WHOLE,
        prompt_rows=WHOLE,
        prompt_heads=model.text.kv_heads,
        prompt_mlp_rows=WHOLE,
        vocabulary_rows=model.text.vocabulary,
    )
    vision = PhaseResidency(model.vision.depth, model.vision.depth)
    text = PhaseResidency(model.text.layers, model.text.layers, 1)
    return Choice("all_first", True, 1, vision, text, text, tiles)


def usual(problem: Problem) -> Variant:
    """What the usual way would need, and whether that fits."""
    found = evaluate(problem, usual_choice(problem), quick=True)
    budget = problem.request.budget_bytes
    return Variant(
        name=USUAL,
        bound_bytes=found.bound_bytes,
        seconds=found.seconds + problem.start_s(found.choice.tiles),
        fits=budget is None or found.bound_bytes <= budget,
        note="all resident from the start, all rows at once",
    )


def _undone(problem: Problem, choice: Choice) -> Iterator[tuple[str, Choice]]:
    """(what the plan does, the choice without it)."""
    images = problem.workload.images
    if images:
        yield from _undone_vision(problem, choice)
    yield from _undone_text(problem, choice)
    if choice.depth == 1 and _streams(problem, choice):
        yield "one staging slot instead of two", replace(choice, depth=2)


def _undone_vision(problem: Problem, choice: Choice) -> Iterator[tuple[str, Choice]]:
    workload, model, tiles = problem.workload, problem.model, choice.tiles
    brought = choice.prefill.attn + choice.prefill.mlp + choice.prefill.head
    if choice.order != "all_first" and brought:
        yield "LLM after the vision tower (MAX)", replace(choice, order="all_first")
    if not choice.images_together and len(workload.images) > 1:
        yield "images one after another", replace(choice, images_together=True)
    vision = PhaseResidency(model.vision.depth, model.vision.depth)
    if choice.vision != vision:
        left = vision.attn + vision.mlp - choice.vision.attn - choice.vision.mlp
        name = f"vision streamed, {left} of {vision.attn + vision.mlp} block halves"
        yield name, replace(choice, vision=vision)
    patches = max(image.patches for image in workload.images)
    if min(tiles.window_rows, tiles.query_rows) < patches or tiles.query_heads < model.vision.heads:
        whole = {
            "window_rows": WHOLE,
            "query_rows": WHOLE,
            "query_heads": model.vision.heads,
        }
        yield "vision attention in tiles", _with_tiles(choice, whole)
    rows = min(tiles.patch_rows, tiles.vision_mlp_rows, 4 * tiles.merger_rows)
    if rows < patches:
        whole = {"patch_rows": WHOLE, "vision_mlp_rows": WHOLE, "merger_rows": WHOLE}
        yield "vision MLP, patches and merger in tiles", _with_tiles(choice, whole)


def _undone_text(problem: Problem, choice: Choice) -> Iterator[tuple[str, Choice]]:
    workload, text, tiles = problem.workload, problem.model.text, choice.tiles
    heads = _heads(problem, tiles.vocabulary_rows)
    full = PhaseResidency(text.layers, text.layers, heads)
    decodes = workload.max_new_tokens > 1
    in_prefill, in_decode = _left(choice.prefill, full), _left(choice.decode, full)
    units = sum((full.attn, full.mlp, full.head))
    if in_prefill and choice.prefill == choice.decode:
        phases = "prefill and decode" if decodes else "prefill"
        name = f"LLM streamed in {phases}, {in_prefill} of {units} units"
        yield name, replace(choice, prefill=full, decode=full)
    else:
        if in_prefill:
            name = f"LLM streamed in prefill, {in_prefill} of {units} units"
            yield name, replace(choice, prefill=choice.decode)
        if in_decode:
            name = f"LLM streamed in decode, {in_decode} of {units} units"
            yield name, replace(choice, decode=full)
    rows = min(tiles.prompt_rows, tiles.prompt_mlp_rows)
    if rows < workload.prompt_tokens or tiles.prompt_heads < text.kv_heads:
        whole = {"prompt_rows": WHOLE, "prompt_heads": text.kv_heads, "prompt_mlp_rows": WHOLE}
        yield "prompt in tiles", _with_tiles(choice, whole)
    size_bytes = text.vocabulary * text.hidden * problem.costs.element
    if heads > 1 and size_bytes <= problem.profile.max_tensor_bytes:
        undone = _with_tiles(choice, {"vocabulary_rows": text.vocabulary})
        prefill = replace(choice.prefill, head=choice.prefill.head // heads)
        decode = replace(choice.decode, head=choice.decode.head // heads)
        yield "vocabulary in tiles", replace(undone, prefill=prefill, decode=decode)


def _with_tiles(choice: Choice, tiles: dict[str, int]) -> Choice:
    return replace(choice, tiles=choice.tiles.model_copy(update=tiles))


def _left(residency: PhaseResidency, full: PhaseResidency) -> int:
    """Units that are not resident."""
    return sum(
        (full.attn - residency.attn, full.mlp - residency.mlp, full.head - residency.head),
    )


def _heads(problem: Problem, vocabulary_rows: int) -> int:
    """Row tiles of lm_head."""
    sizes = problem.unit_sizes(vocabulary_rows)
    return sum(1 for unit in sizes if unit.startswith("text/lm_head["))


def _streams(problem: Problem, choice: Choice) -> bool:
    model = problem.model
    heads = _heads(problem, choice.tiles.vocabulary_rows)
    full = PhaseResidency(model.text.layers, model.text.layers, heads)
    vision = PhaseResidency(model.vision.depth, model.vision.depth)
    return bool(
        _left(choice.prefill, full)
        or _left(choice.decode, full)
        or (problem.workload.images and _left(choice.vision, vision))
    )
