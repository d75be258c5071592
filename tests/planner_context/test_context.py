"""The CPU's context in a plan: what it grows with, and that the process which executes measures the same."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from executor.cli import main
from executor.make_checkpoint import make_random_checkpoint
from executor.memory import read_memory
from planner import search, workload
from planner.checkpoint import spec
from planner.problem import Problem
from planner.profile import load_profile
from planner.units import MIB

SHAPES = frozenset({(1024, 1280, 3840), (1024, 2048, 2048), (1, 2048, 2048)})


@lru_cache(maxsize=1)
def published() -> spec.Checkpoint:
    return spec.resolve_model("3b")


def problem(
    checkpoint: spec.Checkpoint, profile: str = "cpu", images: tuple[str, ...] = ()
) -> Problem:
    asked = workload.make_workload(
        [workload.parse_image(name, min_pixels=3136, max_pixels=12845056) for name in images],
        min_pixels=3136,
        max_pixels=12845056,
        n_text_tokens=20,
    )
    return Problem(search.Request(checkpoint, asked, None), load_profile(profile))


def test_the_context_is_the_fixed_part_and_what_each_shape_keeps() -> None:
    p = problem(published())
    assert p.context_bytes(frozenset()) == p.fixed_context_bytes
    grown = p.context_bytes(SHAPES) - p.fixed_context_bytes
    assert grown == sum(p.kept_bytes(shape) for shape in SHAPES)
    # q_proj and o_proj, at one row and at many: four things kept for two shapes
    assert p.kept_bytes((1024, 2048, 2048)) > 2 * p.kept_bytes((1, 2048, 2048)) / 2 > MIB


def test_a_card_s_context_does_not_depend_on_shapes() -> None:
    p = problem(published(), "rtx-5080-16gb")
    assert p.context_bytes(SHAPES) == load_profile("rtx-5080-16gb").context_bytes


def test_a_tokenizer_written_with_spaces_counts_as_one_without() -> None:
    def context(size_bytes: int) -> int:
        return problem(replace(published(), tokenizer_bytes=size_bytes)).fixed_context_bytes

    assert context(11_422_654) == context(7_031_645) > context(2_925_380) > context(0)
    # 151,643 words and 151,387 merges
    assert 51 * MIB < context(7_031_645) - context(0) < 57 * MIB


def test_attention_over_an_image_is_kept_with_the_product_before_it() -> None:
    keys_and_values = (3996, 1280, 2560)
    alone = problem(published()).kept_bytes(keys_and_values)
    assert problem(published(), images=("1024x768",)).kept_bytes(keys_and_values) > alone + MIB


def test_another_image_s_rows_are_not_attended_with_this_one_s_keys() -> None:
    one, other = (
        problem(published(), images=images).kept_bytes((1024, 1280, 2560))
        for images in (("448x448",), ("448x448", "1024x768"))
    )
    assert one == other


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("context")
    make_random_checkpoint("tiny", folder / "tiny")
    Pillow.new("RGB", (448, 448), (90, 120, 30)).save(folder / "image.png")
    return {"folder": folder, "model": folder / "tiny", "image": folder / "image.png"}


def executed(tiny: dict[str, Any], *options: str) -> dict[str, Any]:
    """The record of an `execute` in a process of its own."""
    record = tiny["folder"] / "record.json"
    command = [
        *(sys.executable, "-m", "executor.cli", *options, "--model", str(tiny["model"])),
        *("--image", str(tiny["image"]), "--prompt", "What is this?", "--max-new-tokens", "2"),
        *("--record", str(record), "--quiet"),
    ]
    root = Path(search.__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(record.read_text())
    return found


@pytest.mark.skipif(read_memory() is None, reason="this system has no /proc")
def test_planning_on_the_spot_leaves_nothing_in_the_context(tiny: dict[str, Any]) -> None:
    checkpoint = spec.read_checkpoint(tiny["model"])
    image = workload.parse_image(
        str(tiny["image"]), min_pixels=checkpoint.min_pixels, max_pixels=checkpoint.max_pixels
    )
    asked = workload.make_workload(
        [image],
        min_pixels=checkpoint.min_pixels,
        max_pixels=checkpoint.max_pixels,
        text="What is this?",
        tokenizer_json=checkpoint.tokenizer_json,
        max_new_tokens=2,
    )
    plan = search.search(search.Request(checkpoint, asked, 2 * 10**9), load_profile("cpu"))
    plan.save(tiny["folder"] / "plan.json")
    from_file = executed(tiny, str(tiny["folder"] / "plan.json"))["context_bytes"]
    on_the_spot = executed(tiny, "--vram", "2GB")["context_bytes"]
    assert abs(from_file - on_the_spot) < 2 * MIB


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--vram", "50MiB"], 3, "error: no plan fits 50MiB (0.05 GiB)"),
        (["--vram", "16"], 2, "error: --vram: wanted a size such as 16GB"),
        (["--vram", "2GB", "--max-new-tokens", "0"], 2, "error: "),
    ],
)
def test_what_is_wrong_while_planning_on_the_spot_is_said_as_plan_says_it(
    tiny: dict[str, Any],
    options: list[str],
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--model", str(tiny["model"]), "--image", str(tiny["image"]), "--prompt=-why?"]
    assert main([*options, *given]) == code
    err = capsys.readouterr().err
    assert err.startswith(words), err
    assert "Traceback" not in err
    assert err.count("error: ") == 1
