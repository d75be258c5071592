"""Memory that the system refuses, and memory that somebody else took between plan and run."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

import planner.cli
from executor import cpu, memory, threads
from executor.cpu import CpuDevice
from executor.record import Record
from executor.run import run
from planner.errors import LessIsFree, OutOfMemory, RunFailed
from planner.plan import Plan
from planner.units import MIB

ROOT = Path(__file__).parents[2]
PROMPT = "What is this?"


def test_an_arena_that_the_system_refuses_is_out_of_memory(
    lab: Any, monkeypatch: pytest.MonkeyPatch, execute: Any
) -> None:
    def refuse(size_bytes: int) -> Any:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(cpu, "_map", refuse)
    failure = lab.fails(lab.resident, lab.request())
    assert isinstance(failure, OutOfMemory)
    assert "the system refused the mapping" in str(failure)
    execute().refused("the system refused the mapping", code=1)


def test_a_thread_that_the_system_refuses_is_out_of_memory(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for plan in (lab.resident, lab.streamed):
        failure = lab.fails(plan, lab.request())
        assert isinstance(failure, OutOfMemory)
        assert "a thread was refused" in str(failure)


@pytest.fixture
def in_time() -> Iterator[None]:
    """A wait without end becomes a failure."""

    def late(*_: object) -> None:
        raise AssertionError("it waits for ever")

    if not hasattr(signal, "SIGALRM"):
        pytest.skip("nothing would end the wait")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("in_time")
def test_a_thread_that_ends_before_it_begins_is_out_of_memory(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a thread does that finds no memory for its first call; Python's own `start` would wait for ever."""
    monkeypatch.setattr(threading.Thread, "_bootstrap", lambda self: None)
    monkeypatch.setattr(threads, "TURNS", 2)
    failure = lab.fails(lab.streamed, lab.request())
    assert isinstance(failure, OutOfMemory)
    assert "a thread was refused: it got no memory to begin with" in str(failure)


@pytest.mark.usefixtures("in_time")
def test_a_thread_that_begins_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, begun = threading.Thread._bootstrap, []  # type: ignore[attr-defined]

    def late(self: threading.Thread) -> None:
        time.sleep(3 * threads.TURN_S)
        begin(self)

    monkeypatch.setattr(threading.Thread, "_bootstrap", late)
    thread = threading.Thread(target=lambda: begun.append(True))
    threads.start_thread(thread, "a late one")
    thread.join()
    assert begun == [True]


@pytest.mark.parametrize("where", ["make_runs", "prime", "open_images", "seen_mask"])
def test_memory_refused_anywhere_else_is_out_of_memory(
    lab: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from executor import run as module

    def refuse(*_: object, **__: object) -> Any:
        raise MemoryError

    monkeypatch.setattr(module, where, refuse)
    failure = lab.fails(lab.resident, lab.request())
    assert isinstance(failure, OutOfMemory)
    assert "memory was refused" in str(failure)


@pytest.mark.full
def test_memory_refused_to_the_reader_is_out_of_memory(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(CpuDevice, "fill", refuse)
    assert isinstance(lab.fails(lab.streamed, lab.request()), OutOfMemory)


# --- limits of the system ------------------------------------------------------------------------------------------

# one process, the same run again and again with less and less room beyond what it has mapped by then
LIMITED = """
import io, json, resource, sys
from contextlib import redirect_stderr, redirect_stdout
import executor.cli
from executor import threads
from executor.memory import data_bytes, malloc_trim
threads.TURNS = 10
arguments, rooms = json.loads(sys.argv[1])
hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
for room in rooms:
    malloc_trim()
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        if room is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + room, hard))
        code = executor.cli.main(arguments)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    print(json.dumps([code, err.getvalue()]), flush=True)
"""


def child(script: str, argument: object) -> str:
    """What a script of Python prints, given one argument."""
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(argument)],
        capture_output=True,
        text=True,
        errors="replace",
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def limited(lab: Any, rooms: list[int | None]) -> list[tuple[int, str]]:
    found = child(LIMITED, [lab.arguments(), rooms])
    return [tuple(json.loads(line)) for line in found.splitlines()]


def check_limited(found: list[tuple[int, str]]) -> None:
    assert found[0] == (0, "")
    assert 1 in {code for code, _ in found}
    for code, err in found:
        if code == 0:
            assert err == ""
            continue
        assert code == 1, err
        # what Python itself says of a thread that got no memory to begin with
        if err.startswith("Exception ignored in thread started by") and "error: " in err:
            err = err[err.index("error: ") :]
            assert "a thread was refused" in err
        assert err.startswith("error: "), err
        assert len(err.splitlines()) == 1
        assert "refused" in err


@pytest.mark.skipif(memory.data_bytes() is None, reason="nobody tells what is mapped")
def test_a_limit_of_the_system_is_out_of_memory_wherever_it_strikes(lab: Any) -> None:
    check_limited(limited(lab, [None, 64 * MIB, *(n * 2**18 for n in (0, 4, 8, 24))]))


@pytest.mark.skipif(memory.data_bytes() is None, reason="nobody tells what is mapped")
@pytest.mark.full
def test_a_limit_of_the_system_strikes_at_every_quarter_of_a_mebibyte(lab: Any) -> None:
    check_limited(limited(lab, [None, *(n * 2**16 for n in range(200))]))


# --- taken by somebody else ----------------------------------------------------------------------------------------


class Crowded(CpuDevice):
    """Another process holds all but `free` bytes."""

    free = 0

    def free_bytes(self) -> int:
        return self.free


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def leave(free: int) -> None:
        monkeypatch.setattr(memory, "available_bytes", lambda: free)

    return leave


def test_memory_taken_since_the_plan_was_made_is_told_before_anything_is_read(
    lab: Any, disk: Any
) -> None:
    steps: list[str] = []
    failure = lab.fails(lab.resident, lab.request(on_step=steps.append), Crowded())
    assert isinstance(failure, LessIsFree)
    assert failure.exit_code == 3
    assert failure.budget_bytes == lab.resident.device.context_bytes
    assert (steps, disk.reads) == ([], 0)


def test_a_plan_that_just_fits_what_is_free_runs(lab: Any) -> None:
    plan = lab.resident
    needed = plan.prediction.expected_peak_bytes - plan.device.context_bytes
    device = Crowded()
    device.free = needed - 1
    assert isinstance(lab.fails(plan, lab.request(), device), LessIsFree)
    enough = Crowded()
    enough.free = needed
    assert len(run(plan, lab.request(), enough).tokens) == 4


def test_the_command_line_says_how_much_is_missing_and_how_to_go_on(
    execute: Any, taken: Any
) -> None:
    taken(2**16)
    outcome = execute()
    outcome.refused("the plan does not fit any more: it needs ", code=3)
    assert "0.00 GiB is free on the cpu now" in outcome.err
    assert "--replan" in outcome.err
    assert outcome.out == ""


@pytest.fixture
def large(lab: Any, tmp_path: Path) -> tuple[Path, Path]:
    """An image whose plan without a budget takes far more than the least, and that plan; by a profile of one's own."""
    image, plan, device = (tmp_path / name for name in ("large.png", "large.json", "mine.json"))
    Pillow.fromarray(np.zeros((1100, 1500, 3), dtype=np.uint8)).save(image)
    profile = json.loads((ROOT / "profiles/devices/cpu.json").read_text())
    # without measured tables large tiles are the fastest: priming them costs nothing
    mine = {"id": "mine", "context_error_bytes": 0, "measured": None}
    device.write_text(json.dumps(profile | mine))
    words = ["--device", str(device), "--model", str(lab.model), "--image", str(image)]
    words += ["--prompt", PROMPT, "--max-new-tokens", "2", "--out", str(plan)]
    assert planner.cli.main(words) == 0
    return image, plan


# in a process of its own, since what the tests have imported is no part of a plan's context
CROWDED = """
import io, json, sys
from contextlib import redirect_stderr
import executor.cli
from executor import memory
for whole, arguments in json.loads(sys.argv[1]):
    memory.available_bytes = lambda: max(0, whole - memory.read_memory().rss_bytes)
    err = io.StringIO()
    with redirect_stderr(err):
        code = executor.cli.main(arguments)
    print("\\n" + json.dumps([code, err.getvalue()]), flush=True)
"""


def test_replan_plans_anew_for_what_is_free_and_runs_that(
    lab: Any, large: tuple[Path, Path], tmp_path: Path
) -> None:
    image, plan_file = large
    old = Plan.load(plan_file)
    # what this process may hold in all
    short, plenty = old.prediction.expected_peak_bytes - MIB, 2 * old.prediction.bound_peak_bytes
    words = [str(plan_file), "--model", str(lab.model), "--image", str(image), "--prompt", PROMPT]

    def recorded(name: str) -> list[str]:
        return [*words, "--replan", "--record", str(tmp_path / name)]

    runs = [
        (short, recorded("anew.json")),
        (short, words),
        (old.device.context_bytes // 2, recorded("never.json")),
        (plenty, recorded("old.json")),
    ]
    done = child(CROWDED, runs)
    found = [json.loads(line) for line in done.splitlines() if line.startswith("[")]
    # the profile states no error, so that the run of the new plan may pass its budget by a little (4)
    assert found[0][0] in (0, 4), found
    assert [code for code, _ in found[1:]] == [3, 3, 0], found
    assert "note: the plan does not fit any more: it needs 0.0" in found[0][1]
    assert "planning anew" in found[0][1]
    anew, as_it_stood = (Record.load(tmp_path / name) for name in ("anew.json", "old.json"))
    assert anew.budget_bytes is not None
    assert short - MIB < anew.budget_bytes <= short
    assert anew.arena_bytes <= old.prediction.arena_bytes
    # too little for any plan
    assert "error: no plan fits" in found[2][1]
    assert not (tmp_path / "never.json").exists()
    # a plan that fits is run as it stands
    assert "planning anew" not in found[3][1]
    assert (as_it_stood.arena_bytes, as_it_stood.budget_bytes) == (old.prediction.arena_bytes, None)


def test_memory_refused_later_is_a_failed_run_and_not_planned_anew(
    monkeypatch: pytest.MonkeyPatch, execute: Any
) -> None:
    from executor import prepare

    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setitem(prepare.STEPS, "norm", refuse)
    execute("--replan").refused("prefill/norm: memory was refused", code=1)
    assert issubclass(OutOfMemory, RunFailed)
