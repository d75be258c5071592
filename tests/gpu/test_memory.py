"""What a card holds, and what it says where it has no more: recorded beside predicted, caps, refusals."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from executor import prepare
from executor.attention import check_kernel
from executor.make_checkpoint import make_random_checkpoint
from executor.record import Record
from planner import search, workload
from planner.checkpoint import spec
from planner.errors import DoesNotFit, KernelRefused, OutOfMemory, RunFailed
from planner.plan import Plan, write_text
from planner.profile import dumps
from planner.units import GIB, MIB
from tests.gpu.conftest import CARD, profile_of

PIXELS = {"min_pixels": 3136, "max_pixels": 12845056}
ROOT = Path(__file__).parents[2]


class Ran:
    """A plan and the record of its run in a process of its own."""

    def __init__(self, folder: Path, kind: str, *, budget: str, check: bool) -> None:
        checkpoint = folder / "tiny"
        if not checkpoint.exists():
            make_random_checkpoint("tiny:float16" if kind == "cuda" else "tiny", checkpoint)
        write_text(folder / "profile.json", dumps(profile_of(kind)))
        image = folder / "image.png"
        from PIL import Image as Pillow

        Pillow.effect_noise((280, 196), 60).convert("RGB").save(image)
        what = ["--model", str(checkpoint), "--image", str(image), "--prompt", "probe"]
        plan = [*what, "--device", str(folder / "profile.json"), "--max-new-tokens", "6"]
        if budget == "least":
            free = self._plan(folder, plan)
            least = free.prediction.smallest_budget_bytes + MIB
            plan += ["--vram", f"{least}B"]
        self.plan = self._plan(folder, plan)
        record = folder / "record.json"
        given = [str(folder / "plan.json"), *what, "--record", str(record), "--quiet"]
        _call("executor.cli", *given, *(["--check"] if check else []))
        self.record = Record.load(record)

    @staticmethod
    def _plan(folder: Path, arguments: list[str]) -> Plan:
        _call("planner.cli", *arguments, "--json", "--out", str(folder / "plan.json"))
        return Plan.load(folder / "plan.json")


def _call(module: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memory")


@pytest.mark.parametrize("budget", ["least", "unlimited"])
def test_no_recorded_peak_passes_the_bound(folder: Path, kind: str, budget: str) -> None:
    sub = folder / kind
    sub.mkdir(exist_ok=True)
    ran = Ran(sub, kind, budget=budget, check=False)
    assert ran.record.device == kind
    assert not ran.record.passed_budget
    for predicted, found in zip(ran.plan.prediction.phases, ran.record.phases, strict=True):
        assert found.peak_bytes is not None
        assert found.peak_bytes <= predicted.bound_peak_bytes, (predicted, found)


# --- only a card has these ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checked(folder: Path) -> Ran:
    sub = folder / "checked"
    sub.mkdir()
    return Ran(sub, "cuda", budget="unlimited", check=True)


def declared(plan: Plan) -> int:
    """Bytes of libraries that no walk sees: the only ones in which a card may differ."""
    return sum(block.size_bytes for block in plan.device.kept if block.declared)


@pytest.mark.gpu
@CARD[1]
def test_allocated_and_reserved_are_the_predicted_ones_to_the_byte(checked: Ran) -> None:
    """But for cuBLASLt's workspace, which newer versions of torch take out of cuBLAS's: a small segment less."""
    lt = [b.size_bytes for b in checked.plan.device.kept if b.name == "cublaslt_workspace"]
    differences = []
    for predicted, found in zip(checked.plan.prediction.phases, checked.record.phases, strict=True):
        assert found.allocated_bytes is not None
        assert found.reserved_bytes is not None
        differences.append(
            (
                predicted.phase,
                found.allocated_bytes - predicted.allocated_peak_bytes,
                found.reserved_bytes - predicted.reserved_peak_bytes,
            )
        )
    allowed = {0, *(-size for size in lt)}
    assert all(a in allowed and r in {0, -2 * MIB} for _, a, r in differences), differences


@pytest.mark.gpu
@CARD[1]
def test_steps_take_outside_the_arena_what_the_plan_lists(checked: Ran) -> None:
    listed = {step.id: step.outside_bytes for step in checked.plan.steps}
    wrong = {
        step.id: (step.outside_bytes, listed[step.id])
        for step in checked.record.steps
        if step.outside_bytes is not None and step.outside_bytes > listed[step.id]
    }
    assert wrong == {}


@pytest.mark.gpu
@CARD[1]
def test_the_context_is_within_the_profile_s_error(checked: Ran) -> None:
    terms, found = checked.plan.device, checked.record.context_bytes
    assert found is not None
    assert abs(found - terms.context_bytes) <= terms.context_error_bytes, (
        f"{found / MIB:.0f} MiB measured, {terms.context_bytes / MIB:.0f} in the profile"
    )


@pytest.mark.gpu
@CARD[1]
def test_kernels_take_the_model_s_shapes_and_refuse_what_they_cannot() -> None:
    card = torch.device("cuda", 0)
    kernel = "flash" if torch.cuda.get_device_capability() >= (8, 0) else "efficient"
    tower = {"heads": 16, "kv_heads": 16, "head_dim": 80}
    language = {"heads": 16, "kv_heads": 2, "head_dim": 128}
    for shape, causal in ((tower, False), (language, True)):
        check_kernel(
            kernel, device=card, dtype=torch.float16, **shape, rows=512, keys=512, causal=causal
        )
        check_kernel(
            "efficient",
            device=card,
            dtype=torch.float32,
            **shape,
            rows=512,
            keys=512,
            causal=causal,
        )
    with pytest.raises(KernelRefused, match=r"flash attention, torch\.float32"):
        check_kernel("flash", device=card, dtype=torch.float32, **tower, rows=64, keys=64)
    with pytest.raises(KernelRefused, match="the CPU's kernel"):
        check_kernel("cpu_flash", device=card, dtype=torch.float32, **tower, rows=64, keys=64)


@pytest.mark.gpu
@CARD[1]
def test_the_cap_refuses_what_would_pass_the_budget_and_is_lifted_at_the_end() -> None:
    from executor.cuda import CudaDevice

    with closing(CudaDevice()) as device:
        device.allocate_arena(64 * MIB)
        device.reserve_outside(16 * MIB)
        budget = device.context_bytes() + torch.cuda.memory_reserved() + 256 * MIB
        device.cap(budget)
        kept = torch.empty(128 * MIB, dtype=torch.uint8, device="cuda")
        with pytest.raises(OutOfMemory, match="step: memory was refused"):
            with prepare.memory_errors("step"):
                torch.empty(192 * MIB, dtype=torch.uint8, device="cuda")
        del kept
        with pytest.raises(DoesNotFit, match="is below"):
            device.cap(MIB)
    torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")


@pytest.mark.gpu
@CARD[1]
def test_an_arena_beyond_what_others_left_is_refused_and_nothing_stays() -> None:
    from executor.cuda import CudaDevice

    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with closing(CudaDevice()) as device:
        free = torch.cuda.mem_get_info()[0]
        with pytest.raises(OutOfMemory, match=r"the arena needs .* the card has .* free"):
            device.allocate_arena(free + GIB)
    assert torch.cuda.memory_reserved() == before


@pytest.mark.gpu
@CARD[1]
def test_memory_refused_inside_a_step_names_it_and_the_next_run_is_well(
    labs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, name = labs.lab("cuda"), "all streamed, 2 slots"
    wanted = lab.expected(name)

    def greedy(*_: object) -> None:
        torch.empty(2**46, dtype=torch.uint8, device="cuda")

    with monkeypatch.context() as patch:
        patch.setitem(prepare.STEPS, "norm", greedy)
        with pytest.raises(RunFailed, match="prefill/norm: memory was refused"):
            lab._run(name, lab.plan(name), None)
    again = lab._run(name, lab.plan(name), None)
    assert torch.equal(again.tensors["tokens"], wanted.tensors["tokens"])


@pytest.mark.gpu
@CARD[1]
def test_runs_one_after_another_leave_nothing_on_the_card(labs: Any) -> None:
    lab, name = labs.lab("cuda"), "all streamed, kept in host memory"
    held = []
    for _ in range(5):
        lab._run(name, lab.plan(name), None)
        held.append((torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]))
    assert len({allocated for allocated, _ in held}) == 1, held
    assert held[1][1] - held[-1][1] <= 2 * MIB, held


@pytest.mark.gpu
@CARD[1]
def test_a_plan_for_the_card_can_be_made_for_every_image_size() -> None:
    checkpoint = spec.resolve_model("3b")
    for size in ("448x448", "1920x1080", "3840x2160"):
        image = workload.parse_image(size, **PIXELS)
        asked = workload.make_workload([image], **PIXELS, max_new_tokens=8)
        plan = search.search(search.Request(checkpoint, asked, None), profile_of("cuda"))
        assert plan.device.kind == "cuda"
