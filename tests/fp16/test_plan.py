"""What a plan in float16 says and counts, and which dtype a device gets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import planner.cli
from planner.check import check
from planner.checkpoint.spec import builtin
from planner.checkpoint.template import unit_sizes
from planner.costs import Costs
from planner.dtype import in_dtype
from planner.errors import CheckpointError, InputError
from planner.plan import Plan, digest
from planner.plan.words import DTYPE_BYTES
from planner.profile import load_profile

OLD, NEW = "t4-16gb", "rtx-5080-16gb"


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> Plan:
    """The plan that the command line makes of these words."""
    assert planner.cli.main([*words, "--json"]) == 0
    return Plan.loads(capsys.readouterr().out)


def dtypes(plan: Plan, name: str) -> set[str]:
    return {view.dtype for buffer in plan.buffers for view in buffer.views if view.name == name}


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        (OLD, "auto", ("float16", "bfloat16")),
        (OLD, "float16", ("float16", "bfloat16")),
        (NEW, "auto", ("bfloat16", None)),
        (NEW, "bfloat16", ("bfloat16", None)),
        (NEW, "float16", ("float16", "bfloat16")),
        ("cpu", "auto", ("bfloat16", None)),
    ],
)
def test_a_device_without_bfloat16_gets_float16(
    device: str, dtype: str, expected: tuple[str, str | None]
) -> None:
    stored = builtin("3b")
    found = in_dtype(stored, load_profile(device), dtype)
    assert (found.shape.dtype, found.shape.stored) == expected
    assert found.shape.fingerprint == stored.shape.fingerprint
    # whatever it was made for before
    again = in_dtype(found, load_profile(NEW))
    assert again == stored


@pytest.mark.parametrize(
    ("stored", "device", "dtype", "words"),
    [
        ("bfloat16", OLD, "bfloat16", "wanted a device that has it, found t4-16gb"),
        ("float16", NEW, "bfloat16", "wanted weights stored in bfloat16.*found float16"),
        ("float32", NEW, "float16", "wanted weights stored in float16.*found float32"),
    ],
)
def test_what_cannot_be_converted_value_by_value_is_refused(
    stored: str, device: str, dtype: str, words: str
) -> None:
    model = builtin("3b")
    shape = model.shape.model_copy(update={"dtype": stored})
    with pytest.raises(InputError, match=words):
        in_dtype(replace(model, shape=shape), load_profile(device), dtype)
    if stored != "bfloat16":
        kept = in_dtype(replace(model, shape=shape), load_profile(OLD))
        assert (kept.shape.dtype, kept.shape.stored) == (stored, None)


def test_residual_streams_are_float32_and_all_else_is_as_large_as_before(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--model", "3b", "--device", OLD, "--vram", "8GB", "--image", "560x420")
    plan = planned(capsys, *words)
    assert check(plan) == []
    assert plan.model.dtype == "float16"
    assert dtypes(plan, "x") == dtypes(plan, "merged32") == {"float32"}
    for name in ("qkv", "gate", "k", "v", "hidden", "logits", "y", "merged", "pixels"):
        assert dtypes(plan, name) == {"float16"}, name
    tower = next(buffer for buffer in plan.buffers if buffer.name == "vision/x")
    patches, width = tower.views[0].shape
    assert patches * width * DTYPE_BYTES["float32"] <= tower.size_bytes
    other = builtin("3b").shape
    rows = plan.levers.tiles.vocabulary_rows
    assert {unit.id: unit.size_bytes for unit in plan.units} == unit_sizes(other, rows)
    assert {step.kernel for step in plan.steps} == {"efficient", None}


def test_the_wider_residual_stream_and_the_conversion_take_time() -> None:
    """Beside a float16 of the same rates without either, as the roofline and as measured tables have it."""
    for device in (OLD, "cpu"):
        profile = load_profile(device)
        wide = in_dtype(builtin("3b"), profile, "float16").shape
        narrow = wide.model_copy(update={"dtype": "bfloat16", "stored": None})
        ours, other = Costs(wide, profile), Costs(narrow, profile)
        for kind in ("self_attn", "text_mlp"):
            assert ours.text(kind, 256, 1024, 0) > other.text(kind, 256, 1024, 0)  # type: ignore[arg-type]
        size = 2**30
        assert ours.copy(size, first=True, cached=True) > other.copy(size, first=True, cached=True)
        assert ours.from_host(size) == other.from_host(size)


def test_the_screen_says_in_one_line_that_weights_are_converted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--model", "3b", "--vram", "8GB", "--image", "560x420"]
    assert planner.cli.main([*words, "--device", OLD]) == 0
    screen = capsys.readouterr().out
    line = "  dtype    float16; weights are converted from bfloat16 as they are read"
    assert line in screen.splitlines()
    assert planner.cli.main([*words, "--device", NEW]) == 0
    assert "dtype" not in capsys.readouterr().out


def test_the_plans_command_makes_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "3b", "--device", "cpu", "--image", "none", "--dtype", "float16")
    plan = planned(capsys, *words)
    assert "--dtype float16" in plan.request
    assert planned(capsys, *plan.request.split()[1:]) == plan
    assert "--dtype" not in planned(capsys, *words[:-2]).request


def test_a_plan_that_says_nothing_of_stored_weights_still_loads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--model", "3b", "--device", NEW, "--image", "none")
    plan = planned(capsys, *words)
    data = json.loads(plan.dumps())
    assert data["model"].pop("stored") is None
    data["digest"] = digest(data)
    assert Plan.loads(json.dumps(data)) == plan


def test_a_checkpoint_in_another_dtype_than_the_plan_is_refused(labs: Any, tmp_path: Path) -> None:
    lab = labs()
    plan = lab.plan("auto")
    tensors = lab.checkpoint().tensors
    half = {name: place._replace(dtype="float16") for name, place in tensors.items()}
    with pytest.raises(CheckpointError, match=r"wants it stored in bfloat16, .* has it in float16"):
        lab.run(plan, locations=half)
