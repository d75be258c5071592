"""`--snapshot`: the predicted allocations, read back by `plan replay`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("name", ["timeline.pickle", "timeline.json.gz"])
def test_the_snapshot_of_a_plan_replays_to_the_reserved_bytes_of_the_plan(
    run: Any, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    outcome = run("--vram", "8GB", "--image", "1920x1080", "--snapshot", str(path), "--json")
    assert (outcome.code, outcome.err) == (0, f"wrote {path}\n")
    replayed = json.loads(run("replay", str(path), "--json").out)
    predicted = json.loads(outcome.out)["prediction"]["phases"]
    assert replayed["peak_reserved_predicted_bytes"] == max(
        row["reserved_peak_bytes"] for row in predicted
    )
    assert replayed["peak_reserved_recorded_bytes"] == replayed["peak_reserved_predicted_bytes"]
    assert replayed["segment_allocs_recorded"] == replayed["segment_allocs_predicted"] > 0
    assert replayed["segment_allocs_extra"] == 0
    assert replayed["final_blocks_equal"] == replayed["final_blocks_recorded"]


def test_the_snapshot_of_a_plan_for_the_cpu_replays_to_its_arena_and_its_allocated_bytes(
    run: Any, tmp_path: Path
) -> None:
    path = tmp_path / "cpu.pickle"
    words = ["--vram", "4GB", "--device", "cpu", "--model", "3b", "--image", "640x480"]
    outcome = run(*words, "--snapshot", str(path), "--json")
    assert (outcome.code, outcome.err) == (0, f"wrote {path}\n")
    replayed = json.loads(run("replay", str(path), "--json").out)
    plan = json.loads(outcome.out)
    most = max(step["outside_bytes"] for step in plan["steps"])
    assert replayed["peak_reserved_predicted_bytes"] == plan["prediction"]["arena_bytes"] + most
    assert replayed["peak_reserved_recorded_bytes"] == replayed["peak_reserved_predicted_bytes"]
    assert replayed["peak_allocated_predicted_bytes"] == max(
        row["allocated_peak_bytes"] for row in plan["prediction"]["phases"]
    )
    assert replayed["addresses_equal"] == replayed["allocs"] > len(plan["buffers"])
    assert replayed["segment_allocs_recorded"] == replayed["segment_allocs_predicted"] > 1
    assert replayed["segment_allocs_extra"] == replayed["contradictions"] == 0
    assert replayed["final_blocks_equal"] == replayed["final_blocks_recorded"] > 1
    report = run("replay", str(path)).out
    assert "a plan for the CPU, where no allocator chooses" in " ".join(report.split())
    assert max(map(len, report.splitlines())) <= 80


def test_the_plan_and_its_snapshot_do_not_overwrite_one_another(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "both.json"
    (tmp_path / "more").mkdir()
    words = ["--model", "3b", "--image", "none", "--vram", "8GB", "--out", str(path)]
    outcome = run(*words, "--snapshot", str(tmp_path / "more" / ".." / "both.json"))
    assert (outcome.code, outcome.out) == (2, "")
    assert "wanted another file than --out's, found the same" in outcome.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["more"]
