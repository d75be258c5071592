"""A plan's allocations as a torch memory snapshot, for torch's own viewer (pytorch.org/memory_viz).

On a card the order is executor/cuda.py's: the arena, what is kept beside it, one block as large as the steps ever take
at once (given back, so that they find their room), then every step's own blocks. Decode is one iteration of its loop.

On the CPU no allocator caches anything. There the arena is one segment, its buffers are blocks at their offsets from
birth to death, and each block that a kernel takes is a segment of its own that comes and goes with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planner.allocator import Block, CachingAllocator, parse_settings
from planner.allocator.heap import DEFAULT_POOL, Heap
from planner.allocator.settings import Settings
from planner.plan import Plan
from planner.plan.program import Buffer, Outside
from planner.replay import snapshot_file
from planner.replay.heap_snapshot import Stack, heap_snapshot
from planner.replay.placed_run import take_at
from planner.replay.snapshot import PLACED_BY, PLAN
from planner.units import MIB
from planner.workspace import peak_bytes

ARENA_ADDRESS = 1 << 40  # made up, as those behind it


def write(plan: Plan, path: Path) -> None:
    """Write the snapshot: JSON for .json, a pickle for other names, gzipped for .gz."""
    snapshot_file.dump(path, plan_snapshot(plan))


def plan_snapshot(plan: Plan) -> dict[str, Any]:
    """What `torch.cuda.memory._snapshot()` would return after the plan ran once; stacks are a block's name and its step."""
    return _OnCpu(plan).run() if plan.device.kind == "cpu" else _OnCard(plan).run()


class _Recorder:
    """Blocks coming and going, with the stack of each event."""

    def __init__(self, plan: Plan, heap: Heap) -> None:
        self.plan = plan
        self.heap = heap
        self.heap.trace = []
        self.frames: list[Stack] = []
        self.live: dict[int, Stack] = {}

    def snapshot(self) -> dict[str, Any]:
        return heap_snapshot(self.heap, frames=self.frames, live_frames=self.live)

    def step(self, name: str, blocks: tuple[Outside, ...]) -> None:
        """A step's own blocks, in its order."""
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
        raise NotImplementedError

    def give(self, block: Block, stack: Stack) -> None:
        raise NotImplementedError

    def note(self, stack: Stack) -> None:
        """The events that came since are of this stack."""
        trace = self.heap.trace or []
        self.frames += [stack] * (len(trace) - len(self.frames))


class _OnCard(_Recorder):
    """What the caching allocator makes of the plan's blocks."""

    def __init__(self, plan: Plan) -> None:
        self.allocator = CachingAllocator(parse_settings(plan.device.alloc_conf))
        super().__init__(plan, self.allocator.heap)

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
        return self.snapshot()

    def take(self, size_bytes: int, stack: Stack) -> Block:
        block = self.allocator.malloc(size_bytes)
        self.live[block.address] = stack
        self.note(stack)
        return block

    def give(self, block: Block, stack: Stack) -> None:
        del self.live[block.address]
        self.allocator.release(block)
        self.note(stack)


class _OnCpu(_Recorder):
    """The arena's buffers at their offsets, and beside the arena what kernels take."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, Heap(Settings()))
        self.pool = self.heap.pool_of(DEFAULT_POOL, small=False)
        self.behind = ARENA_ADDRESS + _up(plan.prediction.arena_bytes)

    def run(self) -> dict[str, Any]:
        plan = self.plan
        self.heap.add_segment(self.pool, 0, ARENA_ADDRESS, plan.prediction.arena_bytes)
        self.note(("arena", "load"))
        born: dict[int, list[Buffer]] = {}
        dying: dict[int, list[Buffer]] = {}
        for buffer in plan.buffers:
            for birth, death in buffer.lifetimes:
                born.setdefault(birth, []).append(buffer)
                dying.setdefault(death, []).append(buffer)
        for index, step in enumerate(plan.steps):
            for buffer in dying.get(index, ()):
                block = self.heap.blocks[ARENA_ADDRESS + buffer.offset_bytes]
                self.free(block, (buffer.name, step.id))
            for buffer in born.get(index, ()):
                address = ARENA_ADDRESS + buffer.offset_bytes
                (block,) = (b for b in self.heap.free_blocks(self.pool) if _holds(b, address))
                self.live[address] = (buffer.name, step.id)
                take_at(self.heap, block, address, buffer.size_bytes)
                self.note(self.live[address])
            self.step(step.id, step.outside)
        return {**self.snapshot(), PLACED_BY: PLAN}

    def take(self, size_bytes: int, stack: Stack) -> Block:
        address = self.behind
        self.behind += _up(size_bytes)
        block = self.heap.add_segment(self.pool, 0, address, size_bytes)
        self.live[address] = stack
        self.heap.take_front(block, size_bytes, size_bytes, split=False)
        self.note(stack)
        return block

    def give(self, block: Block, stack: Stack) -> None:
        self.free(block, stack)
        self.heap.remove_segment(block)
        self.note(stack)

    def free(self, block: Block, stack: Stack) -> None:
        del self.live[block.address]
        self.heap.request_free(block)
        self.heap.complete_free(block)
        self.note(stack)


def _holds(block: Block, address: int) -> bool:
    return block.address <= address < block.address + block.size_bytes


def _up(size_bytes: int) -> int:
    return -(-size_bytes // (2 * MIB)) * 2 * MIB
