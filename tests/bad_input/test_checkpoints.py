from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

WEIGHTS = "model.safetensors"
NORM = "model.norm.weight"


def change(folder: Path, name: str, make: Callable[[Any], Any]) -> None:
    """Write the weights anew with one tensor changed."""
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = np.ascontiguousarray(make(tensors[name]))
    save_file(tensors, folder / WEIGHTS)


def shard(folder: Path) -> list[Path]:
    """Split the weights in two files with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return [folder / file for file in parts]


def missing_shard(folder: Path) -> None:
    shard(folder)[1].unlink()


def truncated_shard(folder: Path) -> None:
    last = shard(folder)[1]
    last.write_bytes(last.read_bytes()[:-5])


def header_length(value: int) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(value.to_bytes(8, "little") + content[8:])

    return spoil


def config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def text(name: str, content: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_text(content)

    return spoil


def without(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()

    return spoil


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (missing_shard, "wanted 2 shards, 1 of them missing: 'model-00002-of-00002.safetensors'"),
        (truncated_shard, "model-00002-of-00002.safetensors: truncated: wanted"),
        (header_length(2**40), "wanted a header of 1099511627776 bytes behind the first 8, found"),
        (header_length(2**24), "wanted a header of 16777216 bytes behind the first 8, found"),
        (header_length(3), "the file is damaged or of another format"),
        (lambda f: change(f, NORM, lambda t: t[:-1]), f"tensor {NORM}: wanted [64] as config.json"),
        (lambda f: change(f, NORM, lambda t: t.astype("f2")), f"tensor {NORM}: wanted float32"),
        (lambda f: change(f, NORM, lambda t: t.astype("i1")), f"tensor {NORM}: wanted BF16, F16"),
        (config(model_type="llava"), "only Qwen2.5-VL is supported"),
        (config(quantization_config={"bits": 4}), "quantised checkpoints are not supported"),
        (without("config.json"), "config.json: wanted a file, found none"),
        (text("config.json", "{"), "config.json: "),
        (text("config.json", "[1]"), "config.json: "),
        (without(WEIGHTS), WEIGHTS),
        (text(WEIGHTS, ""), "wanted at least 8 bytes, found 0"),
        (text("tokenizer.json", "{}"), "tokenizer.json: cannot be read as a tokenizer"),
        (text("tokenizer.json", ""), "tokenizer.json: cannot be read as a tokenizer"),
        (text("generation_config.json", "nonsense"), "generation_config.json: "),
        (text("preprocessor_config.json", "7"), "preprocessor_config.json: "),
        (empty, "config.json: wanted a file, found none"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_both_commands(
    spoil: Callable[[Path], None], words: str, kit: Any
) -> None:
    folder = kit.copy()
    spoil(folder)
    out = kit.folder / "plan.json"
    kit.plan(model=folder, out=out).refused(words)
    assert not out.exists()
    record = kit.folder / "record.json"
    kit.execute("--record", str(record), model=folder).refused(words)
    assert not record.exists()


def test_a_sharded_checkpoint_runs_the_plan_of_the_whole_one(kit: Any) -> None:
    folder = kit.copy()
    shard(folder)
    sharded, whole = kit.execute(model=folder), kit.execute()
    assert sharded == whole
    assert sharded.code == 0


def test_without_a_tokenizer_the_prompt_is_bounded_but_nothing_runs(kit: Any) -> None:
    folder = kit.copy()
    without("tokenizer.json")(folder)
    out = kit.folder / "plan.json"
    planned = kit.plan(model=folder, out=out)
    assert planned.code == 0
    assert "at most" in planned.out
    kit.execute(model=folder, plan=out).refused("needs the checkpoint's tokenizer.json")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("/nowhere/at/all", "the folder of a checkpoint"),
        ("nobody/nothing", "in the local Hugging Face cache"),
        ("", "the folder of a checkpoint"),
    ],
)
def test_a_model_that_is_not_there_is_refused_by_both_commands(
    model: str, words: str, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(kit.folder))
    kit.plan("--model", model).refused(words)
    if model:  # without one, execute says that the option is missing
        kit.execute("--model", model).refused(words)


def test_a_file_in_place_of_the_folder_is_refused_by_both_commands(kit: Any) -> None:
    kit.plan("--model", str(kit.image)).refused("a file of that name")
    kit.execute("--model", str(kit.image)).refused("a file of that name")
