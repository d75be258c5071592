"""A plan's steps in order, one phase after another, each recorded; and the answer as it comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from executor.arena import Arena
from executor.device import Device
from executor.finite import check_finite
from executor.generate import Sampling, next_token
from executor.outputs import Outputs
from executor.prepare import (
    Prompt,
    Request,
    Runs,
    call_step,
    distinct_steps,
    memory_errors,
    run_of,
    step_key,
)
from executor.prompt import Detokenizer
from executor.record import Recorder
from executor.weights import Reader
from planner.plan import Plan
from planner.plan.program import Step
from planner.plan.words import Phase


class AnswerText:
    """The answer as text, where there is a tokenizer, handed on piece by piece."""

    def __init__(self, on_token: Callable[[int, str], None] | None, tokenizer: Any) -> None:
        self._hand_on = on_token
        self.whole = ""
        self._pieces = Detokenizer(tokenizer) if tokenizer is not None else None

    def push(self, token: int) -> None:
        """Take one more token, and hand on what became whole with it."""
        piece = self._pieces.push(token) if self._pieces else ""
        self.whole += piece
        if self._hand_on:
            self._hand_on(token, piece)

    def finish(self, token: int) -> None:
        """Hand on what is left, with the last token."""
        rest = self._pieces.finish() if self._pieces else ""
        self.whole += rest
        if rest and self._hand_on:
            self._hand_on(token, rest)


@dataclass(slots=True)
class Loop:
    """The plan's steps from number `first` on, in order: vision, prefill, decode until a stop token. `tokens` is the answer so far.

    copies_add: they add to what the device holds, and somebody tells how much. Then copies that come after a phase's
    last step, which the plan counts to the next phase, are let go when this one's record is closed and what is dead has
    been given back.
    """

    plan: Plan
    request: Request
    first: int
    arena: Arena
    reader: Reader
    recorder: Recorder
    runs: Runs
    prompt: Prompt
    sampling: Sampling
    draws: torch.Generator
    seen: torch.Tensor
    text: AnswerText
    outputs: Outputs | None
    copies_add: bool
    tokens: list[int] = field(default_factory=list)
    # of the phase under way: its last step, none where no phase follows, and the bytes copied before that let more go
    last: Step | None = None
    copied_bytes: int | None = None

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
        steps = [step for step in self.plan.steps[self.first :] if step.phase == phase]
        if not steps:
            return
        self.last, self.copied_bytes = None if phase == "decode" else steps[-1], None
        recorded = self.recorder.phase(
            phase, arena_bytes=self.arena.resident_bytes, copied_bytes=self._copied_bytes
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
        # only now: pages that are to go must not count beside those that these bring (28 ms for each GiB)
        if self.last is not None and self.copies_add:
            self.reader.finish_step(self.last)

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
        if step is not self.last:
            self.reader.finish_step(step)
        elif not self.copies_add:
            self.copied_bytes = self._copied_bytes()
            self.reader.finish_step(step)
        if step.kind == "patch_embed":
            self.arena.issue(partial(_drop_images, self.runs, step))
            self.recorder.keep_host("images", 0)
        if step.kind == "merger" and self.outputs:
            self._save_features(step)

    def _copied_bytes(self) -> int:
        """Of all copies so far; once the phase's last step has let more go, of those before."""
        if self.copied_bytes is not None:
            return self.copied_bytes
        return self.reader.copied_bytes()

    def _check_finite(self, step: Step) -> None:
        # a further question's rows begin where the images end
        rows = len(self.prompt.ids) - self.runs.prefill.start
        check_finite(self.plan, step, self.arena, prompt_tokens=rows)

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


def watch_outside(
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
