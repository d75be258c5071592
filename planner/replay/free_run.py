"""The run that follows nothing but the program, with made-up addresses: what a prediction has."""

from __future__ import annotations

import bisect

from planner.allocator.expandable import grow, unmap_pages, whole_pages
from planner.replay.outcome import FreeRun
from planner.replay.rollback import RANGE_BYTES
from planner.replay.snapshot import Event
from planner.replay.trace_run import MADE_UP_ADDRESS, TraceRun


class FreeRunning(TraceRun):
    """The run that follows nothing but the program: requests, frees and releases in their order."""

    def run(self) -> FreeRun:
        heap = self.heap
        self.allocs = self.allocs_extra = self.maps = self.maps_extra = 0
        self.next_address = MADE_UP_ADDRESS
        self.segments: dict[int, int] = {address: address for address in self.start.segments}
        peak = heap.reserved_bytes
        for index, event in enumerate(self.record.events):
            action = event.action
            if index in self.attempts:
                self._attempt(self.attempts[index])
            if action == "alloc":
                self._alloc(event, index)
                self.grown = []
                peak = max(peak, heap.reserved_bytes)
            elif action == "free_requested":
                self.request_free(event, index)
            elif action == "free_completed":
                self.complete_free(event)
            elif action in ("segment_alloc", "segment_map"):
                self.grown.append(event)
            elif action == "segment_free":
                self.grown = []  # of an attempt that failed
                self._release(event, index)
            elif action == "segment_unmap":
                self.grown = []
                self._unmap(event)
        return FreeRun(
            self.allocs, self.allocs_extra, self.maps, self.maps_extra, peak, heap.reserved_bytes
        )

    def _alloc(self, event: Event, index: int) -> None:
        heap, grown = self.heap, self.grown
        size = self.settings.round_size(event.size_bytes)
        pool = heap.pool(size, self.pool_id(index))
        if grown:
            pool.expandable = grown[-1].action == "segment_map"
        block = None if grown else self.grown_before(event, index, pool, size)
        if block is None and index not in self.refused:
            block = heap.find(pool, event.stream, size)
        if block is None and pool.expandable:
            room = max((found.size_bytes for found in self.start.ranges), default=RANGE_BYTES)
            room = max(room, 2 * size)
            growth = grow(
                heap,
                pool,
                event.stream,
                size,
                new_range=lambda: (self._made_up(max(RANGE_BYTES, 2 * room)), room),
            )
            block = growth.block
            sizes = [found.size_bytes for found in grown if found.action == "segment_map"]
            for pages in growth.mapped:
                if pages.size_bytes in sizes:
                    sizes.remove(pages.size_bytes)
                    self.maps += 1
                else:
                    self.maps_extra += 1
        elif block is None:
            segment = self.settings.segment_size(size)
            address = self._made_up(segment)
            same = [g for g in grown if g.action == "segment_alloc" and g.size_bytes == segment]
            if same:
                self.allocs += 1
                self.segments[same[0].address] = address
            else:
                self.allocs_extra += 1
            block = heap.add_segment(pool, event.stream, address, segment)
        assert block is not None  # nothing refuses here
        self.held[event.address] = heap.take(block, size, event.size_bytes)

    def _made_up(self, size_bytes: int) -> int:
        address = self.next_address
        self.next_address += size_bytes
        return address

    def _release(self, event: Event, index: int) -> None:
        """The segment made for the same request, or another free one of that size."""
        heap = self.heap
        block = heap.blocks.get(self.segments.pop(event.address, -1))
        if (
            block is None
            or not block.is_free
            or block.is_split
            or block.size_bytes != event.size_bytes
        ):
            keys = heap.pool_of(
                self.pool_id(index), event.size_bytes == self.settings.page_size(small=True)
            ).free.get(event.stream, [])
            same = keys[bisect.bisect_left(keys, (event.size_bytes, 0)) :]
            block = next(
                (
                    heap.blocks[address]
                    for size, address in same
                    if size == event.size_bytes and not heap.blocks[address].is_split
                ),
                None,
            )
        if block is not None:
            heap.remove_segment(block)

    def _unmap(self, event: Event) -> None:
        """The first event of a release gives all whole free pages of that pool back."""
        found = self.start.range_of(event.address)
        if found is None:
            return  # of no size
        pool = self.heap.pool_of(found.pool_id, found.small)
        for block in list(self.heap.free_blocks(pool)):
            if block.reservation is not None and whole_pages(block).size_bytes:
                unmap_pages(self.heap, block, whole_pages(block))
