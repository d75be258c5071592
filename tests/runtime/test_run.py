from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
import weakref
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Pillow
from safetensors import safe_open
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from executor.cpu import CpuDevice
from executor.cuda_settings import check_settings
from executor.device import Chunk
from executor.files import Files
from executor.generate import Sampling
from executor.image import Pixels, open_image
from executor.prompt import build_prompt, load_tokenizer
from executor.run import Request, run
from planner.errors import (
    CheckpointError,
    DoesNotFit,
    InputError,
    OutOfMemory,
    PlanFileError,
    RunFailed,
)
from planner.plan import DeviceTerms, Plan
from planner.plan.shapes import TensorLocation
from planner.units import MIB


def transformers_answer(tiny: Any, plan: Plan, count: int) -> tuple[int, ...]:
    """What transformers generates on the same checkpoint, image and prompt, greedily."""
    tokens = plan.model.token_ids
    tokenizer = load_tokenizer(tiny.folder)
    ids = torch.tensor([build_prompt(tokenizer, tiny.PROMPT, plan.workload.images, tokens)])
    with Pillow.open(tiny.image) as picture:
        pixels = Qwen2VLImageProcessorPil.from_pretrained(tiny.folder)(
            images=[picture], return_tensors="pt"
        )
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny.folder, dtype=torch.float32)
    found = model.eval().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == tokens.image).int(),
        **pixels,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        repetition_penalty=plan.model.repetition_penalty,
    )
    return tuple(found[0, ids.shape[1] :].tolist())


@pytest.fixture(scope="module")
def answer(tiny: Any) -> tuple[int, ...]:
    """What every plan must say."""
    return run(tiny.plan(), tiny.request()).tokens


class LateDevice(CpuDevice):
    """Reads end late, so that a missing wait shows."""

    def fill(self, chunk: Chunk, files: Files) -> None:
        time.sleep(0.002)
        super().fill(chunk, files)


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("streamed", [False, True])
def test_the_answer_is_transformers(tiny: Any, streamed: bool) -> None:
    plan = tiny.plan(streamed=streamed, new_tokens=12)
    tokens = run(plan, tiny.request()).tokens
    assert tokens == transformers_answer(tiny, plan, 12)


@pytest.mark.parametrize("streamed", [False, True])
def test_dead_ranges_full_of_nan_and_late_copies_change_nothing(
    tiny: Any, answer: tuple[int, ...], streamed: bool
) -> None:
    request = tiny.request(poison=True)
    assert run(tiny.plan(streamed=streamed), request, LateDevice()).tokens == answer


def test_several_images_one_after_another_are_read_and_dropped(tiny: Any, tmp_path: Path) -> None:
    plan = tiny.plan(streamed=True, images=2)
    other = tmp_path / "b.png"
    tiny.save_image(other, seed=1)
    both = run(plan, tiny.request(images=(tiny.image, other), poison=True))
    swapped = run(plan, tiny.request(images=(other, tiny.image)))
    assert both.tokens == run(plan, tiny.request(images=(tiny.image, other))).tokens
    assert len(both.tokens) == 5
    assert both.record.prompt_tokens == swapped.record.prompt_tokens


def test_a_check_run_records_every_step_and_says_the_same(
    tiny: Any, answer: tuple[int, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    plan = tiny.plan(streamed=True)
    result = run(plan, tiny.request(check=True))
    assert result.tokens == answer
    record = result.record
    assert [phase.phase for phase in record.phases] == ["load", "vision", "prefill", "decode"]
    assert {step.id for step in record.steps} == {step.id for step in plan.steps}
    counts = {step.id: step.count for step in record.steps}
    assert counts["prefill/embed_tokens"] == 1
    assert counts["decode/embed_tokens"] == 4
    assert all(step.peak_bytes for step in record.steps)
    outside = {s.id: s.outside_bytes for s in record.steps}
    assert outside["vision/blocks.0.attn"]
    assert outside["prefill/sample"] is None
    moved = {copy.id: copy.size_bytes for copy in record.copies}
    sizes = {unit.id: sum(t.size_bytes for t in unit.tensors) for unit in plan.units}
    assert moved == {
        copy.id: sizes[copy.unit] * (4 if copy.phase == "decode" and not copy.once else 1)
        for copy in plan.copies
    }
    assert sum(p.copied_bytes for p in record.phases) == sum(moved.values())
    assert capfd.readouterr() == ("", "")  # the profiler has a lot to say


def test_nearly_all_device_bytes_are_accounted_for(tiny: Any) -> None:
    record = run(tiny.plan(), tiny.request()).record
    assert record.context_bytes is not None
    for phase in record.phases[1:]:
        assert phase.peak_bytes is not None
        assert phase.arena_bytes is not None
        known = record.context_bytes + phase.arena_bytes + phase.host_bytes
        assert -4 * MIB < phase.peak_bytes - known < 8 * MIB


def test_priming_leaves_no_page_and_each_phase_gives_back_what_is_dead(tiny: Any) -> None:
    plan = tiny.plan(streamed=True)
    phases = {phase.phase: phase for phase in run(plan, tiny.request()).record.phases}
    assert phases["load"].arena_bytes == 0
    starts = {step.phase: index for index, step in reversed(list(enumerate(plan.steps)))}
    for phase in ("prefill", "decode"):
        later = [
            buffer.size_bytes + 2 * 4096
            for buffer in plan.buffers
            if any(death > starts[phase] for _, death in buffer.lifetimes)
        ]
        resident = phases[phase].arena_bytes
        assert resident is not None
        assert 0 < resident <= sum(later) < plan.prediction.arena_bytes


def test_a_phases_record_holds_no_copies_that_come_after_its_last_step(tiny: Any) -> None:
    class Slow(CpuDevice):
        """What ends a phase takes long: copies that may go on have gone by then."""

        def synchronize(self) -> None:
            time.sleep(0.1)

    plan = tiny.plan(streamed=True)
    at = {step.id: number for number, step in enumerate(plan.steps)}
    sizes = {unit.id: sum(t.size_bytes for t in unit.tensors) for unit in plan.units}
    record = run(plan, tiny.request(), Slow()).record
    phases = {phase.phase: phase for phase in record.phases}
    # what a copy waits for, and what those before it do; a wrapping one for prefill's last step at least
    own = [at["prefill/sample"] if copy.wraps else at.get(copy.after, -1) for copy in plan.copies]
    waits = list(zip(plan.copies, accumulate(own, max), strict=True))
    early = 0
    for phase in ("vision", "prefill"):
        early += phases[phase].copied_bytes
        last = max(number for number, step in enumerate(plan.steps) if step.phase == phase)
        assert early <= sum(sizes[copy.unit] for copy, after in waits if after < last), phase


def test_the_penalty_counts_the_answers_own_tokens(tiny: Any) -> None:
    sampling = Sampling(repetition_penalty=50.0)
    tokens = run(tiny.plan(new_tokens=12), tiny.request(sampling=sampling)).tokens
    assert len(set(tokens)) == 12


def test_outputs_hold_features_logits_and_tokens(
    tiny: Any, answer: tuple[int, ...], tmp_path: Path
) -> None:
    path, plan = tmp_path / "out.safetensors", tiny.plan()
    run(plan, tiny.request(save_outputs=path))
    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    text = plan.model.text
    assert tensors["image_features"].shape == (plan.workload.images[0].tokens, text.hidden)
    assert tensors["logits"].shape == (5, text.vocabulary)
    assert torch.equal(tensors["prefill_logits"], tensors["logits"][:1])
    assert tuple(tensors["tokens"].tolist()) == answer
    assert float(tensors["image_features"].abs().sum()) > 0


def test_a_stop_token_ends_the_answer_and_the_copies(tiny: Any, answer: tuple[int, ...]) -> None:
    plan = tiny.plan(streamed=True)
    after = run(plan, tiny.request(stop=(answer[1],)))
    assert after.tokens == answer[: answer.index(answer[1]) + 1]
    at_once = run(plan, tiny.request(stop=(answer[0],)))
    assert at_once.tokens == answer[:1]
    assert [p.phase for p in at_once.record.phases] == ["load", "vision", "prefill"]
    assert "stowplan-reader" not in {thread.name for thread in threading.enumerate()}


def test_fewer_tokens_than_planned_are_a_prefix(tiny: Any, answer: tuple[int, ...]) -> None:
    for count in (1, 3):
        result = run(tiny.plan(streamed=True), tiny.request(max_new_tokens=count))
        assert result.tokens == answer[:count]


def test_tokens_are_handed_on_as_they_come(tiny: Any, answer: tuple[int, ...]) -> None:
    said: list[tuple[int, str]] = []
    result = run(tiny.plan(), tiny.request(on_token=lambda t, piece: said.append((t, piece))))
    assert tuple(token for token, _ in said[:5]) == answer
    assert "".join(piece for _, piece in said) == result.text


def test_a_seed_decides_what_is_drawn(tiny: Any, answer: tuple[int, ...]) -> None:
    def draw(seed: int) -> tuple[int, ...]:
        sampling = Sampling(temperature=5.0, seed=seed)
        return run(tiny.plan(), tiny.request(sampling=sampling)).tokens

    assert draw(1) == draw(1) != draw(2)


def test_an_image_is_dropped_after_its_last_patches(tiny: Any) -> None:
    images = [open_image(tiny.image, tiny.plan().workload.images[0])]
    image = weakref.ref(images[0])
    alive: dict[str, bool] = {}

    def on_step(step: str) -> None:
        images.clear()  # the caller's own reference
        alive[step] = image() is not None

    run(tiny.plan(), tiny.request(on_step=on_step, images=images))
    assert alive["vision/patch_embed"]
    assert not alive["vision/blocks.0.attn"]


def test_an_interrupt_leaves_nothing_behind(tiny: Any, tmp_path: Path) -> None:
    def interrupt(token: int, piece: str) -> None:
        raise KeyboardInterrupt

    request = tiny.request(on_token=interrupt, save_outputs=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run(tiny.plan(streamed=True), request)
    assert "stowplan-reader" not in {thread.name for thread in threading.enumerate()}
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_cut_off_after_the_start_is_named(tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny.folder, folder)
    file = folder / "model.safetensors"
    moved = {n: loc._replace(path=file) for n, loc in tiny.checkpoint.tensors.items()}
    last = max(loc.offset_bytes for loc in moved.values())

    def cut(step: str) -> None:
        if step == "prefill/embed_tokens":
            with open(file, "r+b") as opened:
                opened.truncate(max(last - 1, 0) // 2)

    with pytest.raises(CheckpointError, match="the file ends at byte"):
        run(tiny.plan(streamed=True), tiny.request(locations=moved, on_step=cut))
    assert "stowplan-reader" not in {thread.name for thread in threading.enumerate()}


def test_a_larger_context_than_planned_is_refused_before_the_first_weight(tiny: Any) -> None:
    plan = tiny.plan(budget_bytes=400 * MIB)
    device = plan.device.model_copy(update={"budget_bytes": 100 * MIB})
    steps: list[str] = []
    with pytest.raises(DoesNotFit, match=r"does not fit any more(.|\n)*measured here(.|\n)*--vram"):
        run(plan.model_copy(update={"device": device}), tiny.request(on_step=steps.append))
    assert steps == []


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"fingerprint": "f" * 64}, PlanFileError, "the checkpoint is another one"),
        ({"device": "cuda"}, PlanFileError, "the plan is for cpu"),
        ({"images": ()}, InputError, "for 1 images, found 0"),
        ({"images": (Path("nowhere.png"),)}, InputError, "no such image file"),
        ({"images": (Path("n" * 300),)}, InputError, "no such image file"),
        ({"prompt": "word " * 500}, InputError, "the plan room for"),
        ({"prompt": []}, InputError, "the prompt is empty"),
        ({"prompt": [10**6]}, InputError, "not below the model's vocabulary"),
        ({"prompt": [1, 2, 3]}, InputError, "wanted .* image tokens"),
        ({"tokenizer": None}, InputError, "needs the checkpoint's tokenizer.json"),
        ({"max_new_tokens": 6}, InputError, "the plan has room for 5"),
        ({"max_new_tokens": 0}, InputError, "wanted 1 or more"),
        ({"locations": {}}, CheckpointError, "has no tensor"),
    ],
)
def test_a_request_that_does_not_belong_to_the_plan_is_refused(
    tiny: Any, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        run(tiny.plan(), tiny.request(**changes))


def test_a_tensor_without_rows_is_refused(tiny: Any) -> None:
    locations = dict(tiny.checkpoint.tensors)
    name = "visual.blocks.0.attn.proj.weight"
    locations[name] = locations[name]._replace(shape=())
    with pytest.raises(CheckpointError, match=f"{name}: the plan takes rows .* has 0"):
        run(tiny.plan(), tiny.request(locations=locations))


def test_pixels_that_nothing_can_refer_to_weakly_are_run_too(
    tiny: Any, answer: tuple[int, ...]
) -> None:
    class Slots:
        __slots__ = ("source",)

        def __init__(self, source: Pixels) -> None:
            self.source = source

        def rows(self, start: int, stop: int, out: torch.Tensor) -> None:
            self.source.rows(start, stop, out)

    plan = tiny.plan()
    given = Slots(open_image(tiny.image, plan.workload.images[0]))
    assert run(plan, tiny.request(images=(given,))).tokens == answer


def test_another_image_size_is_refused(tiny: Any, tmp_path: Path) -> None:
    other = tmp_path / "c.png"
    tiny.save_image(other, seed=0, width=300)
    with pytest.raises(PlanFileError, match="make a plan for this image"):
        run(tiny.plan(), tiny.request(images=(other,)))


def test_a_tensor_of_another_size_is_refused(tiny: Any) -> None:
    locations = dict(tiny.checkpoint.tensors)
    name = "visual.blocks.0.attn.proj.weight"
    old: TensorLocation = locations[name]
    locations[name] = old._replace(size_bytes=old.size_bytes // 2, dtype="bfloat16")
    with pytest.raises(CheckpointError, match=name):
        run(tiny.plan(), tiny.request(locations=locations))


@pytest.mark.parametrize(
    ("allocator", "environment", "fits"),
    [
        ("native", {}, True),
        ("native", {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, False),
        (
            "native",
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64, expandable_segments:True"},
            False,
        ),
        ("expandable", {}, False),
        ("expandable", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, True),
        ("native", {"PYTORCH_ALLOC_CONF": "expandable_segments:False, backend:native"}, True),
        ("native", {"PYTORCH_ALLOC_CONF": "pinned_num_register_threads:8"}, True),
        ("native", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, False),
        ("native", {"PYTORCH_ALLOC_CONF": "roundup_power2_divisions:[256:1,>:4]"}, False),
        ("native", {"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, False),
        ("native", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, False),
        ("native", {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, False),
        (
            "expandable",
            {
                "PYTORCH_ALLOC_CONF": "expandable_segments:True,pinned_use_cuda_host_register:True",
                "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync",
            },
            True,
        ),
    ],
)
def test_the_allocators_settings_must_be_the_plans(
    allocator: str, environment: dict[str, str], fits: bool
) -> None:
    conf = "expandable_segments:True" if allocator == "expandable" else ""
    terms = DeviceTerms.model_construct(allocator=allocator, alloc_conf=conf)
    if fits:
        check_settings(terms, environment)
        return
    with pytest.raises(PlanFileError, match="the plan counts with"):
        check_settings(terms, environment)


def test_the_tokenizer_is_read_once(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from executor import run as module

    read: list[Path] = []

    def load(path: Path) -> Any:
        read.append(path)
        return load_tokenizer(path)

    monkeypatch.setattr(module, "load_tokenizer", load)
    run(tiny.plan(), tiny.request())
    assert read == [tiny.folder]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a card that is not there")
def test_cuda_without_a_card_is_one_clear_line(tiny: Any) -> None:
    plan = tiny.plan()
    plan = plan.model_copy(update={"device": plan.device.model_copy(update={"kind": "cuda"})})
    with pytest.raises(RunFailed, match=r"--device cuda: .*run with --device cpu"):
        run(plan, tiny.request(device="cuda"))


LIMITED = """
import sys
import torch
from executor.cpu import CpuDevice
from executor.prepare import memory_errors
from planner.errors import OutOfMemory
device = CpuDevice(limit_data=True)
arena = device.allocate_arena(64 << 20)
device.cap(device.held_bytes() + (64 << 20) + (32 << 20))
arena.fill_(1)
small = torch.ones(8 << 20, dtype=torch.uint8)
try:
    with memory_errors("prefill/a"):
        large = torch.ones(128 << 20, dtype=torch.uint8)
except OutOfMemory as error:
    print(error)
    device.close()
    large = torch.ones(128 << 20, dtype=torch.uint8)
    sys.exit(7)
"""


def test_a_hard_limit_refuses_what_passes_the_budget_and_is_lifted_at_the_end() -> None:
    found = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    assert found.returncode == 7, found.stderr
    assert found.stdout.startswith("prefill/a: memory was refused")


def test_a_run_under_a_hard_limit_at_its_budget_succeeds(
    tiny: Any, answer: tuple[int, ...]
) -> None:
    held = run(tiny.plan(), tiny.request()).record.peak_bytes
    assert held is not None
    plan = tiny.plan(budget_bytes=400 * MIB)
    device = plan.device.model_copy(update={"budget_bytes": held + 64 * MIB})
    limited = plan.model_copy(update={"device": device})
    assert run(limited, tiny.request(limit_data=True)).tokens == answer


def test_memory_refused_inside_a_step_names_the_step(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from executor import prepare

    def greedy(*_: object) -> None:
        torch.empty(2**50, dtype=torch.uint8)

    monkeypatch.setitem(prepare.STEPS, "norm", greedy)
    with pytest.raises(OutOfMemory, match="prefill/norm: memory was refused"):
        run(tiny.plan(), tiny.request())


def test_a_step_that_writes_outside_its_buffers_fails_a_check_run(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from executor import prepare, text

    def stray(run_: Any, step: Any, w: Any, v: Any) -> None:
        text.norm(run_, step, w, v)
        w["weight"].add_(1)  # a weight is only read

    monkeypatch.setitem(prepare.STEPS, "norm", stray)
    with pytest.raises(RunFailed, match="prefill/norm: changed arena bytes"):
        run(tiny.plan(), tiny.request(check=True))


def test_a_request_is_frozen() -> None:
    request = Request(locations={})
    with pytest.raises(AttributeError):
        request.check = True  # type: ignore[misc]
