"""The executor's steps on a card that is not there, beside what the plan lists for them."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from executor import prepare
from executor.device import Chunk
from executor.files import Files
from planner.errors import KernelRefused, OutOfMemory, PlanFileError
from planner.units import GIB, MIB
from tests.fake_cuda.card import CONTEXT_BYTES, FakeCard
from tests.fake_cuda.compare import compare, make_plan
from tests.fake_cuda.walk import walk

MODEL, IMAGE = "3b", "308x196"  # 22 x 14 patches: windows cut at the right and at the bottom
CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "12.0")
# one card under three budgets, the others under one
SHORT = [
    *(("12.0", budget) for budget in ("2GB", "5GB", None)),
    *((capability, "5GB") for capability in CAPABILITIES[:-1]),
]
SIZES = ("560x420", "1920x1080", "3840x2160")
BUDGETS = {
    "3b": ("3GB", "6GB", "12GB"),
    "7b": ("4GB", "10GB", "24GB"),
    "72b": ("12GB", "48GB", "160GB"),
}


@pytest.fixture(scope="module")
def known() -> dict[Any, Any]:
    """Steps already walked, by what they allocate after."""
    return {}


@pytest.mark.parametrize(("capability", "budget"), SHORT)
def test_every_step_takes_on_a_card_what_the_plan_lists(
    known: dict[Any, Any], capability: str, budget: str | None
) -> None:
    plan = make_plan(MODEL, IMAGE, budget, capability)
    found = walk(plan, FakeCard(capability, 16 * GIB), known=known)
    compared = compare(plan, found)
    assert compared.wrong == ()
    assert compared.blocks >= 20
    assert compared.declared > 0
    assert compared.planned_reserved_bytes >= compared.reserved_bytes


@pytest.mark.full
@pytest.mark.parametrize(("model", "image"), list(product(BUDGETS, SIZES)))
def test_every_step_of_every_size_takes_on_every_card_what_the_plan_lists(
    model: str, image: str
) -> None:
    known: dict[Any, Any] = {}
    for capability, budget in product(CAPABILITIES, BUDGETS[model]):
        plan = make_plan(model, image, budget, capability)
        found = walk(plan, FakeCard(capability, 192 * GIB), known=known)
        assert compare(plan, found).wrong == (), (capability, budget)


@pytest.mark.full
@pytest.mark.parametrize("image", ["560x420", "1920x1080", "560x420 448x448"])
def test_all_tiles_of_a_step_take_what_its_distinct_ones_take(image: str) -> None:
    plan = make_plan(MODEL, image, "3GB", "12.0")
    found = walk(plan, FakeCard("12.0", 16 * GIB), whole=True)
    assert all(len(every) == 2 for step, every in found.steps.items() if "sample" not in step)
    assert compare(plan, found).wrong == ()


def test_several_images_one_after_another_and_expandable_segments_are_walked_too() -> None:
    plan = make_plan(MODEL, "112x84 84x112", "3GB", "12.0", "expandable")
    assert plan.device.alloc_conf == "expandable_segments:True"
    card = FakeCard("12.0", 16 * GIB, plan.device.alloc_conf)
    assert compare(plan, walk(plan, card)).wrong == ()


@pytest.mark.parametrize(("dtype", "capability"), [("float32", "12.0"), ("float16", "7.5")])
def test_the_memory_efficient_kernel_takes_what_the_plan_lists(dtype: str, capability: str) -> None:
    plan = make_plan(MODEL, "112x84", "6GB", capability, dtype=dtype)
    assert {step.kernel for step in plan.steps} == {"efficient", None}
    found = walk(plan, FakeCard(capability, 16 * GIB))
    assert compare(plan, found).wrong == ()


@pytest.fixture(scope="module")
def small() -> Any:
    return make_plan(MODEL, "112x84", "2GB", "12.0")


def test_one_block_more_than_the_plan_lists_is_noticed(small: Any) -> None:
    usual = prepare.STEPS["text_mlp"]

    def wasteful(run: Any, step: Any, w: Any, v: Any) -> None:
        usual(run, step, w, v)
        _ = v["y"] * 2

    with mock.patch.dict(prepare.STEPS, {"text_mlp": wasteful}):
        found = walk(small, FakeCard("12.0", 16 * GIB))
    wrong = compare(small, found).wrong
    assert any(sentence.startswith("prefill/layers.0.mlp: walked (Block") for sentence in wrong)


def test_copies_that_a_kernel_would_make_inside_are_noticed(small: Any) -> None:
    usual = prepare.STEPS["text_mlp"]

    def wasteful(run: Any, step: Any, w: Any, v: Any) -> None:
        usual(run, step, w, v)
        weight = w["mlp.up_proj.weight"]
        # neither rows nor columns lie together: cuBLAS is given a copy
        torch.mm(v["y"][:, ::2], weight[:, ::2].t(), out=v["up"][: v["y"].shape[0]])
        v["y"][0].to("cpu", torch.float32)

    with mock.patch.dict(prepare.STEPS, {"text_mlp": wasteful}):
        found = walk(small, FakeCard("12.0", 16 * GIB))
    assert any("mm: an operand of shape" in sentence for sentence in found.complaints)
    assert any("a temporary on the card" in sentence for sentence in found.complaints)


def test_a_kernel_that_the_card_refuses_is_refused_at_the_start(small: Any) -> None:
    with pytest.raises(KernelRefused, match=r"flash attention.*refused by fake card.*efficient"):
        walk(small, FakeCard("7.5", 16 * GIB))


def test_nothing_is_allocated_where_units_are_copied(tmp_path: Path) -> None:
    from executor.cuda import CudaDevice

    path = tmp_path / "weights"
    path.write_bytes(bytes(3000))
    card = FakeCard("12.0", 16 * GIB)
    with card.installed():
        device = CudaDevice()
        device.allocate_arena(MIB)
        before = len(card.trace.sizes)
        device.copy_waits(device.mark_compute())
        device.fill(Chunk(path, 0, ((0, 1000), (4096, 6096))), Files())
        device.compute_waits(device.mark_copy())
        assert len(card.trace.sizes) == before == 1
        device.close()
    assert card.complaints == []


def test_workspaces_come_before_the_steps_blocks_and_are_taken_once() -> None:
    from executor.cuda import CudaDevice

    card = FakeCard("9.0", 16 * GIB)
    with card.installed():
        device = CudaDevice()
        device.allocate_arena(64 * MIB)
        device.reserve_outside(30 * MIB)
        assert set(card.workspaces) == {"cublas", "cublaslt"}
        # the arena, 32 MiB of cuBLAS, a small segment for cuBLASLt, the steps' blocks
        assert card.allocator.reserved_bytes == (64 + 32 + 2 + 30) * MIB
        block = torch.empty(30 * MIB, dtype=torch.uint8, device="cuda:0")
        assert card.allocator.reserved_bytes == (64 + 32 + 2 + 30) * MIB
        del block
        device.close()


def test_the_cap_leaves_the_budget_less_the_context_to_the_allocator() -> None:
    from executor.cuda import CudaDevice

    card = FakeCard("12.0", 16 * GIB)
    with card.installed():
        device = CudaDevice()
        device.allocate_arena(64 * MIB)
        device.cap(4 * GIB)
        limit = card.fraction * card.total_bytes
        assert abs(limit - (4 * GIB - CONTEXT_BYTES)) < 512
        device.close()
        assert card.fraction == 1.0


@pytest.mark.parametrize(
    ("nvml", "counted", "note"),
    [
        ("process", 0, None),
        ("card", 0, "less than before the start"),
        (None, GIB, "the whole card's"),
    ],
)
def test_what_other_programs_hold_is_told_apart_where_the_driver_tells(
    nvml: str | None, counted: int, note: str | None
) -> None:
    from executor.cuda import CudaDevice

    card = FakeCard("12.0", 16 * GIB, others_bytes=GIB, nvml=nvml)
    with card.installed():
        device = CudaDevice()
        device.allocate_arena(64 * MIB)
        assert device.context_bytes() == CONTEXT_BYTES + counted
        assert device.peak_bytes() == CONTEXT_BYTES + 64 * MIB + counted
        assert device.allocator_peaks() == (64 * MIB, 64 * MIB)
        notes = device.notes()
        assert notes == () if note is None else note in notes[0]
        device.close()


def test_an_arena_that_the_card_has_no_room_for_is_refused_with_the_numbers() -> None:
    from executor.cuda import CudaDevice

    card = FakeCard("12.0", 16 * GIB, others_bytes=12 * GIB)
    with card.installed():
        device = CudaDevice()
        with pytest.raises(
            OutOfMemory, match=r"needs 4.00 GiB; the card has 3.51 GiB of 16.00 GiB"
        ):
            device.allocate_arena(4 * GIB)
        device.allocate_arena(3 * GIB)
        with (
            pytest.raises(OutOfMemory, match="room: memory was refused"),
            prepare.memory_errors("room"),
        ):
            device.reserve_outside(GIB)
        device.close()


def test_a_driver_that_keeps_the_card_s_memory_on_the_host_is_refused() -> None:
    from executor.cuda import CudaDevice

    card = FakeCard("12.0", 16 * GIB)
    with card.installed():
        device = CudaDevice()
        device.allocate_arena(4 * GIB)
        device.context_bytes()
        card.paged_bytes = GIB
        with pytest.raises(OutOfMemory, match="keeps the rest in host memory"):
            device.context_bytes()
        card.paged_bytes = 0
        device.close()


def test_settings_in_effect_other_than_the_plans_are_refused_at_the_start(small: Any) -> None:
    with pytest.raises(PlanFileError, match="native allocator, found expandable_segments:True"):
        walk(small, FakeCard("12.0", 16 * GIB, "expandable_segments:True"))
    with pytest.raises(PlanFileError, match="workspace of 8519680 bytes, torch takes 33554432"):
        walk(small, FakeCard("9.0", 16 * GIB))
