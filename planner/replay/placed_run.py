"""The run of a recording whose blocks lie where a plan put them: no allocator chose, so that none is asked."""

from __future__ import annotations

from planner.allocator.heap import DEFAULT_POOL, Block, Heap
from planner.allocator.settings import Settings
from planner.replay.guided_run import GuidedRun
from planner.replay.rollback import Start
from planner.replay.snapshot import DeviceRecord, Event


def take_at(heap: Heap, block: Block, address: int, size_bytes: int) -> Block:
    """The part of a free block from an address on, handed out; what is left of it on either side stays free."""
    if block.address < address:
        block.pool.remove(block)
        front, block = block, heap.cut(block, address - block.address)
        front.pool.insert(front)
        block.pool.insert(block)
    return heap.take_front(block, size_bytes, size_bytes, split=block.size_bytes > size_bytes)


class PlacedRun(GuidedRun):
    """As the run that follows the recording; predicted is each block whose place is free."""

    def __init__(self, record: DeviceRecord, settings: Settings, start: Start) -> None:
        super().__init__(record, settings, start)
        self.attempts = {}  # nothing is retried

    def _alloc(self, event: Event, index: int) -> None:
        out, heap = self.outcome, self.heap
        out.allocs += 1
        for found in self.grown:
            before = out.contradictions
            self._grow_as_recorded(found, DEFAULT_POOL)
            out.segment_allocs_recorded += 1
            out.segment_allocs_predicted += out.contradictions == before
        reserved = heap.reserved_bytes
        out.peak_reserved_recorded_bytes = max(out.peak_reserved_recorded_bytes, reserved)
        out.peak_reserved_predicted_bytes = max(out.peak_reserved_predicted_bytes, reserved)
        size = event.size_bytes
        block = self._inside(event.address)
        if block is None or not block.is_free or event.address + size > _end(block):
            # on another block, or in no segment
            out.contradictions += 1
            block = self._make_room(event, heap.pool_of(DEFAULT_POOL, small=False), size)
            size = min(size, block.size_bytes)
        else:
            out.addresses_equal += 1
        self.held[event.address] = take_at(heap, block, event.address, size)


def _end(block: Block) -> int:
    return block.address + block.size_bytes
