"""Programs of requests and frees, run on the allocator and recorded as torch records them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from planner.allocator import Block, CachingAllocator, parse_settings
from planner.errors import OutOfMemory
from planner.replay.heap_snapshot import heap_snapshot
from planner.units import MIB


def run_at_random(
    seed: int, conf: str, steps: int, *, limit_bytes: int | None = None, side: bool = False
) -> CachingAllocator:
    """An allocator after `steps` requests and frees, with its trace. `side`: other streams, some using others' blocks."""
    chance = random.Random(seed)
    allocator = CachingAllocator(parse_settings(conf), free_bytes=limit_bytes)
    allocator.heap.trace = []
    live: list[Block] = []
    for step in range(steps):
        if step % 97 == 96:
            allocator.empty_cache()
        if live and (len(live) > 60 or chance.random() < 0.45):
            block = live.pop(chance.randrange(len(live)))
            if side and chance.random() < 0.3:
                allocator.record_stream(block, chance.choice([0, 7, 9]))
            allocator.release(block)
        else:
            size = chance.choice(
                [
                    chance.randint(1, 5000),
                    chance.randint(1, MIB),
                    chance.randint(MIB, 12 * MIB),
                    chance.randint(10 * MIB, 60 * MIB),
                ]
            )
            stream = chance.choice([0, 0, 7]) if side else 0
            try:
                live.append(allocator.malloc(size, stream))
            except OutOfMemory:
                while live:
                    allocator.release(live.pop())
        if side and chance.random() < 0.1:
            allocator.pass_events(chance.choice([0, 7, 9]))
    return allocator


@pytest.fixture
def recorded() -> Callable[..., dict[str, Any]]:
    """A snapshot dict of a random program; `ring`: only its last events."""

    def make(
        seed: int,
        conf: str = "",
        steps: int = 600,
        *,
        ring: int | None = None,
        limit_bytes: int | None = None,
        side: bool = False,
    ) -> dict[str, Any]:
        allocator = run_at_random(seed, conf, steps, limit_bytes=limit_bytes, side=side)
        snapshot = heap_snapshot(allocator.heap)
        if ring is not None:
            snapshot["device_traces"][0] = snapshot["device_traces"][0][-ring:]
        return snapshot

    return make
