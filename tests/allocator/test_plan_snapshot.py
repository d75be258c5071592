"""A plan's allocations, written as a recording and replayed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from planner.cli import main
from planner.errors import InputError
from planner.plan import Plan
from planner.replay.plan_snapshot import plan_snapshot, write

REQUEST = ["--vram", "8GB", "--model", "3b", "--image", "1920x1080", "--prompt-tokens", "16"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path = tmp_path_factory.mktemp("plans") / "card.json"
    assert main([*REQUEST, "--out", str(path), "--json"]) == 0
    return Plan.load(path)


def test_a_plan_is_a_recording_that_replays_with_every_number_equal(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reserved = set()
    for name in ("plan.pickle", "plan.json", "plan.json.gz"):
        write(plan, tmp_path / name)
        capsys.readouterr()
        assert main(["replay", str(tmp_path / name), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["allocs"] == found["addresses_equal"] == found["frees"] + found_live(plan)
        assert found["segment_allocs_recorded"] == found["segment_allocs_predicted"] > 0
        assert found["segment_allocs_extra"] == 0
        assert found["final_blocks_equal"] == found["final_blocks_recorded"] > 0
        reserved.add(found["peak_reserved_predicted_bytes"])
    (peak,) = reserved
    terms = {term.name: term.expected_bytes for term in plan.prediction.terms}
    assert plan.prediction.arena_bytes <= peak
    assert peak + plan.device.context_bytes == plan.prediction.expected_peak_bytes, terms


def found_live(plan: Plan) -> int:
    """Blocks that are never given back: the arena and what is kept beside it."""
    return 1 + len(plan.device.kept)


def test_stacks_name_the_block_and_its_step(plan: Plan) -> None:
    snapshot = plan_snapshot(plan)
    assert pickle.loads(pickle.dumps(snapshot)) == snapshot
    trace = snapshot["device_traces"][0]
    names = [[frame["name"] for frame in entry["frames"]] for entry in trace]
    assert names[0] == names[1] == ["arena", "load"]
    steps = {step.id for step in plan.steps if step.outside}
    assert {stack[1] for stack in names} - {"load"} == steps
    (arena,) = (
        block
        for segment in snapshot["segments"]
        for block in segment["blocks"]
        if block["frames"] and block["frames"][0]["name"] == "arena"
    )
    assert arena["requested_size"] == plan.prediction.arena_bytes


def test_a_plan_for_the_cpu_has_no_snapshot(plan: Plan) -> None:
    device = plan.device.model_copy(update={"kind": "cpu"})
    with pytest.raises(InputError, match="wanted a plan for a card"):
        plan_snapshot(plan.model_copy(update={"device": device}))
