"""The README's commands, run as they stand there; a checkpoint's folder is a tiny random one."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from executor.make_checkpoint import make_random_checkpoint

ROOT = Path(__file__).parents[2]
FOLDERS = ("path/to/checkpoint", "Qwen2.5-VL-3B-Instruct")


def commands() -> list[str]:
    lines = (ROOT / "README.md").read_text().splitlines()
    return [line.strip() for line in lines if line.startswith(("    plan ", "    execute "))]


def test_the_readme_shows_both_commands() -> None:
    assert {command.split()[0] for command in commands()} == {"plan", "execute"}
    assert len(commands()) >= 5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README's commands name."""
    place = tmp_path_factory.mktemp("readme")
    for folder in FOLDERS:
        (place / folder).parent.mkdir(parents=True, exist_ok=True)
        make_random_checkpoint("tiny", place / folder)
    for name in ("photo.jpg", "other.jpg", "scan.png"):
        Image.new("RGB", (320, 240), "teal").save(place / name)
    return place


def ran(place: Path, *words: str) -> str:
    """What Python says on stdout; it must end well."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
    return done.stdout


def test_every_command_of_the_readme_runs(place: Path) -> None:
    for command in commands():
        program, *arguments = shlex.split(command)
        ran(place, "-m", "planner.cli" if program == "plan" else "executor.cli", *arguments)


def test_the_session_of_the_readme_runs(place: Path) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    words = ["--device", "cpu", "--model", FOLDERS[1], "--image", "photo.jpg"]
    words += ["--prompt", "Which colour is it?", "--max-new-tokens", "4", "--out", "plan.json"]
    ran(place, "-m", "planner.cli", *words)
    ran(place, "-c", program)
