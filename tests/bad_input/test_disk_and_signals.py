from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits and signals of POSIX")

Start = Callable[..., Any]


def limit_files(size_bytes: int) -> None:
    """No file grows beyond this: what a full disk is to a program. (Python ignores SIGXFSZ.)"""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))


def failed(process: Any, words: str, *, code: int = 1) -> str:
    """What came out of it; one clear message on stderr."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    last = err.splitlines()[-1]
    assert last.startswith("error: "), err
    assert words in last
    assert "Traceback" not in err
    return str(out)


def test_a_full_disk_leaves_no_plan_behind(kit: Any, start: Start) -> None:
    out = kit.folder / "out"
    out.mkdir()
    words = ["--device", "cpu", "--model", str(kit.tiny), "--image", str(kit.image)]
    process = start(
        "planner.cli",
        [*words, "--out", str(out / "plan.json")],
        preexec_fn=partial(limit_files, 4096),
    )
    failed(process, "plan.json: cannot be written: File too large; nothing was left behind")
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("option", ["--record", "--save-outputs"])
def test_a_full_disk_leaves_nothing_of_a_run_behind(option: str, kit: Any, start: Start) -> None:
    out = kit.folder / "out"
    out.mkdir()
    process = start(
        "executor.cli",
        kit.arguments(option, str(out / "file")),
        preexec_fn=partial(limit_files, 1024),
    )
    failed(process, "file: cannot be written: File too large; nothing was left behind")
    assert list(out.iterdir()) == []


def test_a_plan_that_was_there_survives_a_full_disk(kit: Any, start: Start) -> None:
    path = kit.folder / "plan.json"
    path.write_text("older")
    words = ["--device", "cpu", "--model", str(kit.tiny), "--out", str(path)]
    process = start("planner.cli", words, preexec_fn=partial(limit_files, 4096))
    failed(process, "cannot be written")
    assert path.read_text() == "older"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("json", [True, False])
def test_a_report_that_cannot_be_printed_is_a_failed_run(
    json: bool, kit: Any, start: Start
) -> None:
    words = ["--device", "cpu", "--model", str(kit.tiny), *(["--json"] if json else [])]
    with open("/dev/full", "w") as full:
        process = start("planner.cli", words, stdout=full)
        failed(process, "stdout: cannot be written: No space left on device")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    "words",
    [
        "devices",
        "devices --json",
        "devices cpu",
        "replay {snapshot}",
        "replay --json {snapshot}",
        "pack {table} --capacity 8",
    ],
)
def test_a_commands_output_that_cannot_be_printed_is_a_failed_run(
    words: str, tmp_path: Path, start: Start
) -> None:
    table, snapshot = tmp_path / "table.csv", tmp_path / "snapshot.json"
    table.write_text("id,lower,upper,size\na,0,1,8\n")
    snapshot.write_text('{"segments": [], "device_traces": []}')
    filled = words.format(table=table, snapshot=snapshot).split()
    with open("/dev/full", "w") as full:
        process = start("planner.cli", filled, stdout=full)
        failed(process, "stdout: cannot be written: No space left on device")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_answer_that_cannot_be_printed_is_a_failed_run(kit: Any, start: Start) -> None:
    record = kit.folder / "record.json"
    with open("/dev/full", "w") as full:
        process = start("executor.cli", kit.arguments("--record", str(record)), stdout=full)
        failed(process, "stdout: cannot be written: No space left on device")
    assert not record.exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
def test_a_folder_that_takes_no_files_is_refused_at_the_start(kit: Any) -> None:
    # not even root may write there
    kit.plan(out=Path("/proc/a.json")).refused("/proc/a.json: no file can be made in /proc")
    kit.execute("--record", "/proc/a.json").refused("/proc/a.json: no file can be made in /proc")
    kit.execute("--save-outputs", "/proc/a").refused("/proc/a: no file can be made in /proc")


def running(group: int) -> list[str]:
    """Processes of the group that have not ended (one that has may wait for its parent to ask)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # after the name, which may hold anything: state, parent, group
            state, _, number = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(number) == group and state != "Z":
            found.append(path.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
def test_an_interrupt_while_planning_on_the_spot_ends_both_processes(
    kit: Any, start: Start
) -> None:
    record = kit.folder / "record.json"
    arguments = ["--vram", "1GiB", *kit.arguments("--record", str(record))[1:]]
    process = start("executor.cli", arguments, start_new_session=True)
    # planning is a process of its own
    while process.poll() is None and len(running(process.pid)) < 2:
        time.sleep(0.01)
    # Ctrl-C reaches every process of the terminal's group
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "interrupted; everything was released, nothing half written\n"
    assert not record.exists()
    deadline = time.monotonic() + 10
    while running(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running(process.pid) == []
