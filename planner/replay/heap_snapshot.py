"""An allocator's blocks and recorded events, as the dict that `torch.cuda.memory._snapshot()` returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from planner.allocator.heap import Block, Heap
from planner.allocator.settings import ROUNDUP_INTERVALS, UNLIMITED, Settings

Stack = tuple[str, ...]  # names of frames, the innermost first

_STATES = {True: "active_allocated", False: "active_awaiting_free"}


def heap_snapshot(
    heap: Heap,
    *,
    device: int = 0,
    frames: Sequence[Stack] = (),
    live_frames: Mapping[int, Stack] | None = None,
) -> dict[str, Any]:
    """The snapshot of one device. `frames` are the events' stacks, `live_frames` those of live blocks by address.

    An event's number stands for its time: nothing here knows a clock.
    """
    stacks: dict[Stack, list[dict[str, Any]]] = {}

    def stack(names: Stack) -> list[dict[str, Any]]:
        if names not in stacks:
            stacks[names] = [{"name": name, "filename": "plan", "line": 0} for name in names]
        return stacks[names]

    trace = []
    for index, event in enumerate(heap.trace or ()):
        trace.append(
            {
                "action": event.action,
                "device_free" if event.action == "oom" else "addr": event.address,
                "size": event.size_bytes,
                "stream": event.stream,
                "time_us": index,
                "frames": stack(frames[index] if index < len(frames) else ()),
                "pool_id": event.pool_id,
            }
        )
    segments = []
    for address in sorted(heap.blocks):
        block = heap.blocks[address]
        if block.mapped and (block.previous is None or not block.previous.mapped):
            segments.append(_segment(block, device, live_frames or {}, stack))
    return {
        "segments": segments,
        "device_traces": [[] for _ in range(device)] + [trace],
        "allocator_settings": _settings(heap.settings),
    }


def _segment(
    block: Block,
    device: int,
    live_frames: Mapping[int, Stack],
    stack: Callable[[Stack], list[dict[str, Any]]],
) -> dict[str, Any]:
    blocks = []
    part: Block | None = block
    while part is not None and part.mapped:
        blocks.append(
            {
                "address": part.address,
                "size": part.size_bytes,
                "requested_size": part.requested_bytes,
                "state": "inactive" if part.is_free else _STATES[part.allocated],
                "frames": stack(live_frames.get(part.address, ())),
            }
        )
        part = part.next
    active = [entry for entry in blocks if entry["state"] != "inactive"]
    allocated = [entry for entry in blocks if entry["state"] == "active_allocated"]
    return {
        "device": device,
        "address": block.address,
        "total_size": sum(entry["size"] for entry in blocks),
        "allocated_size": sum(entry["size"] for entry in allocated),
        "active_size": sum(entry["size"] for entry in active),
        "requested_size": sum(entry["requested_size"] for entry in active),
        "stream": block.stream,
        "segment_type": "small" if block.pool.small else "large",
        "segment_pool_id": block.pool.id,
        "is_expandable": block.reservation is not None,
        "frames": [],
        "blocks": blocks,
    }


def _settings(settings: Settings) -> dict[str, Any]:
    split = settings.max_split_bytes
    conf = [f"expandable_segments:{settings.expandable_segments}"]
    if settings.large_segment_bytes != Settings().large_segment_bytes:
        conf.append(f"large_segment_size_mb:{settings.large_segment_bytes >> 20}")
    if settings.max_non_split_rounding_bytes != Settings().max_non_split_rounding_bytes:
        conf.append(f"max_non_split_rounding_mb:{settings.max_non_split_rounding_bytes >> 20}")
    return {
        "PYTORCH_CUDA_ALLOC_CONF": ",".join(conf),
        "max_split_size": -1 if split == UNLIMITED else split,
        "garbage_collection_threshold": settings.garbage_collection_threshold,
        "expandable_segments": settings.expandable_segments,
        "roundup_power2_divisions": {
            str(1 << index): settings.roundup_divisions[index] for index in range(ROUNDUP_INTERVALS)
        },
    }
