"""The report that `make gpu` writes, tried on the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from executor.record import Record
from planner.plan import Plan
from planner.profile import load_profile

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_report.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_report"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def make(script: ModuleType, folder: Path, *, seconds: float = 60.0) -> object:
    return script.Report("cpu", script.QUICK, folder, folder, time.monotonic() + seconds)


@pytest.mark.full
def test_the_report_of_the_cpu_has_every_section_and_what_it_is_made_of(tmp_path: Path) -> None:
    given = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--work", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *given],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for title in ("Machine", "Probe", "Runs", "Context", "Streaming", "Tests", "Picture"):
        assert f"## {title}" in text
    assert "2 runs, " in text
    assert "left out" not in text.lower().replace("left out: matplotlib", "")
    assert " passed" in text
    assert load_profile(str(tmp_path / "probe.json")).kind == "cpu"
    records = [Record.load(path) for path in (tmp_path / "records").iterdir()]
    plans = [Plan.load(path) for path in (tmp_path / "plans").iterdir()]
    assert len(records) == len(plans) == 2
    assert not list(tmp_path.glob("gpu-report-*"))  # checkpoints are gone


def test_a_part_that_fails_or_has_no_time_is_a_line_and_the_rest_goes_on(
    script: ModuleType, tmp_path: Path
) -> None:
    report = make(script, tmp_path)
    fails = "import sys; print('odd\\nerror: no such card', file=sys.stderr); sys.exit(3)"
    report.part("One", lambda r: r.call("-c", fails))
    report.part("Two", lambda r: r.say(r.call("-c", "print('here')").strip()))
    report.part("Three", lambda r: r.call("-c", "import time; time.sleep(30)", seconds=2.0))
    late = make(script, tmp_path, seconds=0.0)
    late.part("Four", lambda r: r.call("-c", "print('here')"))
    said = "\n".join(report.lines)
    assert "Left out: exit code 3: error: no such card" in said
    assert "here" in report.lines
    assert "Left out: not at an end after 2 s" in said
    assert "Left out: no time left" in "\n".join(late.lines)


def test_settings_that_change_a_card_s_bytes_reach_no_run(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    report = make(script, tmp_path)
    code = "import os; print(os.environ.get('PYTORCH_CUDA_ALLOC_CONF'))"
    assert report.call("-c", code).strip() == "None"


def test_without_a_card_the_rest_is_left_out_at_once(script: ModuleType, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a card")
    report = make(script, tmp_path)
    report.device = "cuda"
    report.part("Machine", script.machine)
    report.part("Probe", script.probe)
    said = "\n".join(report.lines)
    assert "torch sees no card, so nothing below can run" in said
    assert said.count("Left out") == 3  # machine, the probe, and the profile in its place
