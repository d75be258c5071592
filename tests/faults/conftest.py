"""A tiny checkpoint, plans and requests for it, faults to put in, and what must be released whatever happens."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image as Pillow
from torch import Tensor

import executor.cli
from executor.cpu import CpuDevice
from executor.make_checkpoint import make_random_checkpoint
from executor.prepare import Request
from executor.run import run
from planner import search, workload
from planner.checkpoint import spec
from planner.errors import StowplanError
from planner.plan import Plan
from planner.plan.shapes import TensorLocation
from planner.profile import load_profile
from planner.schedule import Choice, PhaseResidency

ROOT = Path(__file__).parents[2]
PROMPT = "What is this?"
NEW_TOKENS = 4


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    def refused(self, words: str, *, code: int) -> None:
        """One clear message on stderr; further lines are its indented details."""
        assert self.code == code, self.err
        lines = self.err.splitlines()
        assert lines, "nothing was said"
        assert lines[0].startswith("error: "), self.err
        assert words in self.err
        assert all(line.startswith("  ") for line in lines[1:]), self.err


class Lab:
    """What works, to be spoilt in one place."""

    def __init__(self, folder: Path) -> None:
        self.model = folder / "tiny"
        make_random_checkpoint("tiny", self.model)
        self.checkpoint = spec.read_checkpoint(self.model)
        self.image = folder / "a.png"
        values = np.random.default_rng(0).integers(0, 255, (140, 196, 3), dtype=np.uint8)
        Pillow.fromarray(values).save(self.image)
        self.profile = load_profile("cpu")
        self._bounds = {
            "min_pixels": self.checkpoint.min_pixels,
            "max_pixels": self.checkpoint.max_pixels,
        }
        self.resident = search.search(self._asked(NEW_TOKENS), self.profile)
        self.streamed = self._streamed(NEW_TOKENS)
        self.plan_file = folder / "plan.json"
        self.resident.save(self.plan_file)
        # long enough to be ended in the middle
        self.long_file = folder / "long.json"
        self._streamed(80).save(self.long_file)

    def _asked(self, new_tokens: int) -> search.Request:
        image = workload.parse_image(str(self.image), **self._bounds)
        asked = workload.make_workload(
            [image],
            **self._bounds,
            text=PROMPT,
            tokenizer_json=self.checkpoint.tokenizer_json,
            max_new_tokens=new_tokens,
        )
        return search.Request(self.checkpoint, asked, None)

    def _streamed(self, new_tokens: int) -> Plan:
        """Every unit streamed that can be: the disk is read in every phase."""
        none = PhaseResidency(0, 0, 0)
        choice = Choice(
            order="vision_then_llm",
            images_together=False,
            depth=2,
            vision=none,
            prefill=none,
            decode=none,
            tiles=self.resident.levers.tiles,
        )
        return search.build(self._asked(new_tokens), self.profile, choice)

    def request(self, **changes: Any) -> Request:
        given: dict[str, Any] = {
            "locations": self.checkpoint.tensors,
            "images": (self.image,),
            "prompt": PROMPT,
            "tokenizer": self.model,
            "fingerprint": self.checkpoint.shape.fingerprint,
            "stop": (),
        }
        return Request(**(given | changes))

    def fails(self, plan: Plan, request: Request, device: CpuDevice | None = None) -> StowplanError:
        """The typed error of a run that must not succeed, without the frames that it came through."""
        try:
            run(plan, request, device)
        except StowplanError as error:
            return type(error)(str(error)) if error.exit_code != 3 else error.with_traceback(None)
        raise AssertionError("the run succeeded")

    def arguments(self, *changes: str, plan: Path | None = None) -> list[str]:
        words = [str(plan or self.plan_file), "--model", str(self.model), "--quiet"]
        return [*words, "--image", str(self.image), "--prompt", PROMPT, *changes]

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.model, folder / "spoilt"))

    def moved(self, folder: Path) -> dict[str, TensorLocation]:
        """The tensors' places in a copy."""
        file = folder / "model.safetensors"
        return {n: place._replace(path=file) for n, place in self.checkpoint.tensors.items()}


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def execute(lab: Lab, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*changes: str, **given: Any) -> Outcome:
        capfd.readouterr()
        code = executor.cli.main(lab.arguments(*changes, **given))
        return Outcome(code, *capfd.readouterr())

    return call


# --- what must be released ----------------------------------------------------------------------------------------


def handles() -> dict[str, str]:
    """Open files by number."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            pass  # the listing's own
    return found


@pytest.fixture(autouse=True)
def everything_is_released(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[weakref.ref[Tensor]]]:
    """After each test: no thread, no open file, no arena more than before it, and no part of a file."""
    arenas: list[weakref.ref[Tensor]] = []
    allocate = CpuDevice.allocate_arena

    def watched(self: CpuDevice, size_bytes: int) -> Tensor:
        arena = allocate(self, size_bytes)
        arenas.append(weakref.ref(arena))
        return arena

    monkeypatch.setattr(CpuDevice, "allocate_arena", watched)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setenv("TMPDIR", str(scratch))
    threads, files = set(threading.enumerate()), handles() if has_proc() else {}
    yield arenas
    gc.collect()
    assert set(threading.enumerate()) == threads
    if has_proc():
        assert handles() == files
    assert [arena for arena in arenas if arena() is not None] == []
    assert list(scratch.iterdir()) == []
    assert list(tmp_path.rglob("*.part")) == []


def has_proc() -> bool:
    return Path("/proc/self/fd").exists()


# --- a disk that fails --------------------------------------------------------------------------------------------


class Disk:
    """Stands between the executor and `preadv`: counts reads, makes them short, and fails one of them."""

    def __init__(self) -> None:
        self.reads = 0
        self.fail_at: int | None = None
        self.error: OSError | None = None  # None: the file ends there
        self.short: random.Random | None = None
        self._real = os.preadv

    def preadv(self, handle: int, views: Sequence[memoryview], offset: int) -> int:
        self.reads += 1
        if self.reads - 1 == self.fail_at:
            if self.error is not None:
                raise self.error
            return 0
        if self.short is not None:
            first = views[0]
            views = [first[: self.short.randint(1, len(first))]]
        return self._real(handle, views, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    monkeypatch.setattr(os, "preadv", made.preadv)
    return made


# --- processes of their own ---------------------------------------------------------------------------------------

# imports once, then forks for every run: what a process of its own does after its imports, at a tenth of the price
ZYGOTE = """
import json, os, signal, sys, threading
import executor.cli, executor.run, executor.compare, rich.progress, numpy, PIL.PngImagePlugin, tokenizers, torch
from executor.memory import read_memory
print("ready", flush=True)
for line in sys.stdin:
    arguments, out, err = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        for path, number in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
        sys.argv[1:] = arguments
        sys.exit(executor.cli.main())
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Run:
    """One run in a process of its own."""

    def __init__(self, zygote: subprocess.Popen[str], pid: int, out: Path, err: Path) -> None:
        self._zygote, self.pid, self._out, self._err = zygote, pid, out, err

    def said(self) -> str:
        return self._out.read_text(errors="replace")

    def wait_for_answer(self) -> None:
        deadline = time.monotonic() + 60
        while not self._out.stat().st_size and time.monotonic() < deadline:
            time.sleep(0.002)

    def send(self, number: int) -> None:
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            pass  # it has ended already

    def end(self) -> Outcome:
        assert self._zygote.stdout is not None
        code = int(self._zygote.stdout.readline())
        return Outcome(code, self.said(), self._err.read_text(errors="replace"))


class Zygote:
    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def start(self, arguments: list[str]) -> Run:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._count += 1
        out, err = (self._folder / f"{name}{self._count}" for name in ("out", "err"))
        out.touch()
        self._process.stdin.write(json.dumps([arguments, str(out), str(err)]) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        return Run(self._process, pid, out, err)

    def close(self) -> None:
        self._process.communicate(timeout=30)


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    made = Zygote(tmp_path_factory.mktemp("runs"))
    yield made
    made.close()
