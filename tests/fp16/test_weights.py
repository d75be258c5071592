"""Weights on their way from bfloat16 files: every value as float16 rounds it, or a refusal that names the tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import executor.cli
import planner.cli
from executor.convert import MOST, PIECE_VALUES, Float16Files, weight_files
from executor.files import Files
from executor.weights import EmbeddingRows
from planner.errors import CheckpointError
from planner.plan.shapes import TensorLocation


def written(folder: Path, **tensors: torch.Tensor) -> dict[str, TensorLocation]:
    """The tensors in one file, one behind another after 12 bytes."""
    path, offset, places = folder / "weights", 12, {}
    data = bytes(12)
    for name, tensor in tensors.items():
        size = 2 * tensor.numel()
        places[name] = TensorLocation(path, offset, size, tuple(tensor.shape), "bfloat16")
        data += tensor.view(torch.uint8).numpy().tobytes()
        offset += size
    path.write_bytes(data)
    return places


def read(places: dict[str, TensorLocation], *sizes: int) -> torch.Tensor:
    """Everything of the file as float16, read into pieces of memory of these sizes."""
    target = torch.zeros(sum(sizes), dtype=torch.uint8)
    view, parts = target.numpy().data, []
    for size in sizes:
        parts.append(view[:size])
        view = view[size:]
    files = Float16Files(places)
    try:
        files.read(next(iter(places.values())).path, 12, parts)
    finally:
        files.close()
    return target.view(torch.float16)


def test_every_value_in_range_is_rounded_as_float16_rounds_it(tmp_path: Path) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = bits.view(torch.bfloat16)
    every = every[every.float().abs() <= MOST]
    assert every.numel() > 36000 > PIECE_VALUES  # more than one piece
    found = read(written(tmp_path, a=every), 2 * every.numel())
    assert torch.equal(found, every.float().half())
    exact = every.float().abs() >= 2.0**-14
    assert torch.equal(found.float()[exact], every.float()[exact])
    lost = (found == 0) & (every != 0)
    assert lost.any()
    assert every[lost].abs().max() <= 2.0**-25


@pytest.mark.parametrize("value", [65536.0, -3e38, float("inf"), float("nan")])
def test_a_value_that_float16_cannot_hold_is_refused_with_its_tensor(
    tmp_path: Path, value: float
) -> None:
    first, second = torch.ones(PIECE_VALUES + 100).bfloat16(), torch.ones(50).bfloat16()
    second[0] = value
    places = written(tmp_path, first=first, second=second, third=second)
    total = 2 * (first.numel() + 100)
    with pytest.raises(CheckpointError, match=r"tensor second: .*65504 at most, found .*bfloat16"):
        read(places, 2 * PIECE_VALUES, total - 2 * PIECE_VALUES)
    first[-1] = value
    with pytest.raises(CheckpointError, match=r"tensor first: "):
        read(written(tmp_path, first=first, second=second), total - 100)


def test_weights_are_read_as_they_are_where_nothing_is_to_be_converted(labs: Any) -> None:
    lab = labs()
    for dtype, kind in (("bfloat16", Files), ("float16", Float16Files)):
        checkpoint = lab.checkpoint(dtype)
        assert type(weight_files(checkpoint.shape, checkpoint.tensors)) is kind


def test_rows_of_the_embedding_table_keep_all_their_bits(tmp_path: Path) -> None:
    table = torch.randn(300, 8).bfloat16()
    table[5] = 1e30  # in a table that is read in float32 nothing is out of range
    places = written(tmp_path, **{EmbeddingRows.NAME: table})
    rows = EmbeddingRows(places, (300, 8))
    out = torch.zeros(600, 8)
    ids = torch.randint(300, (600,))
    rows(ids, out)
    assert torch.equal(out, table.float()[ids])
    rows.close()


def test_a_checkpoint_out_of_range_is_refused_from_the_command_line(
    labs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(labs().file)
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = 1e5
    for path in labs().folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    plan = tmp_path / "plan.out"
    words = ["--model", str(tmp_path), "--image", "none", "--prompt-tokens", "40"]
    words += ["--device", "cpu", "--dtype", "float16", "--max-new-tokens", "2"]
    assert planner.cli.main([*words, "--out", str(plan)]) == 0
    capsys.readouterr()
    words = [str(plan), "--model", str(tmp_path), "--prompt", "Hello", "--quiet"]
    assert executor.cli.main(words) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "tensor model.layers.2.mlp.up_proj.weight: wanted values that float16" in message
    assert "found 99840" in message
