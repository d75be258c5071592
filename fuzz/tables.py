"""Memory snapshots and tables of buffers."""

from __future__ import annotations

import gzip
import json
import pickle
from random import Random

from fuzz.mutate import as_json, spoil_bytes, spoil_value
from fuzz.target import Place, Target


def snapshot_target(place: Place) -> Target:
    from planner.replay.snapshot import parse_snapshot
    from planner.replay.snapshot_file import loads

    block = {
        "size": 512,
        "requested_size": 100,
        "address": 4096,
        "state": "active_allocated",
        "frames": [],
    }
    free = {"size": 1536, "requested_size": 0, "address": 4608, "state": "inactive", "frames": []}
    segment = {
        **{"device": 0, "address": 4096, "total_size": 2048, "stream": 0, "segment_type": "small"},
        **{
            "allocated_size": 512,
            "active_size": 512,
            "segment_pool_id": [0, 0],
            "is_expandable": False,
        },
        "blocks": [block, free],
    }
    event = {
        "action": "alloc",
        "addr": 4096,
        "size": 512,
        "stream": 0,
        "time_us": 1,
        "frames": [],
        "device": 0,
    }
    settings = {"PYTORCH_CUDA_ALLOC_CONF": "", "max_split_size": -1, "expandable_segments": False}
    events = [
        {**event, "action": name}
        for name in ("segment_alloc", "alloc", "free_requested", "free_completed")
    ]
    data = {"segments": [segment], "device_traces": [events], "allocator_settings": settings}
    text = json.dumps(data)
    pickles = [pickle.dumps(data, protocol=number) for number in range(6)]
    seeds = [
        text.encode(),
        *pickles,
        gzip.compress(text.encode(), mtime=0),
        gzip.compress(pickles[4], mtime=0),
    ]

    def make(chance: Random) -> bytes:
        if chance.random() < 0.5:
            return spoil_bytes(chance.choice(seeds), chance, seeds)
        value = spoil_value(json.loads(text), chance)
        made = as_json(value, chance)
        if chance.random() < 0.6:
            made = pickle.dumps(value, protocol=chance.randrange(6))
        return gzip.compress(made, mtime=0, compresslevel=1) if chance.random() < 0.1 else made

    def read(data: bytes) -> None:
        value, size_bytes = loads(data)
        parse_snapshot(value, most_entries=size_bytes)

    return Target(make, read)


def pack_target(place: Place) -> Target:
    from planner.layout.cli import read as read_table

    rows = "".join(f"{i},{i},{i + 3},{512 * (i + 1)},x\n" for i in range(8))
    seeds = [
        f"id,lower,upper,size,note\n{rows}".encode(),
        b'\xef\xbb\xbf"id","lower","upper","size"\r\n"a ""b""",0,1,1\r\n',
    ]

    def make(chance: Random) -> bytes:
        return spoil_bytes(chance.choice(seeds), chance, seeds)

    def read(data: bytes) -> None:
        for span in read_table(place.file("a.csv", data))[2]:
            assert 0 <= span.lower < span.upper
            assert span.size > 0

    return Target(make, read)
