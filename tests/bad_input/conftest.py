"""The two command lines on a tiny random checkpoint, and what must hold whenever they refuse."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image as Pillow

import executor.cli
import planner.cli
from executor.make_checkpoint import make_random_checkpoint

ROOT = Path(__file__).parents[2]
BUDGET = (
    "1GiB"  # every run is in this process, which holds about 500 MiB once all tests are collected
)
PROMPT = "What is this?"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    def refused(self, words: str, *, code: int = 2) -> None:
        """One clear message on stderr with these words, and nothing else anywhere."""
        assert self.code == code, self.err
        assert self.out == ""
        assert self.err.startswith("error: "), self.err
        assert words in self.err
        assert "Traceback" not in self.err
        # further lines are indented details of the one message
        assert all(line.startswith("  ") for line in self.err.splitlines()[1:]), self.err


class Kit:
    """Commands that work, to be spoilt in one place; `folder` is the test's own."""

    def __init__(self, tiny: Path, image: Path, plan: Path, folder: Path, capfd: Any) -> None:
        self.tiny, self.image, self.plan_file, self.folder = tiny, image, plan, folder
        self.scratch = folder / "scratch"  # where temporary files go
        self._capfd = capfd

    def plan(self, *changes: str, out: Path | None = None, model: Path | None = None) -> Outcome:
        """`plan` for the CPU; options in `changes` come last and win."""
        given = ["--device", "cpu", "--vram", BUDGET, "--model", str(model or self.tiny)]
        given += ["--max-new-tokens", "3", *([] if out is None else ["--out", str(out)])]
        if not {"--prompt", "--prompt-tokens"} & set(changes):
            given += ["--prompt", PROMPT]
        if "--image" not in changes:
            given += ["--image", str(self.image)]
        return self._outcome(planner.cli.main([*given, *changes]))

    def arguments(
        self,
        *changes: str,
        plan: Path | None = None,
        model: Path | None = None,
        images: tuple[Path, ...] | None = None,
        prompt: str = PROMPT,
    ) -> list[str]:
        """Of an `execute` that says nothing but the answer."""
        files = (self.image,) if images is None else images
        return [
            *(str(plan or self.plan_file), "--model", str(model or self.tiny), "--quiet"),
            *(word for file in files for word in ("--image", str(file))),
            *("--prompt", prompt, *changes),
        ]

    def execute(self, *changes: str, **given: Any) -> Outcome:
        return self._outcome(executor.cli.main(self.arguments(*changes, **given)))

    def execute_without_plan(self, *changes: str) -> Outcome:
        return self._outcome(executor.cli.main(self.arguments(*changes)[1:]))

    def copy(self) -> Path:
        """A checkpoint to spoil."""
        return Path(shutil.copytree(self.tiny, self.folder / "spoilt"))

    def _outcome(self, code: int) -> Outcome:
        out, err = self._capfd.readouterr()
        return Outcome(code, out, err)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Checkpoint, image and plan."""
    folder = tmp_path_factory.mktemp("bad-input")
    make_random_checkpoint("tiny", folder / "tiny")
    values = np.random.default_rng(0).integers(0, 255, (56, 84, 3), dtype=np.uint8)
    Pillow.fromarray(values).save(folder / "a.png")
    words = ["--device", "cpu", "--vram", BUDGET, "--model", str(folder / "tiny")]
    words += ["--image", str(folder / "a.png"), "--prompt", PROMPT, "--max-new-tokens", "3"]
    assert planner.cli.main([*words, "--out", str(folder / "plan.json")]) == 0
    return folder / "tiny", folder / "a.png", folder / "plan.json"


@pytest.fixture
def kit(
    made: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[Kit]:
    """Nothing may be left in the folder of temporary files, nor a part of a file anywhere."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setenv("TMPDIR", str(scratch))
    capfd.readouterr()
    yield Kit(*made, tmp_path, capfd)
    assert list(scratch.iterdir()) == []
    assert list(tmp_path.rglob("*.part")) == []


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Start:
    """Start one of the command lines as a process of its own."""

    def begin(module: str, arguments: list[str], **given: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            **{
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "text": True,
                "errors": "replace",
                "env": os.environ | {"PYTHONPATH": str(ROOT)},
                **given,
            },
        )

    return begin
