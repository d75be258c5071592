"""The run that compares a trace event by event with what the rules say, and follows the recording."""

from __future__ import annotations

import bisect

from planner.allocator.expandable import Pages, grow, map_pages, reserve, unmap_pages, whole_pages
from planner.allocator.heap import DEFAULT_POOL, Block, Pool, PoolId
from planner.replay.outcome import Outcome
from planner.replay.rollback import RANGE_BYTES
from planner.replay.snapshot import Event
from planner.replay.trace_run import TraceRun


class GuidedRun(TraceRun):
    """The run that compares event by event and follows the recording."""

    def run(self) -> Outcome:
        out, heap = self.outcome, self.heap
        events = self.record.events
        out.events = len(events)
        out.guessed_sizes, out.contradictions = self.start.guessed_sizes, self.start.contradictions
        out.start_reserved_bytes = heap.reserved_bytes
        out.start_blocks = sum(block.mapped for block in heap.blocks.values())
        out.peak_reserved_recorded_bytes = out.peak_reserved_predicted_bytes = heap.reserved_bytes
        releasing = False
        for index, event in enumerate(events):
            action = event.action
            if index in self.attempts:
                self._attempt(self.attempts[index])
            if action in ("segment_free", "segment_unmap"):
                if not releasing:
                    out.releases += 1
                    self._finish_attempt(index)
                    self.expected = self._releasable(index)
                releasing = True
                self._release(event)
                continue
            releasing = False
            if action == "alloc":
                self._alloc(event, index)
                self.grown = []
            elif action == "free_requested":
                out.frees_requested += 1
                self.request_free(event, index)
                follows = events[index + 1] if index + 1 < len(events) else None
                if index not in self.start.silent and (
                    follows is None
                    or follows.action != "free_completed"
                    or follows.address != event.address
                ):
                    out.frees_deferred += 1
            elif action == "free_completed":
                out.frees_completed += 1
                self.complete_free(event)
            elif action in ("segment_alloc", "segment_map"):
                self.grown.append(event)
            elif action == "oom":
                out.ooms_recorded += 1
                pool = heap.pool(event.size_bytes, self.pool_id(index))
                out.ooms_predicted += (
                    index in self.refused or heap.find(pool, event.stream, event.size_bytes) is None
                )
            elif action == "snapshot" and event.pool_id in (None, DEFAULT_POOL):
                out.snapshots_recorded += 1
                out.snapshots_equal += event.size_bytes == heap.stats.active_bytes.all.current
        for event in self.grown:
            # grown for a request that failed, or whose event did not come any more
            self._grow_as_recorded(event, self.pool_id(len(events) - 1))
        out.retries = len(self.attempts)
        out.pools_inferred = self.unknown_pools
        out.peak_allocated_predicted_bytes = heap.stats.allocated_bytes.all.peak
        out.statistics = heap.stats.as_dict()
        self._compare_final()
        return out

    # --- allocations ----------------------------------------------------------------------------------------------

    def _alloc(self, event: Event, index: int) -> None:
        out, heap, grown = self.outcome, self.heap, self.grown
        out.allocs += 1
        size = self.settings.round_size(event.size_bytes)
        pool_id = self.latest_pool = self.pool_id(index)
        pool = heap.pool(size, pool_id)
        allocs = [g for g in grown if g.action == "segment_alloc"]
        maps = [g for g in grown if g.action == "segment_map"]
        out.segment_allocs_recorded += len(allocs)
        out.segment_maps_recorded += len(maps)
        if grown:
            pool.expandable = bool(maps)
        predicted = None
        if not grown:
            predicted = self.grown_before(event, index, pool, size)
        if predicted is None and index not in self.refused:
            predicted = heap.find(pool, event.stream, size)
        expected = predicted.address if predicted is not None else -1
        before = heap.reserved_bytes
        if predicted is not None:
            for found in grown:
                self._grow_as_recorded(found, pool_id)
        elif pool.expandable:
            expected = self._grow_pages(event, pool, size, maps)
            for found in allocs:
                self._grow_as_recorded(found, pool_id)
        else:
            segment = self.settings.segment_size(size)
            before += segment
            if allocs and allocs[-1].size_bytes == segment:
                out.segment_allocs_predicted += 1
                expected = allocs[-1].address
            else:
                out.segment_allocs_extra += 1
            for found in grown:
                self._grow_as_recorded(found, pool_id)
        out.peak_reserved_recorded_bytes = max(
            out.peak_reserved_recorded_bytes, heap.reserved_bytes
        )
        if predicted is not None or not pool.expandable:
            out.peak_reserved_predicted_bytes = max(out.peak_reserved_predicted_bytes, before)
        out.addresses_equal += expected == event.address
        out.elsewhere_in_private += expected != event.address and pool_id != DEFAULT_POOL
        self.held[event.address] = self._place(event, pool, size)

    def _grow_pages(self, event: Event, pool: Pool, size: int, maps: list[Event]) -> int:
        """Map what the rules say, count it, put it right; the address they give."""
        out = self.outcome
        base, room = self._base(maps, pool, size + self.settings.page_size(pool.small))
        growth = grow(self.heap, pool, event.stream, size, new_range=lambda: (base, room))
        out.peak_reserved_predicted_bytes = max(
            out.peak_reserved_predicted_bytes, self.heap.reserved_bytes
        )
        recorded = [Pages(found.address, found.size_bytes) for found in maps]
        equal = sum(pages in recorded for pages in growth.mapped)
        out.segment_maps_predicted += equal
        out.segment_maps_extra += len(growth.mapped) - equal
        assert growth.block is not None  # nothing refuses here
        address = growth.block.address
        for pages in growth.mapped:
            if pages not in recorded:
                self._unmap(pages)
        for found, pages in zip(maps, recorded, strict=True):
            if pages not in growth.mapped:
                self._grow_as_recorded(found, pool.id)
        return address

    def _finish_attempt(self, index: int) -> None:
        """Count what a failed attempt had mapped before the driver refused: the rules map the same until then."""
        maps, self.grown = self.grown, []
        if not maps:
            return
        out = self.outcome
        request = next((i for i in self.attempts.values() if i > index), None)
        out.segment_maps_recorded += sum(found.action == "segment_map" for found in maps)
        out.segment_allocs_recorded += sum(found.action == "segment_alloc" for found in maps)
        pool_id = self.pool_id(index - 1)
        if request is None or not all(found.action == "segment_map" for found in maps):
            for found in maps:
                self._grow_as_recorded(found, pool_id)
            return
        event = self.record.events[request]
        size = self.settings.round_size(event.size_bytes)
        extra, peak = out.segment_maps_extra, out.peak_reserved_predicted_bytes
        self._grow_pages(event, self.heap.pool(size, pool_id), size, maps)
        # what was not mapped any more was refused, not missed
        out.segment_maps_extra, out.peak_reserved_predicted_bytes = extra, peak
        reserved = self.heap.reserved_bytes
        out.peak_reserved_recorded_bytes = max(out.peak_reserved_recorded_bytes, reserved)
        out.peak_reserved_predicted_bytes = max(out.peak_reserved_predicted_bytes, reserved)

    def _base(self, maps: list[Event], pool: Pool, size: int) -> tuple[int, int]:
        """Address and size of a new expandable segment: its first page is the first that is mapped."""
        found = self.start.range_of(maps[0].address) if maps else None
        if found is not None and self._inside(maps[0].address) is None:
            room = self._room(maps[0].address, found.address + found.size_bytes, pool.small)
            if room >= size:
                return maps[0].address, room
        self.made_up += max(RANGE_BYTES, 2 * size)
        return self.made_up, max(RANGE_BYTES, 2 * size)

    def _room(self, address: int, end: int, small: bool) -> int:
        """Bytes of whole pages up to `end` where no other block lies."""
        page = self.settings.page_size(small)
        return (self._free_until(address, end) - address) // page * page

    def _free_until(self, address: int, end: int) -> int:
        """The end of what lies free of any segment from an address on, `end` at most."""
        behind = min((a for a in self.heap.blocks if address <= a < end), default=end)
        return address if self._inside(address) is not None else behind

    def _grow_as_recorded(self, event: Event, pool_id: PoolId) -> None:
        heap, out = self.heap, self.outcome
        address, end = event.address, event.address + event.size_bytes
        if event.action == "segment_alloc":
            pool = heap.pool_of(pool_id, event.size_bytes == self.settings.page_size(small=True))
            self._clear(address)
            doubtful = bool(out.contradictions or self.start.ranges)
            if address == end or (doubtful and self._free_until(address, end) < end):
                out.contradictions += 1
                return
            heap.add_segment(pool, event.stream, address, event.size_bytes)
            return
        found = self.start.range_of(address)
        if found is not None and self._inside(address) is None:
            room = self._room(address, found.address + found.size_bytes, found.small)
            if room:
                reserve(heap, heap.pool_of(found.pool_id, found.small), event.stream, address, room)
        while address < end:
            block = self._inside(address)
            if block is None or block.reservation is None:
                out.contradictions += 1
                return
            if block.mapped:
                address = block.address + block.size_bytes
                continue
            if block.address < address:
                block.pool.remove_unmapped(block)
                front, block = block, heap.cut(block, address - block.address)
                front.pool.insert_unmapped(front)
                block.pool.insert_unmapped(block)
            pages = map_pages(heap, block, min(end - address, block.size_bytes))
            assert pages is not None  # nothing refuses here
            address = pages.address + pages.size_bytes

    # --- the recording's word -------------------------------------------------------------------------------------

    def _place(self, event: Event, pool: Pool, size: int) -> Block:
        """The block at the recorded address, handed out; what lies in its way gives way."""
        heap, address = self.heap, event.address
        block = heap.blocks.get(address)
        if block is None or not block.is_free or not block.mapped or block.size_bytes < size:
            self.outcome.contradictions += 1
            block = self._make_room(event, pool, size)
        return heap.take(block, min(size, block.size_bytes), event.size_bytes)

    def _make_room(self, event: Event, pool: Pool, size: int) -> Block:
        """A free block from the recorded address on, of `size` where its segment has that much left."""
        heap, address = self.heap, event.address
        block = self._inside(address)
        if block is None:
            # in no segment: its growth was not recorded
            segment = address + self.settings.segment_size(size)
            room = self._free_until(address, segment) - address
            return heap.add_segment(pool, event.stream, address, room)
        block = self._evict(block)
        if not block.mapped:
            found = Event("segment_map", address, size, event.stream, None, False)
            self._grow_as_recorded(found, pool.id)
            block = self._inside(address) or block
        if block.address < address:
            block.pool.remove(block)
            front, block = block, heap.cut(block, address - block.address)
            front.pool.insert(front)
            block.pool.insert(block)
        while block.size_bytes < size and block.next is not None and block.next.mapped:
            following = block.next
            if following.is_free:
                block.pool.remove(block)
                heap.join(block, following)
                block.pool.insert(block)
            else:
                block = self._evict(following)  # joins the free block in front of it, which is ours
        return block

    def _evict(self, block: Block) -> Block:
        """A block that must be free here, freed."""
        if block.is_free:
            return block
        self.held = {a: held for a, held in self.held.items() if held is not block}
        if block.allocated:
            self.heap.request_free(block)
        block.waiting = 0
        return self.heap.complete_free(block)

    def _inside(self, address: int) -> Block | None:
        """The block that an address lies in."""
        block = self.heap.blocks.get(address)
        if block is not None:
            return block
        addresses = sorted(self.heap.blocks)
        index = bisect.bisect_right(addresses, address)
        if not index:
            return None
        block = self.heap.blocks[addresses[index - 1]]
        return block if address < block.address + block.size_bytes else None

    def _clear(self, address: int) -> None:
        """Take away the segment that lies where a new one came: its end was not recorded."""
        block = self.heap.blocks.get(address)
        if block is not None:
            self.outcome.contradictions += 1
            if block.reservation is None and block.previous is None:
                self.heap.remove_segment(self._whole(block))

    def _whole(self, block: Block) -> Block:
        """A segment as one free block."""
        while block.previous is not None:
            block = block.previous
        block = self._evict(block)
        while block.next is not None:
            if not block.next.is_free:
                block = self._evict(block.next)
                continue
            block.pool.remove(block)
            self.heap.join(block, block.next)
            block.pool.insert(block)
        return block

    # --- giving back ----------------------------------------------------------------------------------------------

    def _releasable(self, index: int) -> set[Pages]:
        """What an empty_cache at this event gives back: of the default pools, and of private ones that give too."""
        events = self.record.events
        pool_ids = {DEFAULT_POOL}
        while index < len(events) and events[index].action in ("segment_free", "segment_unmap"):
            pool_ids.add(self.pool_id(index))
            index += 1
        found = set()
        for pool in self.heap.pools.values():
            if pool.id in pool_ids:
                for block in self.heap.free_blocks(pool):
                    if block.reservation is not None:
                        found.add(whole_pages(block))
                    elif not block.is_split:
                        found.add(Pages(block.address, block.size_bytes))
        return found

    def _release(self, event: Event) -> None:
        pages = Pages(event.address, event.size_bytes)
        self.outcome.segment_frees_recorded += 1
        self.outcome.segment_frees_predicted += pages in self.expected
        if event.action == "segment_unmap":
            self._unmap(pages)
            return
        block = self.heap.blocks.get(event.address)
        if block is None or block.reservation is not None:
            self.outcome.contradictions += 1
            return
        if not block.is_free or block.is_split:
            self.outcome.contradictions += 1
            block = self._whole(block)
        self.heap.remove_segment(block)

    def _unmap(self, pages: Pages) -> None:
        at, end = pages.address, pages.address + pages.size_bytes
        while at < end:
            block = self._inside(at)
            if block is None or block.reservation is None:
                self.outcome.contradictions += 1
                return
            block = self._evict(block)
            stop = block.address + block.size_bytes
            if block.mapped:
                unmap_pages(self.heap, block, Pages(at, min(stop, end) - at))
            at = stop

    # --- the end --------------------------------------------------------------------------------------------------

    def _compare_final(self) -> None:
        out, heap = self.outcome, self.heap
        for segment in self.record.segments:
            for recorded in segment.blocks:
                out.final_blocks_recorded += 1
                block = heap.blocks.get(recorded.address)
                if block is None or not block.mapped or block.size_bytes != recorded.size_bytes:
                    continue
                state = "free" if block.is_free else "allocated" if block.allocated else "waiting"
                out.final_blocks_equal += state == recorded.state
