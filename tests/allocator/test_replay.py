"""Recordings replayed: whole, cut to a ring, of several devices, tampered with, without a trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.cli import main
from planner.replay import snapshot_file
from planner.replay.recording import Outcome, replay
from planner.replay.snapshot import parse_snapshot
from planner.units import MIB

Recorded = Callable[..., dict[str, Any]]
KEYS = [
    "allocs",
    "frees",
    "segment_allocs_recorded",
    "segment_allocs_predicted",
    "segment_allocs_extra",
    "peak_reserved_recorded_bytes",
    "peak_reserved_predicted_bytes",
    "final_blocks_recorded",
    "final_blocks_equal",
]
CONFS = [
    "",
    "expandable_segments:True",
    "max_split_size_mb:24",
    "roundup_power2_divisions:[2:2,>:8]",
    "max_split_size_mb:40,max_non_split_rounding_mb:30,roundup_power2_divisions:4",
]


def outcome(snapshot: dict[str, Any]) -> Outcome:
    (device,) = replay(parse_snapshot(snapshot)).devices
    return device


def assert_exact(device: Outcome) -> None:
    assert device.allocs > 0
    assert device.addresses_equal == device.allocs
    assert device.segment_allocs_predicted == device.segment_allocs_recorded
    assert device.segment_maps_predicted == device.segment_maps_recorded
    assert (device.segment_allocs_extra, device.segment_maps_extra) == (0, 0)
    assert device.peak_reserved_predicted_bytes == device.peak_reserved_recorded_bytes
    assert device.final_blocks_equal == device.final_blocks_recorded
    assert device.contradictions == 0


def event(action: str, address: int, size: int, **more: Any) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size, "stream": 0, **more}


def segment(address: int, *blocks: tuple[int, int, str], **more: Any) -> dict[str, Any]:
    """A segment of blocks (size, requested, state)."""
    total = sum(size for size, _, _ in blocks)
    return {
        "address": address,
        "total_size": total,
        "stream": 0,
        "segment_pool_id": (0, 0),
        "segment_type": "small" if total == 2 * MIB else "large",
        "blocks": [
            {"size": size, "requested_size": requested, "state": state}
            for size, requested, state in blocks
        ],
        **more,
    }


@pytest.mark.parametrize("conf", CONFS)
@pytest.mark.parametrize("side", [False, True], ids=["one-stream", "streams"])
def test_every_event_of_a_whole_recording_is_predicted(
    recorded: Recorded, conf: str, side: bool
) -> None:
    device = outcome(recorded(1, conf, side=side))
    assert_exact(device)
    assert device.free_running is not None
    assert device.free_running.peak_reserved_bytes == device.peak_reserved_recorded_bytes


@pytest.mark.parametrize("conf", CONFS)
@pytest.mark.parametrize("ring", [1, 40, 333])
def test_a_ring_that_lost_its_beginning_is_rolled_back(
    recorded: Recorded, conf: str, ring: int
) -> None:
    device = outcome(recorded(2, conf, ring=ring))
    assert device.events == ring
    assert device.addresses_equal == device.allocs
    assert device.final_blocks_equal == device.final_blocks_recorded > 0
    assert device.start_reserved_bytes > 0


@pytest.mark.parametrize("conf", ["", "expandable_segments:True"])
def test_a_retry_under_pressure_is_told_by_the_new_memory_behind_it(
    recorded: Recorded, conf: str
) -> None:
    device = outcome(recorded(3, conf, limit_bytes=700 * MIB, side=True))
    assert_exact(device)
    assert device.retries > 0
    assert device.ooms_predicted == device.ooms_recorded > 0


def test_a_request_is_not_searched_again_after_a_retry_freed_a_block_that_fits() -> None:
    base, other, new = 0x10000000, 0x20000000, 0x30000000
    trace = [
        event("segment_alloc", base, 40 * MIB),
        event("alloc", base, 40 * MIB),
        event("free_requested", base, 40 * MIB),
        event("free_completed", base, 40 * MIB),
        event("alloc", base, 30 * MIB),
        event("alloc", base + 30 * MIB, 10 * MIB),
        event("segment_alloc", other, 20 * MIB),
        event("alloc", other, 20 * MIB),
        event("free_requested", other, 20 * MIB),
        event("free_completed", other, 20 * MIB),
        event("free_requested", base, 30 * MIB),  # another stream still uses it
        # 25 MiB are asked for: 20 are free and the driver refuses; the retry waits for the other stream, gives the
        # 20 MiB back and asks again, without looking at the 30 MiB that are free now
        event("free_completed", base, 30 * MIB),
        event("segment_free", other, 20 * MIB),
        event("segment_alloc", new, 26 * MIB),
        event("alloc", new, 25 * MIB),
    ]
    final = [
        segment(base, (30 * MIB, 0, "inactive"), (10 * MIB, 10 * MIB, "active_allocated")),
        segment(new, (26 * MIB, 25 * MIB, "active_allocated")),
    ]
    device = outcome({"segments": final, "device_traces": [trace]})
    assert_exact(device)
    assert device.retries == 1
    del trace[12]  # nothing given back: no retry, and the free block should have been taken
    final.insert(1, segment(other, (20 * MIB, 0, "inactive")))
    device = outcome({"segments": final, "device_traces": [trace]})
    assert (device.segment_allocs_predicted, device.segment_allocs_recorded) == (2, 3)


def test_devices_are_replayed_each_on_its_own_and_summed(recorded: Recorded) -> None:
    first, second = recorded(4), recorded(5, steps=300)
    for entry in second["segments"]:
        entry["device"] = 1
    both = {
        **first,
        "segments": first["segments"] + second["segments"],
        "device_traces": [first["device_traces"][0], second["device_traces"][0]],
    }
    result = replay(parse_snapshot(both))
    assert [device.device for device in result.devices] == [0, 1]
    for device in result.devices:
        assert_exact(device)
    assert result.total("allocs") == sum(
        entry["action"] == "alloc" for trace in both["device_traces"] for entry in trace
    )


def test_a_difference_is_counted_and_does_not_lead_to_others() -> None:
    base, new = 0x10000000, 0x20000000
    trace = [
        event("segment_alloc", base, 40 * MIB),
        event("alloc", base, 40 * MIB),
        event("free_requested", base, 40 * MIB),
        event("free_completed", base, 40 * MIB),
        event("segment_alloc", new, 14 * MIB),  # needless, and 2 MiB too large
        event("alloc", new, 12 * MIB),
        event("alloc", base + 10 * MIB, 8 * MIB),  # not at the front of what is free
        event("alloc", base, 10 * MIB),
        event("alloc", base + 18 * MIB, 22 * MIB),
    ]
    final = [
        segment(
            base,
            (10 * MIB, 10 * MIB, "active_allocated"),
            (8 * MIB, 8 * MIB, "active_allocated"),
            (22 * MIB, 22 * MIB, "active_allocated"),
        ),
        segment(new, (12 * MIB, 12 * MIB, "active_allocated"), (2 * MIB, 0, "inactive")),
    ]
    device = outcome({"segments": final, "device_traces": [trace]})
    assert (device.allocs, device.addresses_equal) == (5, 3)
    assert (device.segment_allocs_recorded, device.segment_allocs_predicted) == (2, 1)
    assert device.final_blocks_equal == device.final_blocks_recorded == 5
    assert device.peak_reserved_predicted_bytes == 54 * MIB
    assert device.contradictions > 0
    trace = [event("segment_alloc", new, 14 * MIB), event("alloc", new, 12 * MIB)]
    device = outcome({"segments": final[1:], "device_traces": [trace]})
    assert (device.segment_allocs_predicted, device.segment_allocs_extra) == (0, 1)
    assert device.peak_reserved_predicted_bytes == 12 * MIB
    assert device.peak_reserved_recorded_bytes == 14 * MIB


def test_a_ring_cut_between_a_segment_and_its_block_needs_no_other_segment() -> None:
    base = 0x10000000
    settings = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:20"}
    # 19.5 MiB get a segment of 20; a search would leave a block of max_split_size alone
    trace = [
        event("segment_alloc", base, 20 * MIB),
        event("alloc", base, 39 * MIB // 2),
        event("segment_alloc", base + 32 * MIB, 20 * MIB),
        event("alloc", base + 32 * MIB, 39 * MIB // 2),
    ]
    final = [
        segment(a, (20 * MIB, 39 * MIB // 2, "active_allocated")) for a in (base, base + 2**25)
    ]
    for cut, segments in ((0, 2), (1, 1), (2, 1), (3, 0)):
        snapshot = {
            "segments": final,
            "device_traces": [trace[cut:]],
            "allocator_settings": settings,
        }
        device = outcome(snapshot)
        assert_exact(device)
        assert device.segment_allocs_recorded == segments
        assert device.free_running is not None
        assert device.free_running.segment_allocs_extra == 0
        assert device.free_running.peak_reserved_bytes == 40 * MIB


def test_completions_of_frees_before_the_ring_are_no_frees(recorded: Recorded) -> None:
    base = 0x10000000
    final = [segment(base, (12 * MIB, 0, "inactive"))]
    completed = event("free_completed", base, 12 * MIB)
    device = outcome({"segments": final, "device_traces": [[completed]]})
    assert (device.frees, device.frees_completed) == (0, 1)
    taken = event("alloc", base, 12 * MIB)  # in the ring: here the requests were left out
    device = outcome({"segments": final, "device_traces": [[taken, completed]]})
    assert (device.frees, device.frees_completed) == (1, 1)


@pytest.mark.parametrize("left_out", ["free_requested", "free_completed", "snapshot"])
def test_recordings_that_skip_kinds_of_events_are_replayed(
    recorded: Recorded, left_out: str
) -> None:
    snapshot = recorded(9, ring=700)
    trace = snapshot["device_traces"][0]
    snapshot["device_traces"] = [[entry for entry in trace if entry["action"] != left_out]]
    assert_exact(outcome(snapshot))


def test_a_block_that_waits_at_the_end_is_compared_as_waiting() -> None:
    base = 0x10000000
    trace = [
        event("segment_alloc", base, 12 * MIB),
        event("alloc", base, 12 * MIB),
        event("free_requested", base, 12 * MIB),
        {"action": "snapshot", "addr": 0, "size": 12 * MIB, "stream": 0},
        {"action": "user_defined", "addr": 0, "size": 0, "stream": 0},
    ]
    final = [segment(base, (12 * MIB, 12 * MIB, "active_pending_free"))]
    device = outcome({"segments": final, "device_traces": [trace]})
    assert device.final_blocks_equal == 1
    assert device.frees_deferred == 1
    assert device.snapshots_equal == device.snapshots_recorded == 1
    trace[3]["size"] = 11 * MIB
    assert outcome({"segments": final, "device_traces": [trace]}).snapshots_equal == 0


def test_slack_of_a_block_from_before_the_trace_is_seen_by_what_comes_behind_it() -> None:
    base = 0x10000000
    slack = MIB // 2
    trace = [
        event("alloc", base + 30 * MIB + slack, 5 * MIB),  # the first block kept half a mebibyte
        event("free_requested", base, 30 * MIB),
        event("free_completed", base, 30 * MIB),
    ]
    final = [
        segment(
            base,
            (30 * MIB + slack, 0, "inactive"),
            (5 * MIB, 5 * MIB, "active_allocated"),
            (10 * MIB, 0, "inactive"),
        )
    ]
    device = outcome({"segments": final, "device_traces": [trace]})
    assert_exact(device)
    assert device.guessed_sizes == 0
    device = outcome({"segments": final, "device_traces": [trace[1:]]})
    assert device.final_blocks_equal == 3
    assert device.guessed_sizes == 0  # it ends where the next block begins
    last = [
        segment(
            base,
            (45 * MIB + slack, 0, "inactive"),
        )
    ]
    device = outcome({"segments": last, "device_traces": [trace[1:]]})
    assert device.guessed_sizes == 1  # nothing shows where it ended
    (note,) = [
        n
        for n in replay(parse_snapshot({"segments": last, "device_traces": [trace[1:]]})).notes
        if "slack" in n
    ]
    assert "1 block from before the trace freed in it" in note


def test_a_private_pool_is_known_by_the_segment_where_events_do_not_name_it() -> None:
    base, private = 0x10000000, 0x20000000
    trace = [
        event("segment_alloc", base, 12 * MIB),
        event("alloc", base, 12 * MIB),
        event("free_requested", base, 12 * MIB),
        event("free_completed", base, 12 * MIB),
        event("segment_alloc", private, 12 * MIB),  # although the first segment is free
        event("alloc", private, 12 * MIB),
    ]
    final = [
        segment(base, (12 * MIB, 0, "inactive")),
        segment(private, (12 * MIB, 12 * MIB, "active_allocated"), segment_pool_id=(1, 0)),
    ]
    assert_exact(outcome({"segments": final, "device_traces": [trace]}))
    final[1]["segment_pool_id"] = (0, 0)
    device = outcome({"segments": final, "device_traces": [trace]})
    assert (device.segment_allocs_predicted, device.addresses_equal) == (1, 1)


def test_a_snapshot_without_a_trace_is_summarised(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = recorded(7, steps=200)
    snapshot["device_traces"] = [[]]
    path = tmp_path / "state.json"
    snapshot_file.dump(path, snapshot)
    assert main(["replay", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    blocks = sum(len(entry["blocks"]) for entry in snapshot["segments"])
    assert found["final_blocks_recorded"] == blocks > 0
    assert found["final_blocks_equal"] is None
    assert found["peak_reserved_recorded_bytes"] is None
    assert found["allocs"] == 0
    assert "no trace" in found["notes"][0]
    assert main(["replay", str(path)]) == 0
    assert f"blocks: {blocks}," in capsys.readouterr().out


@pytest.mark.parametrize("name", ["r.pickle", "r.json", "r.json.gz", "recording"])
def test_the_command_prints_one_object_or_a_report_of_80_columns(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    snapshot = recorded(8, ring=500)
    snapshot_file.dump(tmp_path / name, snapshot)
    assert main(["replay", str(tmp_path / name), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found)[:9] == KEYS
    trace = snapshot["device_traces"][0]
    assert found["allocs"] == sum(entry["action"] == "alloc" for entry in trace)
    assert found["frees"] == sum(entry["action"] == "free_requested" for entry in trace)
    assert found["segment_allocs_recorded"] == found["segment_allocs_predicted"]
    assert found["final_blocks_equal"] == found["final_blocks_recorded"]
    assert main(["replay", str(tmp_path / name)]) == 0
    report = capsys.readouterr().out
    assert "device 0: every address" in report
    assert max(len(line) for line in report.splitlines()) <= 80
