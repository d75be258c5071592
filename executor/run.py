"""The executor's table of contents: from a plan and a request to an answer and a record of what it took."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from executor import memory
from executor.arena import Arena
from executor.cpu import CpuDevice
from executor.device import Device
from executor.finite import check_finite
from executor.generate import Sampling, generator, next_token, seen_mask
from executor.outputs import Outputs
from executor.prepare import (
    Prompt,
    Request,
    Runs,
    call_step,
    check_budget,
    check_free,
    check_kernels,
    check_request,
    distinct_steps,
    make_runs,
    memory_errors,
    open_images,
    prime,
    read_prompt,
    run_of,
    step_key,
)
from executor.prompt import Detokenizer, load_tokenizer
from executor.record import Record, Recorder
from executor.weights import EmbeddingRows, Reader
from planner.plan import Phase, Plan, Step

__all__ = ["Request", "Result", "open_device", "run"]


@dataclass(frozen=True, slots=True)
class Result:
    """The new tokens (a stop token included), their text (empty without a tokenizer), and the record."""

    tokens: tuple[int, ...]
    text: str
    record: Record


def run(plan: Plan, request: Request, device: Device | None = None) -> Result:
    """Run the plan as it stands, on `device` or on one of the request's kind, which is closed at the end.

    Raises the errors of planner.errors; then nothing is left open or half written.
    """
    check_request(plan, request)
    # once, and before the context is measured: a real one holds some 60 MiB
    tokenizer = load_tokenizer(request.tokenizer) if request.tokenizer else None
    prompt = read_prompt(plan, request, tokenizer)
    malloc_fixed = memory.fix_malloc_thresholds()
    sampling = request.sampling or Sampling(repetition_penalty=plan.model.repetition_penalty)
    with ExitStack() as stack:
        stack.enter_context(memory_errors("the run"))
        outputs = Outputs(request.save_outputs) if request.save_outputs else None
        if outputs is not None:
            stack.callback(outputs.drop)  # before it holds anything: an interrupt may come between
            stack.enter_context(outputs)
        device = device or open_device(request)
        stack.enter_context(closing(device))
        recorder = Recorder(device, check=request.check, age_s=request.age_s)
        running = stack.enter_context(ExitStack())
        with recorder.phase("load", arena_bytes=lambda: arena.resident_bytes()):
            check_kernels(plan, device)
            check_free(plan, device)
            arena = Arena(plan, device)
            stack.callback(arena.close)
            shape = (plan.model.text.vocabulary, plan.model.text.hidden)
            embeddings = stack.enter_context(closing(EmbeddingRows(request.locations, shape)))
            with memory_errors("positions and the room for kernels' blocks"):
                runs = make_runs(plan, prompt, device, embeddings)
                device.reserve_outside(max((step.outside_bytes for step in plan.steps), default=0))
            prime(plan, arena, runs, prompt, sampling)
            device.synchronize()
            context_bytes = device.context_bytes()
            check_budget(plan, context_bytes)
            if plan.device.budget_bytes is not None:
                device.cap(plan.device.budget_bytes)
            before = device.held_bytes()
            with memory_errors("images"):
                open_images(request, plan, runs.slots)
            recorder.keep_host("images", max(0, (device.held_bytes() or 0) - (before or 0)))
            reader = Reader(
                plan,
                device,
                request.locations,
                decode_iterations=prompt.iterations,
                # what watches the arena around a step needs the reader to hold still meanwhile
                alone=request.check,
            )
            running.push(reader)  # before its thread begins: an interrupt may come between
            if plan.levers.order == "all_first":
                reader.__enter__()
                reader.begin_step(plan.steps[0])
        if plan.levers.order != "all_first":
            reader.__enter__()
        with running:
            loop = _Loop(
                plan=plan,
                request=request,
                arena=arena,
                reader=reader,
                recorder=recorder,
                runs=runs,
                prompt=prompt,
                sampling=sampling,
                draws=generator(sampling),
                seen=seen_mask(prompt.ids, plan.model.text.vocabulary),
                text=_Text(request.on_token, tokenizer),
                outputs=outputs,
            )
            if request.poison:
                arena.fill_canaries(arena.dead_ranges(0))
            loop.vision()
            loop.prefill()
            loop.decode()
        copies = reader.timings()
        if request.check:
            _watch_outside(plan, device, arena, recorder, runs, prompt)
        notes = (
            ()
            if malloc_fixed
            else ("malloc's thresholds could not be fixed here: peaks are less exact",)
        )
        record = recorder.finish(
            fingerprint=request.fingerprint or plan.model.fingerprint,
            budget_bytes=plan.device.budget_bytes,
            arena_bytes=arena.size_bytes,
            context_bytes=context_bytes,
            prompt_tokens=len(prompt.ids),
            new_tokens=len(loop.tokens),
            copies=copies,
            notes=notes,
        )
    return Result(tuple(loop.tokens), loop.text.whole, record)


def open_device(request: Request) -> Device:
    """The device that the request names; one clear line where it is not there."""
    if request.device == "cuda":
        from executor.cuda import CudaDevice

        return CudaDevice()
    return CpuDevice(limit_data=request.limit_data)


class _Text:
    """The answer as text, where there is a tokenizer, handed on piece by piece."""

    def __init__(self, on_token: Callable[[int, str], None] | None, tokenizer: Any) -> None:
        self._hand_on = on_token
        self.whole = ""
        self._pieces = Detokenizer(tokenizer) if tokenizer is not None else None

    def push(self, token: int) -> None:
        piece = self._pieces.push(token) if self._pieces else ""
        self.whole += piece
        if self._hand_on:
            self._hand_on(token, piece)

    def finish(self, token: int) -> None:
        rest = self._pieces.finish() if self._pieces else ""
        self.whole += rest
        if rest and self._hand_on:
            self._hand_on(token, rest)


@dataclass(slots=True)
class _Loop:
    """The plan's steps in order: vision, prefill, decode until a stop token. `tokens` is the answer so far."""

    plan: Plan
    request: Request
    arena: Arena
    reader: Reader
    recorder: Recorder
    runs: Runs
    prompt: Prompt
    sampling: Sampling
    draws: torch.Generator
    seen: torch.Tensor
    text: _Text
    outputs: Outputs | None
    tokens: list[int] = field(default_factory=list)

    def vision(self) -> None:
        """Encode the images into the prompt's rows."""
        self._phase("vision", 1)
        for slot in self.runs.slots:
            slot.source = None

    def prefill(self) -> None:
        """Run the prompt and draw the first token."""
        self._phase("prefill", 1)

    def decode(self) -> None:
        """Draw the other tokens, one an iteration."""
        if self.prompt.iterations and not self._ended():
            self._phase("decode", self.prompt.iterations)
        self.reader.stop()
        self.text.finish(self.tokens[-1])

    def _phase(self, phase: Phase, iterations: int) -> None:
        steps = [step for step in self.plan.steps if step.phase == phase]
        if not steps:
            return
        recorded = self.recorder.phase(
            phase,
            arena_bytes=self.arena.resident_bytes,
            copied_bytes=lambda: sum(t.size_bytes for t in self.reader.timings().values()),
        )
        with recorded:
            for iteration in range(iterations):
                if iteration and self._ended():
                    break
                for step in steps:
                    self._step(step, iteration)
        after = self.plan.steps.index(steps[-1]) + 1
        if after < len(self.plan.steps):
            self.arena.release(self.arena.dead_ranges(after))

    def _step(self, step: Step, iteration: int) -> None:
        if self.request.on_step:
            self.request.on_step(step.id)
        waited = self.reader.begin_step(step, iteration)
        with self.reader.alone:
            before = self.arena.guard(step) if self.request.check else []
            with self.recorder.step(step.id, step.phase, waited_seconds=waited):
                if step.kind == "sample":
                    with memory_errors(step.id):
                        self._sample(step)
                else:
                    token = self.tokens[-1] if self.tokens else 0
                    call_step(step, run_of(step, self.runs, iteration, token=token), self.arena)
            if self.request.check:
                if step.kind != "sample":
                    self._check_finite(step)
                self.arena.check_canaries(step, before)
            if self.request.poison:
                index = self.plan.steps.index(step)
                if index + 1 < len(self.plan.steps):
                    self.arena.fill_canaries(self.arena.dead_ranges(index + 1))
        self.reader.finish_step(step)
        if step.kind == "patch_embed":
            self.arena.issue(partial(_drop_images, self.runs, step))
            self.recorder.keep_host("images", 0)
        if step.kind == "merger" and self.outputs:
            self._save_features(step)

    def _check_finite(self, step: Step) -> None:
        check_finite(self.plan, step, self.arena, prompt_tokens=len(self.prompt.ids))

    def _sample(self, step: Step) -> None:
        logits = self.arena.views(step)["logits"]
        self.arena.host_waits()
        if self.request.check:
            self._check_finite(step)
        token = next_token(logits, self.seen, self.sampling, self.draws)
        if self.outputs:
            if not self.tokens:
                self.outputs.append("prefill_logits", logits.view(1, -1))
            self.outputs.append("logits", logits.view(1, -1))
            self.outputs.append("tokens", torch.tensor([token]))
        self.seen[token] = True
        self.tokens.append(token)
        self.text.push(token)

    def _save_features(self, step: Step) -> None:
        assert self.outputs is not None
        views = self.arena.views(step)
        self.arena.host_waits()
        x = views.get("prefill/x", views["x"])
        for image in step.images:
            first, rows = self.prompt.image_spans[image]
            self.outputs.append("image_features", x[first : first + rows])

    def _ended(self) -> bool:
        stop = self.plan.model.token_ids.stop if self.request.stop is None else self.request.stop
        return bool(self.tokens) and self.tokens[-1] in stop


def _drop_images(runs: Runs, step: Step) -> None:
    for image in step.images:
        runs.slots[image].source = None


def _watch_outside(
    plan: Plan, device: Device, arena: Arena, recorder: Recorder, runs: Runs, prompt: Prompt
) -> None:
    """Record what the kernels of each distinct step allocate, by running it once more on blank images.

    The answer is out and all peaks are recorded by then, so what the watching itself holds disturbs nothing.
    """
    for slot in runs.slots:
        slot.blank()
    peaks = {}
    for step, step_run in distinct_steps(plan, arena, runs, prompt, priming=False):
        peaks[step_key(step, arena)] = device.allocated_peak(
            partial(call_step, step, step_run, arena)
        )
    for step in plan.steps:
        if step_key(step, arena) in peaks:
            recorder.outside(step.id, peaks[step_key(step, arena)])
