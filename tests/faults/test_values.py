"""Weights that are not numbers."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from executor.generate import Sampling, next_token
from planner.errors import NotFinite

NAN, INFINITE = struct.pack("<f", float("nan")), struct.pack("<f", float("inf"))


def spoil(lab: Any, folder: Path, name: str, value: bytes) -> dict[str, Any]:
    """A copy of the checkpoint with one value of one tensor replaced; where its tensors lie."""
    copy = lab.copy(folder)
    moved: dict[str, Any] = lab.moved(copy)
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(moved[name].offset_bytes)
        file.write(value)
    return moved


TENSORS = {
    "visual.patch_embed.proj.weight": "vision/patch_embed",
    "visual.blocks.1.attn.qkv.weight": "vision/blocks.1.attn",
    "visual.merger.mlp.2.weight": "prefill/embed_tokens",
    "model.layers.2.mlp.down_proj.weight": "prefill/layers.2.mlp",
    "model.norm.weight": "prefill/norm",
    "lm_head.weight": "prefill/sample",
}


@pytest.mark.parametrize("name", ["visual.blocks.1.attn.qkv.weight", "lm_head.weight"])
def test_a_weight_that_is_not_a_number_ends_the_run_in_words(
    name: str, lab: Any, tmp_path: Path
) -> None:
    request = lab.request(locations=spoil(lab, tmp_path, name, NAN), save_outputs=tmp_path / "out")
    failure = lab.fails(lab.resident, request)
    assert isinstance(failure, NotFinite)
    assert "the logits are not finite (nan)" in str(failure)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "step"), TENSORS.items())
def test_a_check_run_names_the_first_step_that_is_not_finite(
    name: str, step: str, lab: Any, tmp_path: Path
) -> None:
    failure = lab.fails(
        lab.streamed, lab.request(locations=spoil(lab, tmp_path, name, NAN), check=True)
    )
    assert isinstance(failure, NotFinite)
    assert str(failure).startswith(f"{step}: the first step where ")


def test_an_infinite_weight_is_told_as_well(lab: Any, tmp_path: Path) -> None:
    moved = spoil(lab, tmp_path, "lm_head.weight", INFINITE)
    sampling = Sampling(temperature=1.0, top_p=0.9)
    failure = lab.fails(lab.resident, lab.request(locations=moved, sampling=sampling))
    assert "the logits are not finite (" in str(failure)


def test_not_a_number_is_one_line_on_the_command_line(lab: Any, tmp_path: Path, capfd: Any) -> None:
    import executor.cli

    spoil(lab, tmp_path, "model.norm.weight", NAN)
    words = lab.arguments()
    words[words.index("--model") + 1] = str(tmp_path / "spoilt")
    capfd.readouterr()
    assert executor.cli.main(words) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: the logits are not finite (nan)")
    assert err.count("\n") == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_choose_nothing(temperature: float, value: float) -> None:
    logits = torch.zeros(8)
    logits[3] = value
    seen = torch.zeros(8, dtype=torch.bool)
    with pytest.raises(NotFinite, match="not finite"):
        next_token(logits, seen, Sampling(temperature=temperature))


def test_ids_that_are_ruled_out_are_no_fault() -> None:
    logits = torch.full((8,), float("-inf"))
    logits[5] = 1.0
    seen = torch.zeros(8, dtype=torch.bool)
    assert next_token(logits, seen, Sampling(temperature=1.0)) == 5
