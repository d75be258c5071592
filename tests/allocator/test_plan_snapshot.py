"""A plan's allocations, written as a recording and replayed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from planner.cli import main
from planner.plan import Plan
from planner.replay.plan_snapshot import plan_snapshot, write
from planner.replay.recording import replay
from planner.replay.snapshot import parse_snapshot

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


@pytest.fixture(scope="module")
def cpu_plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path = tmp_path_factory.mktemp("plans") / "cpu.json"
    request = ["--vram", "4GB", "--device", "cpu", "--model", "3b", "--image", "640x480"]
    assert main([*request, "--out", str(path), "--json"]) == 0
    return Plan.load(path)


def test_on_the_cpu_every_buffer_is_a_block_of_the_arena_at_its_offset(cpu_plan: Plan) -> None:
    snapshot = plan_snapshot(cpu_plan)
    (arena,) = snapshot["segments"]  # what kernels took is gone
    assert arena["total_size"] == cpu_plan.prediction.arena_bytes
    end = len(cpu_plan.steps)
    alive = {
        (arena["address"] + buffer.offset_bytes, buffer.size_bytes, buffer.name)
        for buffer in cpu_plan.buffers
        if buffer.lifetimes[-1][1] == end
    }
    assert alive == {
        (block["address"], block["size"], block["frames"][0]["name"])
        for block in arena["blocks"]
        if block["state"] == "active_allocated"
    }
    live, most = 0, dict[str, int]()  # of steps that take something
    for entry in snapshot["device_traces"][0]:
        if entry["action"] == "free_completed":
            live -= entry["size"]
        elif entry["action"] == "alloc":
            live += entry["size"]
            name = entry["frames"][1]["name"]
            most[name] = max(most.get(name, 0), live)
    expected = {step.id: step.live_bytes + step.outside_bytes for step in cpu_plan.steps}
    assert most == {name: expected[name] for name in most}
    assert len(most) > 100


def test_a_block_placed_on_another_is_found(cpu_plan: Plan) -> None:
    snapshot = plan_snapshot(cpu_plan)
    first, second = [e for e in snapshot["device_traces"][0] if e["action"] == "alloc"][:2]
    before = replay(parse_snapshot(snapshot)).devices[0]
    assert before.addresses_equal == before.allocs
    second["addr"] = first["addr"]
    after = replay(parse_snapshot(snapshot)).devices[0]
    assert after.addresses_equal < after.allocs
    assert after.contradictions > 0
