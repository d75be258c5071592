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


def test_a_plan_for_the_cpu_has_no_snapshot_and_writes_nothing(run: Any, tmp_path: Path) -> None:
    words = ["--device", "cpu", "--model", "3b", "--image", "none"]
    outcome = run(
        *words, "--snapshot", str(tmp_path / "a.json"), "--out", str(tmp_path / "plan.json")
    )
    assert (outcome.code, outcome.out) == (2, "")
    assert "name a card with --device" in outcome.err
    assert list(tmp_path.iterdir()) == []
