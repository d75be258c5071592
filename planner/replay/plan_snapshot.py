"""A plan's allocations on a card as a torch memory snapshot, for torch's own viewer (pytorch.org/memory_viz).

The order is executor/cuda.py's: the arena, what is kept beside it, one block as large as the steps ever take at once
(given back, so that they find their room), then every step's own blocks. Decode is one iteration of its loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planner.allocator import Block, CachingAllocator, parse_settings
from planner.errors import InputError
from planner.plan import Outside, Plan
from planner.replay import snapshot_file
from planner.replay.heap_snapshot import Stack, heap_snapshot
from planner.workspace import peak_bytes


def write(plan: Plan, path: Path) -> None:
    """Write the snapshot: JSON for .json, a pickle for other names, gzipped for .gz. InputError for a plan for the CPU."""
    snapshot_file.dump(path, plan_snapshot(plan))


def plan_snapshot(plan: Plan) -> dict[str, Any]:
    """What `torch.cuda.memory._snapshot()` would return after the plan ran once; stacks are a block's name and its step."""
    if plan.device.kind != "cuda":
        raise InputError(
            f"--snapshot: wanted a plan for a card, found one for {plan.device.profile}: torch records no snapshots "
            "of the CPU; name a card with --device"
        )
    return _Recorder(plan).run()


class _Recorder:
    """An allocator that keeps the stack of each event."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.allocator = CachingAllocator(parse_settings(plan.device.alloc_conf))
        self.allocator.heap.trace = []
        self.frames: list[Stack] = []
        self.live: dict[int, Stack] = {}

    def run(self) -> dict[str, Any]:
        plan = self.plan
        self.take(plan.prediction.arena_bytes, ("arena", "load"))
        for kept in plan.device.kept:
            self.take(kept.size_bytes, (kept.name, "load"))
        scratch = max((peak_bytes(step.outside) for step in plan.steps), default=0)
        if scratch:
            stack = ("room for the steps' own blocks", "load")
            self.give(self.take(scratch, stack), stack)
        for step in plan.steps:
            self.step(step.id, step.outside)
        return heap_snapshot(self.allocator.heap, frames=self.frames, live_frames=self.live)

    def step(self, name: str, blocks: tuple[Outside, ...]) -> None:
        held: list[tuple[int, Block, Stack]] = []
        for number, outside in enumerate(blocks):
            for death, block, stack in held:
                if death <= number:
                    self.give(block, stack)
            held = [entry for entry in held if entry[0] > number]
            if outside.size_bytes:
                stack = (outside.name, name)
                held.append((outside.death, self.take(outside.size_bytes, stack), stack))
        for _, block, stack in held:
            self.give(block, stack)

    def take(self, size_bytes: int, stack: Stack) -> Block:
        block = self.allocator.malloc(size_bytes)
        self.live[block.address] = stack
        self.note(stack)
        return block

    def give(self, block: Block, stack: Stack) -> None:
        del self.live[block.address]
        self.allocator.release(block)
        self.note(stack)

    def note(self, stack: Stack) -> None:
        """The events that came since are of this stack."""
        trace = self.allocator.heap.trace or []
        self.frames += [stack] * (len(trace) - len(self.frames))
