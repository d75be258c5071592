"""Bytes of a run in float16: what kernels take on the CPU, and on a card that is not there, beside the plan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from executor.make_checkpoint import make_random_checkpoint
from executor.record import Record
from planner.check import check
from planner.checkpoint.spec import builtin
from planner.dtype import in_dtype
from planner.plan import Plan
from planner.profile import load_profile
from planner.units import GIB, KIB
from tests.fake_cuda.card import FakeCard
from tests.fake_cuda.compare import compare, make_plan
from tests.fake_cuda.walk import walk

# torch wraps a Python number in a tensor of 4 or 8 bytes; the profiler's events are not in order within a call
SLACK_BYTES = 64
MULTIPLIES_FLOAT16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.skipif(not MULTIPLIES_FLOAT16, reason="this CPU does not multiply float16")
def test_no_step_takes_more_outside_the_arena_than_the_plan_lists(
    labs: Any, odd_tiles: Any, tiled: bool
) -> None:
    plan = labs().plan(tiles=odd_tiles if tiled else None)
    record = labs().run(plan, check=True).record
    recorded = {step.id: step.outside_bytes for step in record.steps}
    listed = {step.id: step.outside_bytes for step in plan.steps}
    assert sum(size is not None for size in recorded.values()) > 20
    wrong = {
        step: (size, listed[step])
        for step, size in recorded.items()
        if size is not None and size > listed[step] + SLACK_BYTES
    }
    assert not wrong
    # what is widened is widened in the arena: not a residual stream's worth lies outside
    rows = next(size for step, size in listed.items() if step.endswith("embed_tokens"))
    assert rows == plan.model.text.hidden * 2 * min(256, plan.workload.prompt_tokens)


def run_from_the_command_line(folder: Path, specification: str, image: str) -> tuple[Plan, Record]:
    make_random_checkpoint(specification, folder / "ck")
    width, height = map(int, image.split("x"))
    values = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Pillow.fromarray(values).save(folder / "a.png")
    shared = ["--model", str(folder / "ck"), "--image", str(folder / "a.png"), "--prompt", "Why?"]
    plan = ["--device", "cpu", "--dtype", "float16", "--max-new-tokens", "4"]
    for module, words in (
        ("planner.cli", [*plan, "--out", str(folder / "plan.json")]),
        ("executor.cli", [str(folder / "plan.json"), "--record", str(folder / "record.json")]),
    ):
        done = subprocess.run(
            [sys.executable, "-m", module, *shared, *words], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    return Plan.load(folder / "plan.json"), Record.load(folder / "record.json")


@pytest.mark.full
@pytest.mark.skipif(not MULTIPLIES_FLOAT16, reason="this CPU does not multiply float16")
@pytest.mark.parametrize(
    ("specification", "image"), [("tiny:bfloat16", "140x196"), ("small", "560x420")]
)
def test_a_run_stays_within_the_plans_bound(tmp_path: Path, specification: str, image: str) -> None:
    plan, record = run_from_the_command_line(tmp_path, specification, image)
    assert plan.model.stored == "bfloat16"
    for planned in plan.prediction.phases:
        recorded = next(phase for phase in record.phases if phase.phase == planned.phase)
        assert recorded.peak_bytes is not None
        assert recorded.peak_bytes <= planned.bound_peak_bytes, planned.phase


# --- a card that is not there -----------------------------------------------------------------------------------------


def card_plan(monkeypatch: pytest.MonkeyPatch, model: str, image: str, budget: str) -> Plan:
    import planner.checkpoint.spec

    converted = in_dtype(builtin(model), load_profile("t4-16gb"))
    monkeypatch.setattr(planner.checkpoint.spec, "resolve_model", lambda name: converted)
    plan: Plan = make_plan(model, image, budget, "7.5", dtype="float16")
    assert (plan.model.stored, plan.model.residual_dtype) == ("bfloat16", "float32")
    assert check(plan) == []
    return plan


def test_every_step_takes_on_a_card_without_bfloat16_what_the_plan_lists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = card_plan(monkeypatch, "3b", "112x84 84x112", "2GB")
    found = walk(plan, FakeCard("7.5", 16 * GIB))
    compared = compare(plan, found)
    assert compared.wrong == ()
    assert compared.blocks >= 20


@pytest.mark.full
@pytest.mark.parametrize("model", ["3b", "7b", "72b"])
@pytest.mark.parametrize("image", ["560x420", "3840x2160"])
def test_every_step_of_every_size_does(
    monkeypatch: pytest.MonkeyPatch, model: str, image: str
) -> None:
    plan = card_plan(monkeypatch, model, image, "14GB")
    found = walk(plan, FakeCard("7.5", 16 * GIB))
    assert compare(plan, found).wrong == ()


def test_a_sum_into_the_wider_stream_without_scratch_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from executor import text

    plan = card_plan(monkeypatch, "3b", "112x84", "2GB")

    def direct(x: torch.Tensor, part: torch.Tensor, *, scratch: torch.Tensor) -> None:
        x.add_(part.float())

    monkeypatch.setattr(text, "add_rows", direct)
    found = walk(plan, FakeCard("7.5", 16 * GIB))
    wrong = compare(plan, found).wrong
    assert any(sentence.startswith("prefill/layers.0.self_attn: walked") for sentence in wrong)


def test_partial_sums_of_products_stay_in_float32_on_a_card() -> None:
    from executor.cuda import CudaDevice

    products = torch.backends.cuda.matmul
    before = products.allow_fp16_reduced_precision_reduction
    with FakeCard("7.5", 16 * GIB).installed():
        device = CudaDevice()
        assert products.allow_fp16_reduced_precision_reduction is False
        device.allocate_arena(64 * KIB)
        device.close()
    assert products.allow_fp16_reduced_precision_reduction == before
