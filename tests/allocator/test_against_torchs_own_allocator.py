"""torch's own allocator ran these programs (recordings/README.md): the simulator must have done the same, to the byte."""

from __future__ import annotations

import bisect
import gzip
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from planner.allocator import Block, CachingAllocator, parse_settings
from planner.errors import OutOfMemory
from planner.replay.recording import Outcome, replay
from planner.replay.snapshot import read_snapshot

RECORDINGS = Path(__file__).parent / "recordings"
PROGRAMS = sorted(path.name.split(".")[0] for path in RECORDINGS.glob("*.program.json.gz"))
SNAPSHOTS = sorted(path.name.split(".")[0] for path in RECORDINGS.glob("*.snapshot.json.gz"))
# torch's peaks are of another stretch than the trace: recording began, or peaks were reset, in the middle
PARTIAL = ("edges", "empty_cache", "late_start")
# where memory goes back in the middle, what else would be free then depends on the recorded addresses
PRESSED = ("driver_limit", "exact", "expandable", "garbage_collection", "max_split", "memory_limit")

# a pool that never splits: no recording says so
UNSPLIT = "user_pools_1"

EventKey = tuple[str, int, int, int]
BlockKey = tuple[int, int, int, str, int, tuple[int, ...], str]


def _load(name: str) -> Any:
    return json.loads(gzip.decompress((RECORDINGS / f"{name}.json.gz").read_bytes()))


class Run:
    """One program on the simulator. `moved` maps each simulated segment to how far torch's lay from it."""

    def __init__(self, name: str) -> None:
        self.truth = _load(f"{name}.program")
        self.total = self.truth["device"]["total_bytes"]
        free = self.total - self.truth["device"]["other_bytes"]
        settings = parse_settings(self.truth["settings"])
        self.simulator = CachingAllocator(settings, total_bytes=self.total, free_bytes=free)
        self.live: dict[int, Block] = {}
        self.moved: dict[int, int] = {}
        self.side_streams = False
        for number, (action, *arguments) in enumerate(self.truth["program"]):
            self.step(f"{name}: operation {number}", action, arguments)

    def step(self, where: str, action: str, arguments: list[Any]) -> None:
        simulator = self.simulator
        match action, *arguments:
            case "malloc", key, size, stream, address:
                try:
                    block = simulator.malloc(size, stream)
                except OutOfMemory:
                    assert address is None, f"{where}: torch found memory"
                    return
                assert address is not None, f"{where}: torch was out of memory"
                if size:
                    self.live[key] = block
                    moved = address - block.address
                    found = self.moved.setdefault(_base(block), moved)
                    assert found == moved, f"{where}: another place in the segment"
            case "free", key:
                simulator.release(self.live.pop(key))
            case "record_stream", key, stream:
                simulator.record_stream(self.live[key], stream)
                self.side_streams = True
            case "complete", stream:
                simulator.pass_events(stream)
            case "empty_cache", first, second:
                simulator.empty_cache((first, second))
            case "set_fraction", fraction:
                simulator.set_memory_fraction(fraction)
            case "other_bytes", size:
                simulator.free_bytes = self.total - size
            case "create_pool", first, second, split, use_on_oom:
                simulator.create_pool((first, second), split=split, use_on_oom=use_on_oom)
            case "begin_pool", first, second, stream:
                streams = None if stream < 0 else frozenset({stream})
                simulator.begin_pool((first, second), streams)
            case "end_pool", first, second:
                simulator.end_pool((first, second))
            case "release_pool", first, second:
                simulator.release_pool((first, second))
            case ("reset_peak",):
                simulator.stats.reset_peaks()
            case "record_history", _:
                simulator.heap.trace = []
            case _:
                raise AssertionError(f"{where}: {action} {arguments} is not known here")

    def blocks(self) -> set[BlockKey]:
        return {
            (
                block.address + self.moved[_base(block)],
                block.size_bytes,
                0 if block.is_free else block.requested_bytes,
                _state(block),
                block.stream,
                tuple(block.pool.id),
                "small" if block.pool.small else "large",
            )
            for block in self.simulator.heap.blocks.values()
            if block.mapped
        }

    def events(self) -> list[EventKey]:
        """What the simulator recorded, with torch's addresses."""
        bases = sorted(self.moved)
        found = []
        for event in self.simulator.heap.trace or ():
            address = event.address
            if event.action != "oom":
                address += self.moved[bases[bisect.bisect_right(bases, address) - 1]]
            found.append((event.action, address, event.size_bytes, event.stream))
        return found


def _base(block: Block) -> int:
    while block.previous is not None:
        block = block.previous
    return block.address


def _state(block: Block) -> str:
    if block.allocated:
        return "active_allocated"
    return "inactive" if block.is_free else "active_pending_free"


def _recorded_blocks(name: str) -> set[BlockKey]:
    return {
        (
            block["address"],
            block["size"],
            0 if block["state"] == "inactive" else block["requested_size"],
            block["state"],
            segment["stream"],
            tuple(segment["segment_pool_id"]),
            segment["segment_type"],
        )
        for segment in _load(f"{name}.snapshot")["segments"]
        for block in segment["blocks"]
    }


def _flat(statistics: dict[str, Any], prefix: str = "") -> dict[str, int]:
    flat: dict[str, int] = {}
    for key, value in statistics.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif key != "max_split_size":  # a setting
            flat[f"{prefix}{key}"] = value
    return flat


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_leads_to_the_same_addresses_blocks_and_statistics_as_in_torch(name: str) -> None:
    run = Run(name)
    assert run.blocks() == _recorded_blocks(name)
    torchs = _flat(run.truth["statistics"])
    if run.side_streams:
        # torch walks a hash table of streams: blocks that become free together do so in any order
        for key in list(torchs):
            if key.startswith("inactive_split") and not key.endswith(".current"):
                del torchs[key]
    simulated = run.simulator.stats.as_dict()
    assert {key: simulated[key] for key in torchs} == torchs


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_records_the_same_events_in_the_same_order_as_torch(name: str) -> None:
    run = Run(name)
    (trace,) = _load(f"{name}.snapshot")["device_traces"]
    torchs = [
        (
            event["action"],
            event.get("addr", event.get("device_free")),
            event["size"],
            event["stream"],
        )
        for event in trace
    ]
    simulated = run.events()
    # torch walks a hash table of streams to complete frees, and one of pools to release them
    unordered = {"free_completed"} if run.side_streams else set()
    if any(operation[0] == "release_pool" for operation in run.truth["program"]):
        unordered.add("segment_free")
    assert _in_any_order(simulated, unordered) == _in_any_order(torchs, unordered)


def _in_any_order(events: list[EventKey], unordered: set[str]) -> list[EventKey]:
    """The events, where several of an unordered action follow each other those sorted."""
    found: list[EventKey] = []
    for action, group in groupby(events, key=lambda event: event[0]):
        together = list(group)
        found += sorted(together) if action in unordered else together
    return found


def test_the_programs_reach_every_way_of_getting_and_giving_back_memory() -> None:
    truths = [_load(f"{name}.program") for name in PROGRAMS]
    reached = {
        key: sum(truth["statistics"][key] for truth in truths)
        for key in ("num_alloc_retries", "num_ooms", "num_device_free")
    }
    assert min(reached.values()) > 50
    actions = {operation[0] for truth in truths for operation in truth["program"]}
    assert {
        "create_pool",
        "empty_cache",
        "other_bytes",
        "record_stream",
        "release_pool",
        "set_fraction",
    } <= actions


def _outcome(name: str) -> Outcome:
    (device,) = replay(read_snapshot(RECORDINGS / f"{name}.snapshot.json.gz")).devices
    return device


@pytest.mark.parametrize("name", [name for name in SNAPSHOTS if name != UNSPLIT])
def test_a_replayed_recording_has_no_event_that_the_rules_did_not_foresee(name: str) -> None:
    device = _outcome(name)
    assert device.allocs > 90
    assert device.addresses_equal == device.allocs
    assert device.segment_allocs_predicted == device.segment_allocs_recorded
    assert device.segment_maps_predicted == device.segment_maps_recorded
    assert device.ooms_predicted == device.ooms_recorded
    assert device.snapshots_equal == device.snapshots_recorded
    assert (device.segment_allocs_extra, device.segment_maps_extra, device.contradictions) == (
        0,
    ) * 3
    assert device.final_blocks_equal == device.final_blocks_recorded == len(_recorded_blocks(name))
    assert device.peak_reserved_predicted_bytes == device.peak_reserved_recorded_bytes


WHOLE = [name for name in PROGRAMS if not name.startswith((*PARTIAL, UNSPLIT))]


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_recording_replays_to_torchs_own_peaks(name: str) -> None:
    truth = _load(f"{name}.program")
    device = _outcome(name)
    statistics = truth["statistics"]
    assert device.peak_reserved_predicted_bytes == statistics["reserved_bytes"]["all"]["peak"]
    assert device.peak_allocated_predicted_bytes == statistics["allocated_bytes"]["all"]["peak"]
    if not name.startswith(PRESSED):
        assert device.free_running is not None
        assert device.free_running.segment_allocs_extra == 0
        assert device.free_running.peak_reserved_bytes == device.peak_reserved_predicted_bytes


def test_a_pool_that_never_splits_blocks_is_named_where_the_rules_do_not_fit() -> None:
    result = replay(read_snapshot(RECORDINGS / f"{UNSPLIT}.snapshot.json.gz"))
    (device,) = result.devices
    elsewhere = device.allocs - device.addresses_equal
    assert 0 < elsewhere == device.elsewhere_in_private
    assert any(
        f"{elsewhere} allocations in private pools lying elsewhere" in n for n in result.notes
    )
    other = replay(read_snapshot(RECORDINGS / "private_pools_0.snapshot.json.gz"))
    assert other.devices[0].elsewhere_in_private == 0
    assert not any("lying elsewhere" in note for note in other.notes)
