"""Recordings of older and newer torch, which lack some keys and have others: no traceback, the same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.cli import main
from planner.replay import snapshot_file
from planner.replay.recording import Replay, replay
from planner.replay.snapshot import parse_snapshot
from planner.units import MIB

Recorded = Callable[..., dict[str, Any]]
Change = Callable[[dict[str, Any]], None]


def events(snapshot: dict[str, Any]) -> list[dict[str, Any]]:
    (trace,) = snapshot["device_traces"]
    assert isinstance(trace, list)
    return trace


def blocks(snapshot: dict[str, Any]) -> list[dict[str, Any]]:
    return [block for entry in snapshot["segments"] for block in entry["blocks"]]


def torch_2_0(snapshot: dict[str, Any]) -> None:
    """Blocks with a history instead of addresses; no times, pools, settings, expandable segments."""
    for block in blocks(snapshot):
        address, requested = block.pop("address"), block.pop("requested_size")
        frames = block.pop("frames")
        if block["state"] != "inactive":
            block["history"] = [{"addr": address, "real_size": requested, "frames": frames}]
        if block["state"] == "active_awaiting_free":
            block["state"] = "active_pending_free"
    for entry in snapshot["segments"]:
        for key in ("segment_pool_id", "is_expandable", "requested_size", "frames"):
            del entry[key]
    for event in events(snapshot):
        for key in ("time_us", "pool_id", "frames"):
            del event[key]
    del snapshot["allocator_settings"]


def torch_2_1(snapshot: dict[str, Any]) -> None:
    """Pools of segments, not of events; no times; what waits is pending."""
    for event in events(snapshot):
        del event["time_us"], event["pool_id"]
    for block in blocks(snapshot):
        block["state"] = block["state"].replace("awaiting", "pending")


def torch_2_9(snapshot: dict[str, Any]) -> None:
    """More keys everywhere, annotations beside the traces and kinds of events that need no room."""
    for event in events(snapshot):
        event |= {"compile_context": "0/0", "user_metadata": "step 3", "version": 2}
    place = len(events(snapshot)) // 2
    for action in ("user_defined", "workspace_snapshot"):
        events(snapshot).insert(
            place, {"action": action, "addr": 0, "size": 0, "stream": 0, "time_us": 1}
        )
    snapshot["external_annotations"] = [
        {"name": "forward", "stage": "START", "device": 0, "time_us": 5}
    ]


def signed_streams(snapshot: dict[str, Any]) -> None:
    """A stream is a pointer, written as a signed number by some versions."""
    for entry in [*events(snapshot), *snapshot["segments"]]:
        entry["stream"] = -(2**40) if entry["stream"] else 0


def no_times(snapshot: dict[str, Any]) -> None:
    for event in events(snapshot):
        del event["time_us"]


def no_frames(snapshot: dict[str, Any]) -> None:
    for entry in [*events(snapshot), *blocks(snapshot), *snapshot["segments"]]:
        del entry["frames"]


def no_block_addresses(snapshot: dict[str, Any]) -> None:
    for block in blocks(snapshot):
        del block["address"]


def whole_pool_ids(snapshot: dict[str, Any]) -> None:
    """One number for a pool, as forks of torch write it."""
    for entry in snapshot["segments"]:
        entry["segment_pool_id"] = 0
    for event in events(snapshot):
        del event["pool_id"]


CHANGES: list[Change] = [
    torch_2_0,
    torch_2_1,
    torch_2_9,
    signed_streams,
    no_times,
    no_frames,
    no_block_addresses,
    whole_pool_ids,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("ring", [None, 100], ids=["whole", "ring"])
def test_the_same_program_recorded_by_another_torch_gives_the_same_numbers(
    recorded: Recorded, change: Change, ring: int | None
) -> None:
    before, after = (recorded(11, ring=ring, side=True, limit_bytes=900 * MIB) for _ in range(2))
    change(after)
    assert after != before
    (one,), (other,) = (replay(parse_snapshot(s)).devices for s in (before, after))
    assert one.addresses_equal == one.allocs > 20
    assert one.segment_allocs_predicted == one.segment_allocs_recorded > 0
    assert one.final_blocks_equal == one.final_blocks_recorded > 0
    for name in one.__slots__:
        if name not in ("events", "statistics"):
            assert getattr(other, name) == getattr(one, name), name
    assert other.statistics == one.statistics


def test_a_recording_without_traces_is_summarised_whichever_way_they_lack(
    recorded: Recorded,
) -> None:
    for traces in (None, [], [[]], [[], []]):
        snapshot = recorded(12, steps=100)
        if traces is None:
            del snapshot["device_traces"]
        else:
            snapshot["device_traces"] = traces
        result = replay(parse_snapshot(snapshot))
        assert result.devices == ()
        assert any("no trace" in note for note in result.notes)


@pytest.mark.parametrize("conf", ["", "expandable_segments:True"])
def test_events_without_a_stream_are_of_the_segment_they_lie_in(
    recorded: Recorded, conf: str
) -> None:
    snapshot = recorded(13, conf, steps=150)
    for event in events(snapshot):
        del event["stream"]
    result = replay(parse_snapshot(snapshot))
    assert_exact(result)
    assert any("do not say their stream" in note for note in result.notes)
    for entry in snapshot["segments"]:
        entry["stream"] = 7
    (record,) = parse_snapshot(snapshot).devices
    lasting = {entry["address"] for entry in snapshot["segments"]}
    assert lasting & {e.address for e in record.events if e.stream == 7}
    (device,) = replay(parse_snapshot(snapshot)).devices
    assert device.final_blocks_equal == device.final_blocks_recorded


def assert_exact(result: Replay) -> None:
    (device,) = result.devices
    assert device.addresses_equal == device.allocs > 0
    assert device.segment_allocs_predicted == device.segment_allocs_recorded
    assert device.segment_maps_predicted == device.segment_maps_recorded
    assert device.segment_allocs_extra == device.segment_maps_extra == 0
    assert device.final_blocks_equal == device.final_blocks_recorded
    assert device.peak_reserved_predicted_bytes == device.peak_reserved_recorded_bytes


@pytest.mark.parametrize("told", [True, False], ids=["told", "untold"])
def test_where_no_pool_was_recorded_memory_that_was_not_needed_is_a_private_pools(
    told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, private = 0x10000000, 0x20000000
    taken = [("segment_alloc", base, 12), ("alloc", base, 12), ("free_requested", base, 12)]
    taken += [("free_completed", base, 12), ("segment_alloc", private, 12)]
    taken += [("alloc", private, 12), ("free_requested", private, 12)]
    taken += [("free_completed", private, 12), ("alloc", base, 12), ("segment_alloc", 2**30, 12)]
    taken += [("alloc", 2**30, 12)]  # the default pool has nothing free any more
    final = [
        {"address": address, "stream": 0, "segment_type": "large", "blocks": [block]}
        for address, state in (
            (base, "active_allocated"),
            (private, "inactive"),
            (2**30, "active_allocated"),
        )
        for block in [{"size": 12 * MIB, "state": state}]
    ]
    if told:
        for entry in final:
            entry["segment_pool_id"] = (3, 0) if entry["address"] == private else (0, 0)
    trace = [
        {"action": action, "addr": address, "size": size * MIB, "stream": 0}
        for action, address, size in taken
    ]
    snapshot = {"segments": final, "device_traces": [trace]}
    result = replay(parse_snapshot(snapshot))
    assert_exact(result)
    assert result.devices[0].pools_inferred == (0 if told else 1)
    path = tmp_path / "old.json"
    snapshot_file.dump(path, snapshot)
    assert main(["replay", str(path), "--json"]) == 0
    notes = " ".join(json.loads(capsys.readouterr().out)["notes"])
    assert ("did not record which pool a segment is of" in notes) is not told
    assert ("those of 1 private pool;" in notes) is not told
