"""The executor's way through every distinct step and tile of a plan, on a card that is not there."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from tests.fake_cuda.card import FakeCard
from tests.fake_cuda.trace import Block, Trace


@dataclass
class Walk:
    """What the executor allocated: `kept` from its start to its end, `steps` by the id of each distinct step."""

    arena_bytes: int
    kept: tuple[int, ...]
    steps: dict[str, list[tuple[Block, ...]]]  # by priming, then over all tiles where asked for
    reserved_bytes: int
    allocated_peak_bytes: int
    complaints: tuple[str, ...]
    seconds: float


def prompt_ids(plan: Any) -> list[int]:
    """Ids of a prompt as long as the plan has room for, with its images in it."""
    ids = plan.model.token_ids
    found = [1]
    for image in plan.workload.images:
        found += [ids.vision_start, *[ids.image] * image.tokens, ids.vision_end]
    return found + [1] * (plan.workload.prompt_tokens - len(found))


def _key(plan: Any, step: Any, arena: Any) -> Any:
    """Equal for steps that allocate alike, of whatever plan."""
    images = tuple((i.rows, i.cols) for i in (plan.workload.images[n] for n in step.images))
    decode = step.phase == "decode"
    tokens = (plan.workload.prompt_tokens, plan.workload.context_tokens)
    shapes = tuple(tuple(t.shape) for t in (arena.weights(step) | arena.views(step)).values())
    parts = (step.kind, decode, plan.model.dtype, step.kernel, plan.levers.tiles)
    return (*parts, images, tokens, shapes)


def scratch_bytes(plan: Any) -> int:
    """What the executor makes room for at the start."""
    return max(step.outside_bytes for step in plan.steps)


def walk(
    plan: Any, card: FakeCard, *, whole: bool = False, known: dict[Any, Trace] | None = None
) -> Walk:
    """Go the executor's way from its start through every distinct step and tile once, on a card of the plan's kind.

    That is what priming does, over few keys; `whole` goes through all tiles of every distinct step once more. Steps
    that are in `known` (equal kind, shapes, kernel and tiles) are not run again, their blocks are.
    """
    known = {} if known is None else known
    import gc
    import time

    from executor.arena import Arena
    from executor.cuda import CudaDevice
    from executor.generate import Sampling, next_token, seen_mask
    from executor.prepare import (
        Request,
        call_step,
        check_kernels,
        distinct_steps,
        make_runs,
        read_prompt,
    )

    begun = time.perf_counter()
    ids = prompt_ids(plan)
    prompt = read_prompt(plan, Request(locations={}, prompt=ids))

    def embeddings(wanted: Sequence[int], out: Tensor) -> None:
        # as weights.EmbeddingRows: rows lie together on the host, then go over in one piece
        for start in range(0, len(wanted), 256):
            rows = out[start : start + 256]
            rows.copy_(torch.empty(rows.shape, dtype=rows.dtype))

    gc.collect()
    gc.disable()  # cycles would keep storages beyond their last reference; there must be none
    steps: dict[str, list[tuple[Block, ...]]] = {}
    try:
        with card.installed():
            device = CudaDevice()
            check_kernels(plan, device)
            arena = Arena(plan, device)
            runs = make_runs(plan, prompt, device, embeddings)  # type: ignore[arg-type]
            device.reserve_outside(scratch_bytes(plan))
            start = card.trace
            kept = [n for n in range(len(start.sizes)) if n not in start.deaths]
            for priming in (True, False) if whole else (True,):
                for step, run in distinct_steps(plan, arena, runs, prompt, priming=priming):
                    key = (_key(plan, step, arena), priming)
                    if key in known:
                        card.again(known[key])
                    else:
                        card.trace = known[key] = Trace()
                        call_step(step, run, arena)
                    steps.setdefault(step.id, []).append(known[key].blocks())
            device.synchronize()
            card.trace = Trace()
            for step in plan.steps:
                if step.kind == "sample":
                    logits = arena.views(step)["logits"]
                    with contextlib.suppress(DataDependentOutputException):
                        next_token(logits, seen_mask((), plan.model.text.vocabulary), Sampling())
                    steps[step.id] = [card.trace.blocks()]
            found = Walk(
                arena_bytes=start.sizes[kept[0]],
                kept=tuple(start.sizes[n] for n in kept[1:]),
                steps=steps,
                reserved_bytes=card.allocator.reserved_bytes,
                allocated_peak_bytes=card.allocated_peak,
                complaints=tuple(card.complaints),
                seconds=time.perf_counter() - begun,
            )
            del runs, run
            arena.close()
            device.close()
    finally:
        gc.enable()
    return found
