from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from executor.cli import main
from executor.record import Record
from planner.plan import Plan
from planner.units import MIB


@pytest.fixture(scope="module")
def plan_file(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    # wide enough for whatever the tests before left in this process
    tiny.plan(budget_bytes=8192 * MIB).save(path)
    return path


@pytest.fixture
def ordinary(tiny: Any, plan_file: Path) -> list[str]:
    """A command that works."""
    return [
        str(plan_file),
        *("--model", str(tiny.folder)),
        *("--image", str(tiny.image)),
        *("--prompt", tiny.PROMPT),
    ]


def test_the_answer_is_on_stdout_and_the_table_on_stderr(
    ordinary: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.json"
    assert main([*ordinary, "--record", str(record)]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert "predicted and recorded device bytes" not in out
    assert "predicted and recorded device bytes, cpu" in err
    assert re.search(r"budget +8\.00 GiB: kept", err)
    assert 1 <= Record.load(record).new_tokens <= 5
    assert json.loads(record.read_text())["check"] is False


def test_on_a_terminal_a_bar_runs_until_the_first_token(
    ordinary: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(ordinary) == 0
    plain = capsys.readouterr()
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(ordinary) == 0
    out, err = capsys.readouterr()
    assert out == plain.out
    assert "vision/merger" in err
    assert "decode/" not in err
    assert "vision/merger" not in plain.err


def test_quiet_leaves_the_answer_alone(
    ordinary: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ordinary, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert err == ""


def test_a_plan_is_made_on_the_spot_for_a_budget(
    tiny: Any, ordinary: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--vram", "8GiB", *ordinary[1:], "--max-new-tokens", "2", "--check"]) == 0
    assert "kept" in capsys.readouterr().err
    assert main(["--vram", "50MiB", *ordinary[1:]]) == 3
    assert capsys.readouterr().err.startswith("error: ")


def test_a_peak_above_the_budget_is_exit_code_4(
    tiny: Any, ordinary: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tiny.plan(budget_bytes=500 * MIB)
    # a plan that promises a peak of next to nothing is not refused at the start
    prediction = plan.prediction.model_copy(update={"expected_peak_bytes": 0})
    device = plan.device.model_copy(update={"budget_bytes": MIB, "context_bytes": 10**12})
    path = tmp_path / "plan.json"
    plan.model_copy(update={"prediction": prediction, "device": device}).save(path)
    assert main([str(path), *ordinary[1:]]) == 4
    assert "error: passed the budget: " in capsys.readouterr().err


def test_a_plan_that_does_not_fit_any_more_is_exit_code_3(
    tiny: Any, ordinary: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tiny.plan(budget_bytes=500 * MIB)
    device = plan.device.model_copy(update={"budget_bytes": MIB})
    path = tmp_path / "plan.json"
    plan.model_copy(update={"device": device}).save(path)
    assert main([str(path), *ordinary[1:]]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: the plan does not fit any more: it needs" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a plan file, or --vram"),
        (["PLAN", "--vram", "16GB"], "give one of them"),
        (["PLAN"], "--model is missing"),
        (["PLAN", "--model", "DIR"], "--prompt is missing"),
        (["PLAN", "--model", "DIR", "--prompt", "x", "--image", "no.png"], "no such file"),
        (["PLAN", "--model", "/nowhere", "--prompt", "x"], "model: wanted"),
        (["PLAN", "--model", "3b", "--prompt", "x"], "without weights"),
        (["/nowhere.json", "--model", "DIR", "--prompt", "x"], "cannot be read as a plan"),
        (["PLAN", "--model", "DIR", "--prompt", "x"], "for 1 images, found 0"),
        (["PLAN", "--model", "DIR", "--prompt", " ", "--image", "IMAGE"], "found an empty text"),
        (["ALL", "--temperature", "-1"], "temperature: wanted"),
        (["ALL", "--temperature", "hot"], "invalid float value: 'hot'"),
        (["ALL", "--top-p", "2"], "top-p: wanted"),
        (["ALL", "--seed", "-1"], "seed: wanted"),
        (["ALL", "--max-new-tokens", "6"], "the plan has room for 5"),
        (["ALL", "--max-new-tokens", "many"], "wanted a whole number, found 'many'"),
        (["ALL", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["ALL", "--device", "cuda"], "the plan is for cpu"),
        (["ALL", "--record", "/nowhere/r.json"], "the folder /nowhere does not exist"),
        (["ALL", "--save-outputs", "/nowhere/o"], "the folder /nowhere does not exist"),
        (["ALL", "--record", "r.a", "--save-outputs", "r.a"], "wanted a file of its own"),
        (["ALL", "--record", "PLAN"], "found one that is read here"),
        (["ALL", "--save-outputs", "IMAGE"], "found one that is read here"),
        (
            ["ALL", "--prompt", "y", "--record", "r.a", "--save-outputs", "r-2.a"],
            "--record r-2.a: wanted a file of its own",
        ),
        (["ALL", "--temp", "1"], "unrecognized arguments: --temp"),
        (["ALL", "--odd"], "unrecognized arguments: --odd; see: execute --help"),
        (["--vram", "16", "REST"], "--vram: wanted a size such as 16GB"),
        (["--make-random-checkpoint", "huge", "/tmp/never"], "huge"),
        (["--make-random-checkpoint", "tiny", "never", "--check"], "beside it, not --check"),
        (["PLAN", "--make-random-checkpoint", "tiny", "never"], "beside it, not a plan"),
        (["--probe", "--replan"], "beside it, not --replan"),
        (["--probe", "--max-new-tokens", "3"], "beside it, not --max-new-tokens"),
        (["--download", "--vram", "1GB", "--model", "x", "--prompt", "x"], "wanted a hub id"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    tiny: Any,
    ordinary: list[str],
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # where a file would be written by mistake
    known: dict[str, list[str]] = {
        "PLAN": ordinary[:1],
        "DIR": [str(tiny.folder)],
        "IMAGE": [str(tiny.image)],
        "ALL": ordinary,
        "REST": ordinary[1:],
    }
    given = [part for word in arguments for part in known.get(word, [word])]
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.startswith("error: ") or err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err


def test_a_random_checkpoint_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--make-random-checkpoint", "tiny", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "config.json").is_file()
    out, err = capsys.readouterr()
    assert out == ""
    assert "of random weights (tiny)" in err


def test_help_names_every_exit_code_in_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "130 interrupted" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_plan_whose_command_cannot_be_read_is_not_planned_anew(
    ordinary: list[str],
    plan_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    odd = tmp_path / "odd.json"
    Plan.load(plan_file).model_copy(update={"request": "plan --model 'tiny"}).save(odd)
    monkeypatch.setattr("executor.memory.available_bytes", lambda: 0)
    assert main([str(odd), *ordinary[1:], "--replan"]) == 2
    assert "error: request: wanted the command that makes the plan" in capsys.readouterr().err


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "executor.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )


def test_an_interrupt_is_exit_code_130_and_one_line(ordinary: list[str], tmp_path: Path) -> None:
    process = start([*ordinary, "--save-outputs", str(tmp_path / "out")])
    assert process.stderr is not None
    process.stderr.readline()  # the run has begun
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted" in err.splitlines()[-1]
    assert b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_reader_of_the_answer_that_leaves_is_no_traceback(ordinary: list[str]) -> None:
    process = start(ordinary)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert b"Traceback" not in err
    assert b"BrokenPipe" not in err
