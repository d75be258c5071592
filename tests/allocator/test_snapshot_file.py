"""Files that are no recordings, or that would do harm: one clean error, and no more memory than the file warrants."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import pickletools
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.cli import main
from planner.errors import InputError
from planner.replay import snapshot_file
from planner.replay.snapshot import parse_snapshot, read_snapshot
from planner.units import MIB

Recorded = Callable[..., dict[str, Any]]
EMPTY: dict[str, Any] = {"segments": [], "device_traces": []}


class Evil:
    """Runs a command when a careless reader loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def refused(data: bytes, match: str) -> None:
    """An InputError with these words, and at most 64 MiB beside the input."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=match):
            parse_snapshot(*_entries(data))
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB + 40 * len(data)
    finally:
        tracemalloc.stop()


def _entries(data: bytes) -> tuple[Any]:
    found, size = snapshot_file.loads(data)
    parse_snapshot(found, most_entries=size)
    return (found,)


# --- what is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_pickles_of_every_protocol_are_read(
    recorded: Recorded, protocol: int, packed: bool
) -> None:
    snapshot = recorded(1, steps=300)
    data = pickle.dumps(snapshot, protocol=protocol)
    found, size = snapshot_file.loads(gzip.compress(data) if packed else data)
    assert found == snapshot
    assert size == len(data)
    assert snapshot_file.loads(pickletools.optimize(data))[0] == snapshot


@pytest.mark.parametrize("value", [2**63, -(2**70), 0.5, True, None, "ü" * 300, "x" * 70_000])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_scalars_come_through(value: object, protocol: int) -> None:
    data = pickle.dumps({"segments": [], "more": [value, (value,), {"k": value}]}, protocol)
    assert snapshot_file.loads(data)[0]["more"] == [value, (value,), {"k": value}]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_is_read_with_lists_for_tuples(recorded: Recorded, indent: int | None) -> None:
    snapshot = recorded(2, steps=200)
    data = b"\xef\xbb\xbf" + json.dumps(snapshot, indent=indent).encode()
    assert parse_snapshot(snapshot_file.loads(data)[0]) == parse_snapshot(snapshot)


def test_what_is_written_is_read_and_equal_byte_for_byte(
    recorded: Recorded, tmp_path: Path
) -> None:
    snapshot = recorded(3, steps=200)
    for name in ("a.pickle", "a.json", "a.json.gz", "a.pickle.gz"):
        snapshot_file.dump(tmp_path / name, snapshot)
        first = (tmp_path / name).read_bytes()
        snapshot_file.dump(tmp_path / name, snapshot)
        assert (tmp_path / name).read_bytes() == first
        assert read_snapshot(tmp_path / name) == parse_snapshot(snapshot)
    assert pickle.loads((tmp_path / "a.pickle").read_bytes()) == snapshot
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.json.gz", "a.pickle", "a.pickle.gz"]


def test_a_bare_list_of_segments_is_a_snapshot_without_a_trace(recorded: Recorded) -> None:
    snapshot = recorded(4, steps=100)
    assert parse_snapshot(snapshot["segments"]).devices[0].segments == (
        parse_snapshot(snapshot).devices[0].segments
    )


def test_blocks_without_addresses_lie_one_behind_another() -> None:
    blocks = [
        {"size": 512, "requested_size": 5, "state": "active_allocated"},
        {"size": 2 * MIB - 512, "state": "inactive", "history": []},
    ]
    entry = {"address": 4096, "total_size": 2 * MIB, "stream": 0, "blocks": blocks, "novel": 1}
    ((segment,),) = (d.segments for d in parse_snapshot({"segments": [entry]}).devices)
    assert [block.address for block in segment.blocks] == [4096, 4608]
    assert segment.small


def test_a_segment_without_its_size_is_as_large_as_its_blocks(recorded: Recorded) -> None:
    snapshot = recorded(4, steps=100)
    bare = [{k: v for k, v in s.items() if k != "total_size"} for s in snapshot["segments"]]
    assert parse_snapshot({**snapshot, "segments": bare}) == parse_snapshot(snapshot)


def test_settings_of_the_recording_are_used_whatever_else_they_hold() -> None:
    settings = {
        "PYTORCH_CUDA_ALLOC_CONF": "large_segment_size_mb:32,option_of_the_future:7",
        "max_split_size": 64 * MIB,
        "expandable_segments": True,
        "garbage_collection_threshold": 0.8,
        "roundup_power2_divisions": {str(1 << i): 8 if i > 3 else 0 for i in range(16)},
        "future": object,
    }
    found = parse_snapshot({**EMPTY, "allocator_settings": settings}).settings
    assert found.large_segment_bytes == 32 * MIB
    assert found.max_split_bytes == 64 * MIB
    assert found.expandable_segments
    assert found.roundup_divisions[3:5] == (0, 8)
    broken = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:many", "max_split_size": -1}
    snapshot = parse_snapshot({**EMPTY, "allocator_settings": broken})
    assert "cannot be read" in snapshot.notes[0]


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_names_code_is_refused_and_nothing_runs(
    tmp_path: Path, protocol: int
) -> None:
    target = tmp_path / "made"
    data = pickle.dumps({"segments": [Evil(target)]}, protocol=protocol)
    refused(data, "built-in containers and scalars")
    assert not target.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"(ios\nsystem\n.",
        b"\x80\x02Ppersistent\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x04]\x81.",
    ],
)
def test_every_way_to_make_an_object_is_refused(data: bytes) -> None:
    refused(data, "built-in containers|neither")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x80\x02Nr\xff\xff\xff\x7f.", id="memo index of 2^31"),
        pytest.param(b"\x80\x02Nr\x00\x00\x10\x00.", id="memo index of 2^20"),
        pytest.param(b"(Np2000000000\n.", id="memo index as text"),
        pytest.param(b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".", id="bytes of a tebibyte"),
        pytest.param(b"\x80\x04\x96" + struct.pack("<Q", 2**40) + b".", id="bytearray"),
        pytest.param(b"\x80\x04X\xff\xff\xff\xff.", id="text of 4 GiB"),
        pytest.param(
            b"\x80\x02\x8b\x00\x00\x10\x00" + b"\xff" * MIB + b".", id="int of a mebibyte"
        ),
        pytest.param(b"(I" + b"9" * 5000 + b"\n.", id="int of 5000 digits"),
        pytest.param(b"\x80\x04" + b"}" * MIB + b".", id="only dicts"),
        pytest.param(b"\x80\x04" + b"]" * MIB + b".", id="only lists"),
        pytest.param(b"\x80\x04" + b"\x8f" * (MIB // 8) + b".", id="only sets"),
        pytest.param(b"\x80\x04" + b"N\x85" * MIB, id="tuples without an end"),
        pytest.param(b"\x80\x04\x95" + b"\xff" * 8 + b"N.", id="frame of 2^64"),
        pytest.param(b"\x80\x04h\x07.", id="memo entry that is not there"),
        pytest.param(b"\x80\x04a.", id="empty stack"),
        pytest.param(b"\x80\x04}", id="no end"),
        pytest.param(b"\x80\x04\xfe.", id="no such opcode"),
        pytest.param(b"\x80\x05\x97.", id="out-of-band buffer"),
        pytest.param(b"\x80\x63N.", id="no such protocol"),
    ],
)
def test_hostile_pickles_are_refused_within_their_own_size(data: bytes) -> None:
    refused(data, "snapshot")


def test_references_do_not_multiply_work() -> None:
    events = [{"action": "alloc", "addr": 1, "size": 1, "stream": 0}] * 3000
    data = pickle.dumps({"segments": [], "device_traces": [events] * 3000})
    refused(data, "as many entries as the file has bytes")


def test_nesting_without_end_is_refused() -> None:
    refused(b"[" * 200_000, "nested too deeply|damaged JSON")
    refused(b"\x80\x04" + b"N" + b"\x85" * 100_000 + b".", "snapshot")


def test_a_gzip_bomb_is_refused_before_it_goes_off() -> None:
    data = gzip.compress(b" " * (66 * MIB), mtime=0)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"unpack to more than 64\.0 MiB"):
        snapshot_file.loads(data)
    assert tracemalloc.get_traced_memory()[1] < 2 * 64 * MIB + 2 * MIB
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "neither"),
        (b"hello", "neither"),
        (b"\x1f\x8b\x08garbage", "damaged one|cut off"),
        (gzip.compress(b"{}" * 100)[:-12], "cut off|damaged"),
        (b"{", "damaged JSON"),
        (b'{"segments": NaN}', "damaged JSON"),
        (b"\xff\xfe{", "neither"),
        (b'{"a": 1}', "without the key 'segments'"),
        (b'{"segments": 3}', "segments: wanted a list, found 3"),
        (b'{"segments": [3]}', r"segments\[0\]: wanted a dict, found 3"),
        (b'{"segments": [{"address": "x"}]}', r"segments\[0\]\.address: wanted a whole number"),
        (b'{"segments": [{"address": -1}]}', r"segments\[0\]\.address: wanted 0 to 2\^63"),
        (b'{"segments": [{"address": 1' + b"0" * 4000 + b"}]}", "0 to 2"),
        (
            b'{"segments": [{"address": 0, "total_size": 9, "blocks": []}]}',
            "total_size: wanted the sum of its blocks, 0, found 9",
        ),
        (
            b'{"segments": [{"address": 0, "total_size": 9, "blocks": [{"size": 9, "state": "odd"}]}]}',
            r"blocks\[0\]\.state: wanted one of active_allocated",
        ),
        (b'{"segments": [], "device_traces": 7}', "device_traces: wanted a list"),
        (b'{"segments": [], "device_traces": [[7]]}', r"device_traces\[0\]\[0\]: wanted a dict"),
        (
            b'{"segments": [], "device_traces": [[{"action": "alloc", "addr": 1}]]}',
            r"device_traces\[0\]\[0\]\.size: wanted a whole number, found nothing",
        ),
        (
            b'{"segments": [], "device_traces": [[{"action": "alloc", "addr": 1, "size": 1, "pool_id": [1]}]]}',
            "pool_id: wanted a pool id of two whole numbers",
        ),
    ],
)
def test_what_is_no_snapshot_is_told_with_its_place(data: bytes, match: str) -> None:
    refused(data, match)


def test_segments_that_overlap_are_refused(recorded: Recorded) -> None:
    snapshot = recorded(5, steps=100)
    snapshot["segments"].append(snapshot["segments"][0])
    with pytest.raises(InputError, match="segments beside one another"):
        parse_snapshot(snapshot)


@pytest.mark.parametrize("name", ["missing.pickle", "."])
def test_the_command_says_what_is_wrong_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["replay", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("seed", range(25))
def test_damage_anywhere_gives_a_replay_or_one_clean_error(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    chance = random.Random(seed)
    snapshot = recorded(6, "expandable_segments:True" if seed % 2 else "", steps=120)
    data = bytearray(
        json.dumps(snapshot).encode() if seed % 4 < 2 else pickle.dumps(snapshot, protocol=4)
    )
    for _ in range(chance.choice([1, 3, 20])):
        place = chance.randrange(len(data))
        data[place] = chance.choice([data[place] ^ 1, data[place] ^ 4, chance.randrange(256)])
    path = tmp_path / "damaged"
    path.write_bytes(bytes(data))
    assert main(["replay", str(path)]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(25))
def test_events_that_cannot_be_are_replayed_without_a_traceback(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    chance = random.Random(seed)
    conf = "expandable_segments:True" if seed % 2 else ""
    snapshot = recorded(7, conf, steps=200, side=seed % 3 == 0)
    trace = snapshot["device_traces"][0]
    for _ in range(chance.choice([1, 5, 50])):
        index = chance.randrange(len(trace))
        kind = chance.randrange(6)
        if kind == 0:
            del trace[index]
        elif kind == 1:
            trace.insert(index, dict(trace[chance.randrange(len(trace))]))
        elif kind == 2:
            trace[index] = {**trace[index], "size": chance.choice([0, 1, 7 * MIB, 2**59])}
        elif kind == 3:
            trace[index] = {**trace[index], "addr": chance.choice([0, 2**62, 1 << 47])}
        elif kind == 4:
            trace[index] = {**trace[index], "stream": 3}
        else:
            other = chance.choice(
                ["alloc", "free_completed", "segment_free", "segment_unmap", "segment_map"]
            )
            trace[index] = {**trace[index], "action": other}
    path = tmp_path / "odd.json"
    snapshot_file.dump(path, snapshot)
    assert main(["replay", str(path), "--json"]) == 0
    json.loads(capsys.readouterr().out)
