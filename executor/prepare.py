"""Everything between a request and its first weight: checks, what the steps need to know, priming, the last refusal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from executor import cuda_errors, memory, text, vision
from executor.arena import TORCH_DTYPES, Arena, check_places
from executor.attention import check_kernel
from executor.counts import check_counts
from executor.cuda_settings import check_effective, check_settings
from executor.device import Device
from executor.generate import Sampling, generator, next_token, seen_mask
from executor.image import Pixels, PixelSource, open_image, patch_positions, window_order
from executor.order import check_order
from executor.prompt import build_prompt, positions
from executor.rounds import Round
from executor.text import TextRun, text_frequencies
from executor.vision import VisionRun, vision_frequencies
from executor.weights import EmbeddingRows, pieces
from planner.errors import (
    CheckpointError,
    DoesNotFit,
    InputError,
    LessIsFree,
    OutOfMemory,
    PlanFileError,
)
from planner.plan import Plan
from planner.plan.program import Step
from planner.plan.shapes import Image, TensorLocation, Unit
from planner.plan.words import Kernel, Phase
from planner.units import MIB, format_gb_up, format_gib

STEPS: dict[str, Callable[..., None]] = {
    "patch_embed": vision.patch_embed,
    "window_attn": vision.window_attn,
    "full_attn": vision.full_attn,
    "vision_mlp": vision.vision_mlp,
    "merger": vision.merger,
    "embed_tokens": text.embed_tokens,
    "self_attn": text.self_attn,
    "text_mlp": text.text_mlp,
    "norm": text.norm,
    "lm_head": text.lm_head,
}


@dataclass(frozen=True, slots=True)
class Request:
    """What to run a plan on.

    images: a file or a source of patch rows for each image of the plan. prompt: ids, or text with `tokenizer` (a
    checkpoint folder or tokenizer.json). max_new_tokens and stop: None means as the plan has them. fingerprint: the
    checkpoint's, compared with the plan's where given. on_token gets (id, text that became whole); on_step gets each
    step's id before it runs. check: watch every step's peak and writes, and what kernels allocate (slower). poison:
    fill dead ranges with NaN (tests). limit_data: a hard limit on the CPU at the plan's budget. age_s: seconds the process took
    to come this far, counted as part of `load`.
    """

    locations: Mapping[str, TensorLocation]
    images: Sequence[Path | Pixels] = ()
    prompt: Sequence[int] | str = ()
    tokenizer: Path | None = None
    max_new_tokens: int | None = None
    sampling: Sampling | None = None
    stop: tuple[int, ...] | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    fingerprint: str | None = None
    on_token: Callable[[int, str], None] | None = None
    on_step: Callable[[str], None] | None = None
    save_outputs: Path | None = None
    check: bool = False
    poison: bool = False
    limit_data: bool = False
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt's ids, where images lie in it, positions of it and of all new tokens, and how many iterations decode has."""

    ids: tuple[int, ...]
    image_spans: tuple[tuple[int, int], ...]
    positions: Tensor  # int64 (3, S + iterations)
    iterations: int


class PixelSlot:
    """Where patch_embed finds an image's rows: a blank of the right size while priming, then the image, then nothing."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.source: Pixels | None = None
        self.blank()

    def blank(self) -> None:
        # one pixel seen everywhere: an array of zeros may be taken from freed heap, and cleared
        pixel = np.zeros((1, 1, 3), dtype=np.uint8)
        array = np.broadcast_to(pixel, (self.image.height_px, self.image.width_px, 3))
        self.source = PixelSource(array, self.image)

    def rows(self, start: int, stop: int, out: Tensor) -> None:
        assert self.source is not None, "an image is dropped after its last patch_embed"
        self.source.rows(start, stop, out)


@dataclass(frozen=True, slots=True)
class Runs:
    """What the step functions get beside weights and views."""

    vision: VisionRun
    prefill: TextRun
    slots: tuple[PixelSlot, ...]
    prompt_tokens: int

    def decode(self, token: int, iteration: int) -> TextRun:
        """For the token that iteration `iteration` puts in."""
        start = self.prompt_tokens + iteration
        return replace(self.prefill, ids=[token], start=start, image_spans=(), last=None)


# --- checks -------------------------------------------------------------------------------------------------------


def check_request(plan: Plan, request: Request) -> None:
    """Nothing, if plan, checkpoint and request belong together as far as can be told without loading anything."""
    check_counts(plan)
    check_places(plan)
    check_order(plan)
    if plan.device.kind != request.device:
        raise PlanFileError(
            f"the plan is for {plan.device.kind} ({plan.device.profile}), the run for {request.device}; "
            f"run with --device {plan.device.kind} or make a plan for the other"
        )
    if plan.device.kind == "cuda":
        check_settings(plan.device, os.environ)
    if request.fingerprint is not None and request.fingerprint != plan.model.fingerprint:
        raise PlanFileError(
            f"the plan is for {plan.model.name} ({plan.model.fingerprint[:12]}), the checkpoint is another one "
            f"({request.fingerprint[:12]}); make the plan anew with --model and this checkpoint"
        )
    buffers = {buffer.name: buffer for buffer in plan.buffers}
    units = {unit.id: unit for unit in plan.units}
    for copy in plan.copies:
        pieces(units[copy.unit], buffers[copy.buffer], request.locations)
        _check_dtypes(plan, units[copy.unit], request.locations)
    check_images(plan, request)


def _check_dtypes(plan: Plan, unit: Unit, locations: Mapping[str, TensorLocation]) -> None:
    wanted = plan.model.stored_dtype
    for tensor in unit.tensors:
        found = locations[tensor.name].dtype
        if found != wanted:
            raise CheckpointError(
                f"{tensor.name}: the plan wants it stored in {wanted}, the checkpoint has it in {found}; "
                "plan for this checkpoint"
            )


def check_images(plan: Plan, request: Request) -> None:
    """Nothing, if the request has the plan's number of images and its files are there; InputError if not."""
    if len(request.images) != len(plan.workload.images):
        raise InputError(
            f"the plan is for {len(plan.workload.images)} images, found {len(request.images)}; "
            "give the images that the plan was made for"
        )
    for path in request.images:
        # os.path, not Path: a name that no file can have is no file
        if isinstance(path, Path) and not os.path.isfile(path):
            raise InputError(f"{path}: no such image file")


def read_prompt(plan: Plan, request: Request, tokenizer: Any = None) -> Prompt:
    """The request's prompt as ids and positions, if the plan has room for it; InputError with the numbers if not."""
    workload, token_ids = plan.workload, plan.model.token_ids
    if isinstance(request.prompt, str):
        if tokenizer is None:
            raise InputError(
                "a prompt as text needs the checkpoint's tokenizer.json; give it, or ids instead"
            )
        ids = build_prompt(tokenizer, request.prompt, workload.images, token_ids)
    else:
        ids = list(request.prompt)
    if not ids:
        raise InputError("the prompt is empty")
    vocabulary = plan.model.text.vocabulary
    wrong = [token for token in ids if not 0 <= token < vocabulary]
    if wrong:
        raise InputError(
            f"prompt: token id {wrong[0]} is not below the model's vocabulary of {vocabulary}"
        )
    if len(ids) > workload.prompt_tokens:
        raise InputError(
            f"the prompt has {len(ids)} tokens, the plan room for {workload.prompt_tokens}; "
            f"shorten it, or plan with --prompt-tokens for {len(ids) - workload.prompt_tokens} more"
        )
    asked = request.max_new_tokens
    new_tokens = workload.max_new_tokens if asked is None else asked
    if new_tokens < 1:
        raise InputError(f"max-new-tokens: wanted 1 or more, found {new_tokens}")
    if new_tokens > workload.max_new_tokens:
        raise InputError(
            f"max-new-tokens: {new_tokens} asked for, the plan has room for {workload.max_new_tokens}; "
            f"plan with --max-new-tokens {new_tokens}"
        )
    iterations = min(new_tokens - 1, plan.decode_repeats)
    found, delta = positions(ids, workload.images, token_ids)
    later = np.arange(len(ids), len(ids) + iterations) + delta
    every = np.concatenate((found, np.broadcast_to(later, (3, iterations))), axis=1)
    return Prompt(tuple(ids), _image_spans(ids, plan), torch.from_numpy(every), iterations)


def check_kernels(plan: Plan, device: Device) -> None:
    """Nothing, if the device runs every attention kernel of the plan for its shapes; KernelRefused if not.

    On a card the settings in effect are looked at too, whoever made them.
    """
    if plan.device.kind == "cuda" and device.kind == "cuda":
        check_effective(plan.device)
    tiles, tower, language = plan.levers.tiles, plan.model.vision, plan.model.text
    patches = max((image.patches for image in plan.workload.images), default=0)
    window = max((run.rows for image in plan.workload.images for run in image.windows), default=0)
    prompt = plan.workload.prompt_tokens
    # by kind: heads, kv_heads, head_dim, rows, keys, causal
    shapes = {
        "window_attn": (tower.heads, tower.heads, tower.head_dim, window, window, False),
        "full_attn": (
            min(tiles.query_heads, tower.heads),
            min(tiles.query_heads, tower.heads),
            tower.head_dim,
            min(tiles.query_rows, patches),
            patches,
            False,
        ),
        "self_attn": (
            language.heads,
            language.kv_heads,
            language.head_dim,
            min(tiles.prompt_rows, prompt),
            min(tiles.prompt_rows, prompt),
            True,
        ),
    }
    for kernel, kind in sorted({(s.kernel, s.kind) for s in plan.steps if s.kernel}):
        heads, kv_heads, head_dim, rows, keys, causal = shapes[kind]
        check_kernel(
            kernel,
            device=device.torch_device,
            dtype=TORCH_DTYPES[plan.model.dtype],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rows=rows,
            keys=keys,
            causal=causal,
        )


def check_budget(plan: Plan, context_bytes: int | None) -> None:
    """Nothing, if the plan's peak with the context as measured here is within the budget; DoesNotFit with the numbers if not."""
    budget = plan.device.budget_bytes
    if budget is None or context_bytes is None:
        return
    expected = plan.prediction.expected_peak_bytes - plan.device.context_bytes + context_bytes
    if expected > budget:
        raise DoesNotFit(
            f"the plan does not fit any more: it needs {format_gib(expected)} of a budget of {format_gib(budget)}\n"
            f"  context  {format_gib(context_bytes)} measured here, {format_gib(plan.device.context_bytes)} in the plan\n"
            f"  to fit   plan anew with --vram {format_gb_up(expected)}"
        )


def check_free(plan: Plan, device: Device) -> None:
    """Nothing, if the device can give what the plan will take beyond what this process holds; LessIsFree with the numbers if not."""
    free, held = device.free_bytes(), device.held_bytes()
    if free is None:
        return
    # where others are counted in (a card without NVML), what is held is not above the plan's context
    holds = min(plan.device.context_bytes if held is None else held, plan.device.context_bytes)
    needed = plan.prediction.expected_peak_bytes - holds
    if needed > free:
        budget = holds + free
        raise LessIsFree(
            f"the plan does not fit any more: it needs {format_gib(needed)} beyond what this process holds, "
            f"{format_gib(free)} is free on the {device.kind} now\n"
            f"  to fit   close what holds the rest, plan anew with --vram {budget // MIB}MiB, or run with --replan",
            budget_bytes=budget,
        )


# --- what steps need ----------------------------------------------------------------------------------------------


def make_runs(plan: Plan, prompt: Prompt, device: Device, embeddings: EmbeddingRows) -> Runs:
    """Positions, orders and frequencies on the device; images are still blank."""
    where = device.torch_device
    images = plan.workload.images
    slots = tuple(PixelSlot(image) for image in images)
    window = plan.model.vision.window_px // plan.model.vision.patch_px
    places = [patch_positions(image, window=window) for image in images]
    vision_run = VisionRun(
        shape=plan.model,
        tiles=plan.levers.tiles,
        images=images,
        pixels=slots,
        positions=tuple(
            (torch.from_numpy(rows).to(where), torch.from_numpy(cols).to(where))
            for rows, cols in places
        ),
        unit_order=tuple(
            torch.from_numpy(window_order(image, window=window)).to(where) for image in images
        ),
        image_token_rows=tuple(first for first, _ in prompt.image_spans),
        kernel=_kernel(plan, ("vision",)),
        frequencies=vision_frequencies(plan.model.vision, device=where),
    )
    prefill = TextRun(
        shape=plan.model,
        tiles=plan.levers.tiles,
        ids=prompt.ids,
        start=0,
        positions=prompt.positions.to(where),
        image_spans=prompt.image_spans,
        read_embeddings=embeddings,
        kernel=_kernel(plan, ("prefill", "decode")),
        frequencies=text_frequencies(plan.model.text, device=where),
    )
    return Runs(vision_run, prefill, slots, len(prompt.ids))


def padded(plan: Plan, prompt: Prompt) -> Prompt:
    """The prompt with as many ids and positions as the plan has, so that every request of a session has the same shapes.

    What is added stands behind the prompt's last row, where no row of the prompt sees it, and the answer writes over it.
    """
    ids = prompt.ids + prompt.ids[-1:] * (plan.workload.prompt_tokens - len(prompt.ids))
    positions = prompt.positions
    more = plan.workload.prompt_tokens + plan.decode_repeats - positions.shape[1]
    rest = positions[:, -1:].expand(3, more)
    return replace(prompt, ids=ids, positions=torch.cat((positions, rest), dim=1))


def next_runs(runs: Runs, plan: Plan, prompt: Prompt, round_: Round) -> Runs:
    """What the steps of a session's next request get; positions go where those of the first lie."""
    full = padded(plan, prompt)
    with torch.inference_mode():
        runs.prefill.positions.copy_(full.positions)
    ids = full.ids + full.ids[-1:] * (round_.start + round_.rows - len(full.ids))
    tiles = plan.levers.tiles
    if round_.tile is not None:
        size = {"prompt_rows": round_.tile, "prompt_mlp_rows": round_.tile}
        tiles = tiles.model_copy(update=size)
    prefill = replace(
        runs.prefill,
        tiles=tiles,
        ids=ids[round_.start : round_.start + round_.rows],
        start=round_.start,
        image_spans=() if round_.start else prompt.image_spans,
        last=len(prompt.ids) - 1 - round_.start,
    )
    spans = tuple(first for first, _ in prompt.image_spans)
    tower = replace(runs.vision, image_token_rows=spans)
    return Runs(tower, prefill, runs.slots, len(prompt.ids))


def open_images(request: Request, plan: Plan, slots: Sequence[PixelSlot]) -> None:
    """Put the request's images in their slots, decoding and resizing those that are files."""
    for slot, given, image in zip(slots, request.images, plan.workload.images, strict=True):
        slot.source = open_image(given, image) if isinstance(given, Path) else given


# --- priming ------------------------------------------------------------------------------------------------------


def prime(plan: Plan, arena: Arena, runs: Runs, prompt: Prompt, sampling: Sampling) -> None:
    """Run one tile of every distinct shape of every step on the zeroed arena, so that what libraries keep is kept now.

    oneDNN keeps code for each shape it multiplies, 1 to 3 MiB; without this it would show up in the phases.
    The arena's pages are given back after each step.
    """
    for step, run in distinct_steps(plan, arena, runs, prompt, priming=True):
        call_step(step, run, arena)
        arena.release([(0, arena.size_bytes)])
    vocabulary = plan.model.text.vocabulary
    blank = torch.zeros(vocabulary, dtype=TORCH_DTYPES[plan.model.dtype])
    next_token(blank, seen_mask(prompt.ids, vocabulary), sampling, generator(sampling))
    del blank
    memory.malloc_trim()


def distinct_steps(
    plan: Plan, arena: Arena, runs: Runs, prompt: Prompt, *, priming: bool
) -> Iterator[tuple[Step, VisionRun | TextRun]]:
    """One step of each kind, phase, images and weight shapes, with what it would run on; sampling is left out."""
    seen = set()
    for step in plan.steps:
        if step.kind == "sample" or (step.phase == "decode" and not prompt.iterations):
            continue
        key = step_key(step, arena)
        if key in seen:
            continue
        seen.add(key)
        yield step, run_of(step, runs, prompt.iterations - 1, priming=priming)


def step_key(step: Step, arena: Arena) -> tuple[object, ...]:
    """Equal for steps that run the same kernels on the same shapes."""
    return step.phase, step.kind, step.images, arena.weight_shapes(step)


def run_of(
    step: Step, runs: Runs, iteration: int, *, token: int = 0, priming: bool = False
) -> VisionRun | TextRun:
    """What the step runs on in this iteration."""
    if step.phase == "vision":
        return replace(runs.vision, priming=True) if priming else runs.vision
    run = runs.prefill if step.phase == "prefill" else runs.decode(token, iteration)
    return replace(run, priming=True) if priming else run


def call_step(step: Step, run: VisionRun | TextRun, arena: Arena) -> None:
    """Issue the step's function; OutOfMemory names the step where memory is refused."""
    weights, views = arena.weights(step), arena.views(step)

    def call() -> None:
        with memory_errors(step.id), torch.inference_mode():
            STEPS[step.kind](run, step, weights, views)

    arena.issue(call)


# c10/core/impl/alloc_cpu.cpp, newer versions raise the same text; C++; CPython's _threadmodule.c
_REFUSED = ("DefaultCPUAllocator", "bad_alloc", "can't start new thread")


@contextmanager
def memory_errors(where: str) -> Iterator[None]:
    """Turn what torch and Python raise for want of memory into OutOfMemory, and a card's failures into RunFailed."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemory(f"{where}: memory was refused: {_first_line(error)}") from None
    except RuntimeError as error:
        card = cuda_errors.typed(where, error)
        if card is not None:
            raise card from None
        if not any(words in str(error) for words in _REFUSED):
            raise
        raise OutOfMemory(f"{where}: memory was refused: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no more is known"])[0]


def _kernel(plan: Plan, phases: tuple[Phase, ...]) -> Kernel:
    kernels = {step.kernel for step in plan.steps if step.phase in phases and step.kernel}
    if len(kernels) > 1:
        raise PlanFileError(
            f"the plan names {len(kernels)} attention kernels in {' and '.join(phases)}, a run takes one; make it anew"
        )
    return kernels.pop() if kernels else "cpu_flash"


def _image_spans(ids: Sequence[int], plan: Plan) -> tuple[tuple[int, int], ...]:
    """(first row, rows) of each image's tokens; images may follow one another without a token between."""
    image = plan.model.token_ids.image
    spans: list[tuple[int, int]] = []
    row, wanted = 0, list(plan.workload.images)
    for is_image, group in groupby(ids, key=lambda token: token == image):
        length = sum(1 for _ in group)
        at = row
        while is_image and at < row + length and wanted:
            tokens = wanted.pop(0).tokens
            spans.append((at, tokens))
            at += tokens
        row += length
    return tuple(spans)
