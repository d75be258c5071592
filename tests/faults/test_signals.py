"""Runs that are ended from outside, at chosen moments and at random ones: outputs are whole or absent."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of POSIX")

ROOT = Path(__file__).parents[2]
INTERRUPTED = "interrupted; everything was released, nothing half written\n"
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def check_whole(folder: Path) -> set[str]:
    """The names of the outputs that are there, each of them whole."""
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert found <= {"record.json", "out.safetensors"}
    if "record.json" in found:
        assert json.loads((folder / "record.json").read_text())["new_tokens"] > 0
    if "out.safetensors" in found:
        data = (folder / "out.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__")
        assert max(entry["data_offsets"][1] for entry in header.values()) == len(data) - 8 - length
        assert set(header) == {"image_features", "prefill_logits", "logits", "tokens"}
    return found


def words(lab: Any, folder: Path) -> list[str]:
    outputs = ("--record", folder / "record.json", "--save-outputs", folder / "out.safetensors")
    return lab.arguments(*map(str, outputs), plan=lab.long_file)  # type: ignore[no-any-return]


@pytest.mark.parametrize("number", CODES)
def test_a_run_ended_in_the_middle_leaves_nothing(
    number: signal.Signals, lab: Any, zygote: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "outputs"
    folder.mkdir()
    run = zygote.start(words(lab, folder))
    run.wait_for_answer()
    for _ in range(3):  # some people press it more than once
        run.send(number)
    outcome = run.end()
    assert (outcome.code, outcome.err) == (CODES[number], INTERRUPTED)
    assert list(folder.iterdir()) == []


@pytest.mark.full
def test_what_ignores_a_signal_goes_on_ignoring_it(lab: Any, tmp_path: Path) -> None:
    """As under nohup: the terminal may go away."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "executor.cli", *words(lab, folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert check_whole(folder) == {"record.json", "out.safetensors"}


def test_a_killed_run_leaves_no_outputs_and_the_next_one_succeeds(
    lab: Any, zygote: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "outputs"
    folder.mkdir()
    run = zygote.start(words(lab, folder))
    run.wait_for_answer()
    run.send(signal.SIGKILL)
    assert run.end().code == -signal.SIGKILL
    assert check_whole(folder) == set()
    assert zygote.start(words(lab, folder)).end().code == 0
    assert check_whole(folder) == {"record.json", "out.safetensors"}
    for hidden in folder.glob(".*.part"):  # nobody can clean up behind a kill
        for path in hidden.iterdir():
            path.unlink()
        hidden.rmdir()


@pytest.mark.parametrize("trials", [3, pytest.param(100, marks=pytest.mark.full)])
def test_a_run_ended_at_a_random_moment_leaves_whole_outputs_or_none(
    trials: int, lab: Any, zygote: Any, tmp_path: Path
) -> None:
    chance = random.Random(trials)
    laps = []
    for name in ("whole", "again"):
        start = time.monotonic()
        folder = tmp_path / name
        folder.mkdir()
        assert zygote.start(words(lab, folder)).end().code == 0
        laps.append(time.monotonic() - start)
    # a machine that was busy elsewhere for a while does not stretch every pause
    whole_s = min(laps)
    seen = set()
    for trial in range(trials):
        folder = tmp_path / str(trial)
        folder.mkdir()
        number = chance.choice(list(CODES))
        run = zygote.start(words(lab, folder))
        # the fork is there before its handlers are
        time.sleep(0.02 + chance.random() * whole_s)
        run.send(number)
        outcome = run.end()
        outputs = check_whole(folder)
        assert list(folder.glob(".*")) == [], (trial, outcome)
        if outcome.code == 0:  # it had ended before
            assert outputs == {"record.json", "out.safetensors"}
        else:
            assert (outcome.code, outcome.err) == (CODES[number], INTERRUPTED), trial
        seen.add(outcome.code)
    assert trials < 50 or len(seen) > 1


def test_two_runs_at_once_with_the_same_outputs_leave_one_of_them_whole(
    lab: Any, tmp_path: Path, zygote: Any
) -> None:
    folder = tmp_path / "outputs"
    folder.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "executor.cli", *words(lab, folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert said[0] == said[1]
    assert check_whole(folder) == {"record.json", "out.safetensors"}
    assert list(folder.glob(".*")) == []
