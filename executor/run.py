"""The executor's table of contents: from a plan and a request to an answer and a record of what it took."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import ref

from executor import memory
from executor.arena import Arena
from executor.cpu import CpuDevice
from executor.device import Device
from executor.generate import Sampling, generator, seen_mask
from executor.host_tier import HostTier
from executor.image import Pixels
from executor.loop import AnswerText, Loop, watch_outside
from executor.outputs import Outputs
from executor.prepare import (
    Prompt,
    Request,
    Runs,
    check_budget,
    check_free,
    check_images,
    check_kernels,
    check_request,
    make_runs,
    memory_errors,
    next_runs,
    open_images,
    padded,
    prime,
    read_prompt,
)
from executor.prompt import load_tokenizer
from executor.record import Record, Recorder
from executor.rounds import Round, anew, question, whole
from executor.weights import EmbeddingRows, Reader
from planner.errors import RunFailed
from planner.plan import Plan

__all__ = ["Request", "Result", "Session", "open_device", "run"]


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
    with Session(plan, request, device) as session:
        return session.answer(request, alone=True)


def open_device(request: Request) -> Device:
    """The device that the request names; one clear line where it is not there."""
    if request.device == "cuda":
        from executor.cuda import CudaDevice

        return CudaDevice()
    return CpuDevice(limit_data=request.limit_data)


class Session(AbstractContextManager["Session"]):
    """A plan that stays loaded, for several requests one after another, in the memory of one.

        with Session(plan, request) as session:
            first = session.ask("What is this?")
            second = session.ask("Which colour is it?")  # the same images: their rows of the prompt are there
            third = session.ask("And here?", images=[other])  # everything runs again

    What a request finds of those before it decides by itself, and its record says. All run the same shapes, so that
    libraries keep nothing more from one to the next; prompts are filled up for that. The first request loads. After one
    that failed the next runs as a whole.
    """

    def __init__(self, plan: Plan, request: Request, device: Device | None = None) -> None:
        self._plan = plan
        self._request = request
        self._device = device
        self._stack = ExitStack()
        self._loaded: _Loaded | None = None
        self._usable = True
        self._tokenizer: Any = None
        # of the answer whose keys and values lie in the arena
        self._prompt: Prompt | None = None
        self._images: tuple[object, ...] = ()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._usable, self._loaded, self._tokenizer = False, None, None
        self._prompt, self._images = None, ()
        self._stack.close()

    def check(self, prompts: Sequence[Sequence[int] | str]) -> None:
        """InputError now, not when its turn comes, for a prompt that the plan has no room for or that is none; nothing is loaded but the tokenizer."""
        check_request(self._plan, self._request)
        for prompt in prompts:
            asked = replace(self._request, prompt=prompt)
            read_prompt(self._plan, asked, self._tokenizer_of(asked))

    def _tokenizer_of(self, request: Request) -> Any:
        """Loaded once, and before the context is measured: a real one holds some 60 MiB."""
        if self._tokenizer is None and request.tokenizer:
            self._tokenizer = load_tokenizer(request.tokenizer)
        return self._tokenizer

    def ask(
        self,
        prompt: Sequence[int] | str,
        images: Sequence[Path | Pixels] | None = None,
        *,
        max_new_tokens: int | None = None,
        save_outputs: Path | None = None,
    ) -> Result:
        """The answer to one more request: as the session's, but for what is given; outputs are saved only where asked for."""
        given = self._request
        asked = replace(
            given,
            prompt=prompt,
            images=given.images if images is None else tuple(images),
            max_new_tokens=given.max_new_tokens if max_new_tokens is None else max_new_tokens,
            save_outputs=save_outputs,
        )
        return self.answer(asked)

    def answer(self, request: Request, *, alone: bool = False) -> Result:
        """The same for a whole request; checkpoint, tokenizer, device and checks are the first one's. `alone`: no other follows."""
        if not self._usable:
            raise RunFailed("the session has ended or could not load; open another one")
        plan = self._plan
        if self._loaded is None:
            check_request(plan, request)
        else:
            check_images(plan, request)
        tokenizer = self._tokenizer_of(request)
        prompt = read_prompt(plan, request, tokenizer)
        images = tuple(map(_identity, request.images))
        round_ = self._round(prompt, images, alone=alone)
        sampling = request.sampling or Sampling(repetition_penalty=plan.model.repetition_penalty)
        # until the answer is there, nothing in the arena can be relied on
        self._prompt = None
        with ExitStack() as stack:
            stack.enter_context(memory_errors("the run"))
            outputs = Outputs(request.save_outputs) if request.save_outputs else None
            if outputs is not None:
                # before it holds anything: an interrupt may come between
                stack.callback(outputs.drop)
                stack.enter_context(outputs)
            age_s = request.age_s if self._loaded is None else 0.0
            device = self._opened(request)
            recorder = Recorder(device, check=request.check, age_s=age_s)
            running = stack.enter_context(ExitStack())
            loading: AbstractContextManager[None] = nullcontext()
            if not round_.first:
                loading = recorder.phase(
                    "load",
                    arena_bytes=self._arena_bytes,
                    copied_bytes=lambda: reader.copied_bytes(),
                )
            with loading:
                if self._loaded is None:
                    loaded = self._load(request, device, prompt, sampling, alone=alone)
                else:
                    loaded = self._loaded
                    loaded.make_room(round_)
                runs = loaded.runs
                if not alone:
                    runs = next_runs(runs, plan, prompt, round_)
                if not round_.first:
                    before = device.held_bytes()
                    with memory_errors("images"):
                        open_images(request, plan, runs.slots)
                    held = (device.held_bytes() or 0) - (before or 0)
                    recorder.keep_host("images", max(0, held))
                # a card holds the arena whole
                copies_add = device.kind == "cpu" and device.held_bytes() is not None
                reader = loaded.reader(request, prompt, round_, hold=copies_add)
                running.push(reader)  # before its thread begins: an interrupt may come between
                if plan.levers.order == "all_first":
                    reader.__enter__()
                    reader.begin_step(plan.steps[round_.first])
            if plan.levers.order != "all_first":
                reader.__enter__()
            reader.let_go()
            with running:
                loop = Loop(
                    plan=plan,
                    request=request,
                    first=round_.first,
                    arena=loaded.arena,
                    reader=reader,
                    recorder=recorder,
                    runs=runs,
                    prompt=prompt,
                    sampling=sampling,
                    draws=generator(sampling),
                    seen=seen_mask(prompt.ids, plan.model.text.vocabulary),
                    text=AnswerText(request.on_token, tokenizer),
                    outputs=outputs,
                    copies_add=copies_add,
                )
                if request.poison:
                    loaded.arena.fill_canaries(loaded.arena.dead_ranges(round_.first))
                loop.vision()
                loop.prefill()
                loop.decode()
            copies = reader.timings()
            if request.check and alone:
                watch_outside(plan, device, loaded.arena, recorder, runs, prompt)
            record = recorder.finish(
                fingerprint=request.fingerprint or plan.model.fingerprint,
                budget_bytes=plan.device.budget_bytes,
                arena_bytes=loaded.arena.size_bytes,
                context_bytes=loaded.context_bytes,
                prompt_tokens=len(prompt.ids),
                new_tokens=len(loop.tokens),
                copies=copies,
                notes=loaded.notes,
                reused_tokens=round_.start,
                reused_weights_bytes=reader.landed_bytes,
            )
        self._prompt, self._images = prompt, images
        return Result(tuple(loop.tokens), loop.text.whole, record)

    def _round(self, prompt: Prompt, images: tuple[object, ...], *, alone: bool) -> Round:
        if self._loaded is None:
            return whole(len(prompt.ids) if alone else self._plan.workload.prompt_tokens)
        again = None
        if self._prompt is not None and _same(self._images, images):
            again = question(self._plan, self._prompt.ids, prompt.ids, prompt.image_spans)
        if again is None and self._prompt is None:
            return whole(self._plan.workload.prompt_tokens)  # one before failed
        return again or anew(self._plan)

    def _opened(self, request: Request) -> Device:
        """The session's device, opened by its first request."""
        if self._loaded is not None:
            return self._loaded.device
        self._usable = False  # until it has loaded
        self._device = self._device or open_device(request)
        self._stack.enter_context(closing(self._device))
        return self._device

    def _load(
        self,
        request: Request,
        device: Device,
        prompt: Prompt,
        sampling: Sampling,
        *,
        alone: bool,
    ) -> _Loaded:
        """Everything before the first image: checks, arena, priming, context, the last refusal."""
        plan = self._plan
        malloc_fixed = memory.fix_malloc_thresholds()
        check_kernels(plan, device)
        check_free(plan, device)
        arena = Arena(plan, device)
        self._stack.callback(arena.close)
        shape = (plan.model.text.vocabulary, plan.model.text.hidden)
        embeddings = self._stack.enter_context(closing(EmbeddingRows(request.locations, shape)))
        full = prompt if alone else padded(plan, prompt)
        with memory_errors("positions and the room for kernels' blocks"):
            runs = make_runs(plan, full, device, embeddings)
            device.reserve_outside(max((step.outside_bytes for step in plan.steps), default=0))
        prime(plan, arena, runs, full, sampling)
        device.synchronize()
        context_bytes = device.context_bytes()
        check_budget(plan, context_bytes)
        if plan.device.budget_bytes is not None:
            device.cap(plan.device.budget_bytes)
        notes = (
            ()
            if malloc_fixed
            else ("malloc's thresholds could not be fixed here: peaks are less exact",)
        )
        self._loaded = _Loaded(plan, device, arena, runs, context_bytes, notes)
        self._usable = True
        return self._loaded

    def _arena_bytes(self) -> int | None:
        return self._loaded.arena.resident_bytes() if self._loaded else None


@dataclass(slots=True)
class _Loaded:
    """What a session's requests share."""

    plan: Plan
    device: Device
    arena: Arena
    runs: Runs
    context_bytes: int | None
    notes: tuple[str, ...]
    host: HostTier | None = None

    def make_room(self, round_: Round) -> None:
        """Give back what the request before left and this one does not use."""
        # copies may still be under way that nobody waited for
        self.device.synchronize()
        self.arena.kept = round_.kept
        self.arena.release(self.arena.dead_ranges(round_.first))
        self.context_bytes = self.device.context_bytes()

    def reader(self, request: Request, prompt: Prompt, round_: Round, *, hold: bool) -> Reader:
        """The copy queue of one request. `hold`: what no step of `load` waits for begins after it."""
        if self.host is None:
            self.host = self.device.host_tier(self.plan.host_units)
        return Reader(
            self.plan,
            self.device,
            request.locations,
            decode_iterations=prompt.iterations,
            # what watches the arena around a step needs the reader to hold still meanwhile
            alone=request.check,
            host=self.host,
            first=round_.first,
            landed=round_.landed,
            hold=hold,
        )


def _identity(image: Path | Pixels) -> object:
    """What tells whether two images are one: of a file its place, size and time; of pixels a reference that does not keep them.

    Of pixels that nothing can refer to so (slots without `__weakref__`) nothing tells: they count as others each time.
    """
    if not isinstance(image, Path):
        try:
            return ref(image)
        except TypeError:
            return object()
    found = image.stat()
    return image.resolve(), found.st_size, found.st_mtime_ns, found.st_ino


def _same(before: Sequence[object], now: Sequence[object]) -> bool:
    """Whether the images are the same, in the same order."""
    return len(before) == len(now) and all(
        one() is not None and one() is other()
        if isinstance(one, ref) and isinstance(other, ref)
        else one == other
        for one, other in zip(before, now, strict=True)
    )
