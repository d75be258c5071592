"""The README's commands, run as they stand there; a checkpoint's folder is a tiny random one."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

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


def test_every_command_of_the_readme_runs(tmp_path: Path) -> None:
    for folder in FOLDERS:
        (tmp_path / folder).parent.mkdir(parents=True, exist_ok=True)
        make_random_checkpoint("tiny", tmp_path / folder)
    for name in ("photo.jpg", "scan.png"):
        Image.new("RGB", (320, 240), "teal").save(tmp_path / name)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command in commands():
        program, *arguments = shlex.split(command)
        module = "planner.cli" if program == "plan" else "executor.cli"
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
