"""Folders that take no files, systems without /proc, and many requests in one process."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

import executor.run
from executor import memory
from executor.record import Record
from executor.run import run
from planner.errors import RunFailed

# --- folders ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something was run")

    monkeypatch.setattr(executor.run, "run", refuse)


@pytest.mark.usefixtures("no_run")
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
@pytest.mark.parametrize("option", ["--record", "--save-outputs"])
def test_a_folder_that_takes_no_files_is_told_before_the_run(option: str, execute: Any) -> None:
    # not even root may write there
    outcome = execute(option, "/proc/file")
    outcome.refused(f"{option} /proc/file: no file can be made in /proc", code=2)
    assert outcome.out == ""


@pytest.mark.usefixtures("no_run")
@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_why_a_folder_takes_no_files_is_said(
    error: int, execute: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    execute("--record", str(tmp_path / "record.json")).refused(os.strerror(error), code=2)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
@pytest.mark.usefixtures("no_run")
def test_a_read_only_folder_is_told_before_the_run(execute: Any, tmp_path: Path) -> None:
    folder = tmp_path / "read only"
    folder.mkdir(mode=0o500)
    execute("--save-outputs", str(folder / "out")).refused("Permission denied", code=2)


def test_a_library_caller_is_told_before_the_run_as_well(lab: Any) -> None:
    steps: list[str] = []
    request = lab.request(save_outputs=Path("/proc/out"), on_step=steps.append)
    failure = lab.fails(lab.resident, request)
    assert isinstance(failure, RunFailed)
    assert steps == []


def test_the_look_beforehand_leaves_nothing(execute: Any, tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    folder.mkdir()
    old = folder / "record.json"
    old.write_text("older")
    execute("--record", str(old), "--max-new-tokens", "0").refused("wanted 1 or more", code=2)
    assert [path.name for path in folder.iterdir()] == ["record.json"]
    assert old.read_text() == "older"


# --- no /proc -----------------------------------------------------------------------------------------------------


def test_without_proc_a_run_succeeds_and_says_that_peaks_are_unknown(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    import executor.cli

    nowhere = tmp_path / "no such folder"
    read = memory._lines
    monkeypatch.setattr(memory, "_PROC", nowhere)
    monkeypatch.setattr(
        memory, "_lines", lambda path: [] if path.parts[:2] == ("/", "proc") else read(path)
    )
    record = tmp_path / "record.json"
    words = lab.arguments("--record", str(record), "--check")
    words.remove("--quiet")
    capfd.readouterr()
    assert executor.cli.main(words) == 0
    _, err = capfd.readouterr()
    assert "device peaks were not recorded" in " ".join(err.split())
    found = Record.load(record)
    assert found.peak_bytes is None
    assert not found.passed_budget
    assert {phase.peak_bytes for phase in found.phases} == {None}
    assert not nowhere.exists()


# --- many requests ------------------------------------------------------------------------------------------------


def resident() -> int:
    memory.malloc_trim()
    reading = memory.read_memory()
    assert reading is not None
    return reading.anonymous_bytes


def growth(lab: Any, requests: int, *, plan: Any) -> float:
    """Bytes a request by which the process grew over the later three quarters, by least squares."""
    held = []
    for _ in range(requests):
        result = run(plan, lab.request(max_new_tokens=2))
        assert len(result.tokens) == 2
        held.append(resident())
    later = held[requests // 4 :]
    middle, mean = (len(later) - 1) / 2, sum(later) / len(later)
    above = sum((i - middle) * (value - mean) for i, value in enumerate(later))
    return above / sum((i - middle) ** 2 for i in range(len(later)))


@pytest.mark.skipif(memory.read_memory() is None, reason="nobody tells what is held")
def test_twenty_requests_do_not_make_the_process_grow(lab: Any) -> None:
    # a run's arena has 3 MB; what tests before this one left may still settle
    assert growth(lab, 20, plan=lab.streamed) < 48 * 1024


@pytest.mark.full
@pytest.mark.skipif(memory.read_memory() is None, reason="nobody tells what is held")
@pytest.mark.parametrize("streamed", [False, True])
def test_200_requests_do_not_make_the_process_grow(lab: Any, streamed: bool) -> None:
    plan = lab.streamed if streamed else lab.resident
    assert abs(growth(lab, 200, plan=plan)) < 1024
