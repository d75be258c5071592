"""torch's memory snapshots: segments with their blocks, and the events that led there, device by device.

Read from what `torch.cuda.memory._snapshot()` gives, of any version since 2.0; keys that are not known are left alone.
Source: torch/csrc/cuda/memory_snapshot.cpp and torch/cuda/memory.py.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from planner.allocator.heap import DEFAULT_POOL, PoolId
from planner.allocator.settings import (
    ROUNDUP_INTERVALS,
    UNLIMITED,
    Settings,
    parse_settings,
)
from planner.errors import InputError
from planner.replay import snapshot_file

State = Literal["allocated", "waiting", "free"]
Action = Literal[
    "alloc",
    "free_requested",
    "free_completed",
    "segment_alloc",
    "segment_free",
    "segment_map",
    "segment_unmap",
    "oom",
    "snapshot",
]
_ACTIONS: frozenset[Action] = frozenset(get_args(Action))
_STATES: dict[str, State] = {
    "active_allocated": "allocated",
    "active_pending_free": "waiting",
    "active_awaiting_free": "waiting",
    "inactive": "free",
}
_MOST = 2**63  # of an address
_MOST_BYTES = 2**60  # of a block: torch refuses larger requests itself
_STREAMS = 2**64
PLACED_BY = "placed_by"  # a snapshot's key of ours: who chose the addresses
PLAN = "plan"
_ROOTS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


class BlockRecord(NamedTuple):
    address: int
    size_bytes: int
    requested_bytes: int
    state: State


@dataclass(frozen=True, slots=True)
class SegmentRecord:
    """What the driver gave at once, or one contiguous mapped range of an expandable segment."""

    address: int
    size_bytes: int
    stream: int
    small: bool
    pool_id: PoolId
    expandable: bool
    blocks: tuple[BlockRecord, ...]


class Event(NamedTuple):
    """One entry of a trace. Size is what was requested for blocks; of an oom, address is what the driver still had."""

    action: Action
    address: int
    size_bytes: int
    stream: int
    pool_id: PoolId | None  # None: older versions do not say
    emptied: bool  # its stack names empty_cache


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """One device of a snapshot."""

    device: int
    segments: tuple[SegmentRecord, ...]
    events: tuple[Event, ...]
    pools_told: bool = True  # torch before 2.1 does not say which pool a segment is of


@dataclass(frozen=True, slots=True)
class Snapshot:
    devices: tuple[DeviceRecord, ...]
    settings: Settings
    settings_recorded: bool
    notes: tuple[str, ...] = field(default=())
    placed: bool = False  # by a plan's offsets rather than by an allocator


def read_snapshot(path: Path) -> Snapshot:
    """A snapshot from a pickle or JSON file, gzipped or not. InputError says what is wrong with it, and where."""
    data, size_bytes = snapshot_file.read(path)
    return parse_snapshot(data, name=str(path), most_entries=size_bytes)


def parse_snapshot(
    data: object, *, name: str = "snapshot", most_entries: int | None = None
) -> Snapshot:
    """A snapshot from plain containers. `most_entries`: more events and blocks than this are a trick of references."""
    if isinstance(data, list):
        data = {"segments": data}  # what torch.cuda.memory_snapshot() returns
    if not isinstance(data, dict) or "segments" not in data:
        raise InputError(
            f"{name}: {snapshot_file.WANTED}; found {_kind(data)} without the key 'segments'"
        )
    reader = _Reader(name, most_entries)
    segments: dict[int, list[SegmentRecord]] = {}
    for index, entry in enumerate(reader.sequence(data["segments"], "segments")):
        device, segment = reader.segment(entry, f"segments[{index}]")
        segments.setdefault(device, []).append(segment)
    for of_device in segments.values():
        of_device.sort(key=lambda segment: segment.address)
    traces = [
        reader.trace(trace, f"device_traces[{index}]", segments.get(index, ()))
        for index, trace in enumerate(
            reader.sequence(data.get("device_traces") or [], "device_traces")
        )
    ]
    settings, recorded, notes = _settings(data.get("allocator_settings"), name)
    if reader.unknown:
        counts = ", ".join(
            f"{count} {action!r}" for action, count in sorted(reader.unknown.items())
        )
        notes.append(f"events of kinds that are not known were passed over: {counts}")
    if reader.no_stream:
        notes.append(
            f"{reader.no_stream} events do not say their stream: taken is that of the segment which lies there at "
            "the end, or else stream 0"
        )
    devices = []
    for device in sorted({*segments, *(i for i, events in enumerate(traces) if events)}):
        found = segments.get(device, [])
        for first, second in pairwise(found):
            if first.address + first.size_bytes > second.address:
                raise InputError(
                    f"{name}: wanted segments beside one another, found two at {second.address:#x} of device {device}"
                )
        events = traces[device] if device < len(traces) else ()
        devices.append(DeviceRecord(device, tuple(found), events, reader.pools_told or not found))
    placed = data.get(PLACED_BY) == PLAN
    return Snapshot(tuple(devices), settings, recorded, tuple(notes), placed)


class _Reader:
    """Checks of untrusted values, with the place of what is wrong."""

    def __init__(self, name: str, most_entries: int | None) -> None:
        self.name = name
        self.left = most_entries
        self.unknown: dict[str, int] = {}
        self.no_stream = 0
        self.pools_told = False

    def fail(self, where: str, wanted: str, found: object) -> InputError:
        text = repr(found) if isinstance(found, (int, float, str, bool)) else _kind(found)
        return InputError(f"{self.name}: {where}: wanted {wanted}, found {text[:80]}")

    def sequence(self, value: object, where: str) -> Sequence[object]:
        if not isinstance(value, (list, tuple)):
            raise self.fail(where, "a list", value)
        if self.left is not None:
            self.left -= len(value)
            if self.left < 0:
                raise InputError(
                    f"{self.name}: {where}: wanted as many entries as the file has bytes at most, found more"
                )
        return value

    def mapping(self, value: object, where: str) -> Mapping[Any, Any]:
        if not isinstance(value, dict):
            raise self.fail(where, "a dict", value)
        return value

    def number(
        self,
        entry: Mapping[Any, Any],
        key: str,
        where: str,
        default: int | None = None,
        *,
        most: int = _MOST,
    ) -> int:
        value = entry.get(key, default)
        if type(value) is not int:
            if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
                return self.number({key: int(value)}, key, where, most=most)
            raise self.fail(f"{where}.{key}", "a whole number", value)
        if not 0 <= value <= most:
            found = value if abs(value) < _STREAMS else "more"
            raise self.fail(f"{where}.{key}", f"0 to 2^{most.bit_length() - 1}", found)
        return value

    def stream(self, entry: Mapping[Any, Any], where: str) -> int:
        value = entry.get("stream", 0)
        if type(value) is not int or abs(value) >= _MOST:
            raise self.fail(
                f"{where}.stream", "a whole number", value if type(value) is not int else "more"
            )
        return value % _STREAMS  # a signed pointer is the same stream

    def pool_id(self, value: object, where: str) -> PoolId | None:
        if value is None:
            return None
        if type(value) is int and 0 <= value < _STREAMS:
            return (value, 0)  # as one fork of torch writes it
        if (
            isinstance(value, (list, tuple))
            and len(value) == 2
            and all(type(part) is int and 0 <= part < _STREAMS for part in value)
        ):
            return (value[0], value[1])
        raise self.fail(where, "a pool id of two whole numbers", value)

    def segment(self, value: object, where: str) -> tuple[int, SegmentRecord]:
        entry = self.mapping(value, where)
        address = self.number(entry, "address", where)
        blocks = []
        at = address
        for index, part in enumerate(self.sequence(entry.get("blocks") or [], f"{where}.blocks")):
            here = f"{where}.blocks[{index}]"
            block = self.mapping(part, here)
            length = self.number(block, "size", here, most=_MOST_BYTES)
            state = block.get("state")
            if not isinstance(state, str) or state not in _STATES:
                raise self.fail(f"{here}.state", f"one of {', '.join(_STATES)}", state)
            if self.number(block, "address", here, at) != at or not length:
                raise self.fail(here, "blocks one behind another", block.get("address", length))
            requested = self.number(block, "requested_size", here, _real_size(block, length))
            blocks.append(BlockRecord(at, length, requested, _STATES[state]))
            at += length
        size = self.number(entry, "total_size", where, at - address or None, most=_MOST_BYTES)
        if at != address + size:
            raise self.fail(f"{where}.total_size", f"the sum of its blocks, {at - address}", size)
        kind = entry.get("segment_type", "small" if size == 2 * 2**20 else "large")
        if kind not in ("small", "large"):
            raise self.fail(f"{where}.segment_type", "small or large", kind)
        self.pools_told |= entry.get("segment_pool_id") is not None
        record = SegmentRecord(
            address,
            size,
            self.stream(entry, where),
            kind == "small",
            self.pool_id(entry.get("segment_pool_id"), f"{where}.segment_pool_id") or DEFAULT_POOL,
            bool(entry.get("is_expandable", False)),
            tuple(blocks),
        )
        return self.number(entry, "device", where, 0), record

    def trace(
        self, value: object, where: str, segments: Sequence[SegmentRecord]
    ) -> tuple[Event, ...]:
        """The events; `segments` in order of address, for events that do not say their stream."""
        events = []
        for index, part in enumerate(self.sequence(value, where)):
            if not isinstance(part, dict):
                raise self.fail(f"{where}[{index}]", "a dict", part)
            action = part.get("action")
            if not isinstance(action, str) or action not in _ACTIONS:
                if not isinstance(action, str):
                    raise self.fail(f"{where}[{index}].action", "a word", action)
                self.unknown[action[:40]] = self.unknown.get(action[:40], 0) + 1
                continue
            place = f"{where}[{index}]"
            address = part.get("addr", part.get("device_free", 0))
            size, stream = part.get("size"), part.get("stream")
            # the common case without calls: there may be millions
            if type(address) is not int or not 0 <= address < _MOST:
                address = self.number({"addr": address}, "addr", place)
            if type(size) is not int or not 0 <= size <= _MOST_BYTES:
                size = self.number(part, "size", place, most=_MOST_BYTES)
            if stream is None:
                self.no_stream += action not in ("oom", "snapshot")
                stream = _stream_at(segments, address)
            elif type(stream) is not int or not 0 <= stream < _STREAMS:
                stream = self.stream(part, place)
            pool_id = part.get("pool_id")
            if pool_id is not None:
                self.pools_told = True
                pool_id = self.pool_id(pool_id, f"{place}.pool_id")
            emptied = action in ("segment_free", "segment_unmap") and _emptied(part.get("frames"))
            events.append(Event(action, address, size, stream, pool_id, emptied))
        return tuple(events)


def _stream_at(segments: Sequence[SegmentRecord], address: int) -> int:
    """The stream of the segment that an address lies in, or 0."""
    index = bisect.bisect_right(segments, address, key=lambda segment: segment.address)
    found = segments[index - 1] if index else None
    inside = found is not None and address < found.address + found.size_bytes
    return found.stream if found is not None and inside else 0


def _real_size(block: Mapping[Any, Any], size_bytes: int) -> int:
    """What was requested of a block whose `requested_size` torch 2.0 did not record: its history may say it."""
    history = block.get("history")
    last = history[0] if isinstance(history, (list, tuple)) and history else None
    found = last.get("real_size") if isinstance(last, dict) else None
    return found if type(found) is int and 0 <= found <= size_bytes else size_bytes


def _emptied(frames: object) -> bool:
    """Whether a stack names empty_cache (Python) or emptyCache (C++)."""
    if not isinstance(frames, (list, tuple)):
        return False
    names = [frame.get("name") for frame in frames[:64] if isinstance(frame, dict)]
    return any(isinstance(n, str) and ("empty_cache" in n or "emptyCache" in n) for n in names)


def _settings(recorded: object, name: str) -> tuple[Settings, bool, list[str]]:
    """Settings of the recording's `allocator_settings`; whether there were any; notes about what could not be read."""
    if not isinstance(recorded, dict):
        return Settings(), False, []
    notes: list[str] = []
    settings = Settings()
    text = next((recorded[key] for key in _ROOTS if isinstance(recorded.get(key), str)), "")
    try:
        settings = parse_settings(text, what=f"{name}: allocator_settings", strict=False)
    except InputError as error:
        notes.append(f"settings that cannot be read were taken as torch's own: {error}")
    split = recorded.get("max_split_size")
    if type(split) is int:
        settings = replace(settings, max_split_bytes=split if 0 < split < 2**63 - 1 else UNLIMITED)
    expandable = recorded.get("expandable_segments")
    if isinstance(expandable, bool):
        settings = replace(settings, expandable_segments=expandable)
    threshold = recorded.get("garbage_collection_threshold")
    if isinstance(threshold, (int, float)) and 0 <= threshold < 1:
        settings = replace(settings, garbage_collection_threshold=float(threshold))
    divisions = recorded.get("roundup_power2_divisions")
    if isinstance(divisions, dict):
        found = list(settings.roundup_divisions)
        for index in range(ROUNDUP_INTERVALS):
            value = divisions.get(str(1 << index), divisions.get(1 << index))
            if type(value) is int and 0 <= value < 2**32 and value & (value - 1) == 0:
                found[index] = value
        settings = replace(settings, roundup_divisions=tuple(found))
    return settings, True, notes


def _kind(value: object) -> str:
    return {dict: "a dict", list: "a list", str: "text", type(None): "nothing"}.get(
        type(value), f"a value of type {type(value).__name__}"
    )
