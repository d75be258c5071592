from __future__ import annotations

import errno
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from safetensors import safe_open

from executor import outputs
from executor.outputs import Outputs
from planner.errors import InputError, RunFailed


def test_the_file_holds_what_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    features = torch.randn(1000, 32).to(torch.bfloat16)
    logits = torch.randn(5, 64).to(torch.bfloat16)
    with Outputs(path) as out:
        out.append("image_features", features[:700])
        out.append("image_features", features[700:])
        out.append("prefill_logits", logits[:1])
        for i in range(5):
            out.append("logits", logits[i : i + 1])
            out.append("tokens", torch.tensor([i * 10]))
        assert not path.exists()
    with safe_open(str(path), "pt") as file:
        assert sorted(file.keys()) == ["image_features", "logits", "prefill_logits", "tokens"]
        assert torch.equal(file.get_tensor("image_features"), features)
        assert torch.equal(file.get_tensor("logits"), logits)
        assert torch.equal(file.get_tensor("prefill_logits"), logits[:1])
        tokens = file.get_tensor("tokens")
        assert tokens.dtype == torch.int64
        assert tokens.tolist() == [0, 10, 20, 30, 40]
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]


def test_rows_that_are_not_contiguous_are_saved_as_they_read(tmp_path: Path) -> None:
    rows = torch.randn(8, 6).T
    with Outputs(tmp_path / "o") as out:
        out.append("logits", rows)
    with safe_open(str(tmp_path / "o"), "pt") as file:
        assert torch.equal(file.get_tensor("logits"), rows)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RunFailed("memory")])
def test_nothing_is_left_behind_when_the_run_fails(tmp_path: Path, error: Any) -> None:
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"old")

    def failing() -> None:
        with Outputs(path) as out:
            out.append("logits", torch.zeros(1, 4))
            raise error

    with pytest.raises((KeyboardInterrupt, RunFailed)):
        failing()
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]
    assert path.read_bytes() == b"old"


def test_nothing_is_left_behind_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: IO[bytes] | int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(outputs.shutil, "copyfileobj", full)
    with pytest.raises(RunFailed, match="No space left on device; nothing was left behind"):
        with Outputs(tmp_path / "out") as out:
            out.append("logits", torch.zeros(1, 4))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        Outputs(tmp_path / "nowhere" / "out")
    with pytest.raises(InputError, match="is a folder"):
        Outputs(tmp_path)
