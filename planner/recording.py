"""A recorded trace run through the allocator's rules: what they say beside what happened.

Each event of the trace is applied to the state in which the recording was. For an allocation the rules name a block,
or say that the driver is asked and for how much; that is compared with what was recorded, then what was recorded is
taken as the truth, so that one difference does not lead to others. What no recording shows is taken from it: when
work on other streams ended (`free_completed`), when memory was given back (`segment_free`) and which pool was meant.

A second run takes no truth: addresses of new segments are made up and every block lies where the rules put it
(`free_running`), which is what a prediction has.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

from planner.allocator_settings import SMALL_BYTES, Settings
from planner.expandable import Pages, grow, map_pages, reserve, unmap_pages, whole_pages
from planner.heap import DEFAULT_POOL, Block, Heap, Pool, PoolId
from planner.rollback import RANGE_BYTES, UNKNOWN, Start, roll_back
from planner.snapshot import DeviceRecord, Event, Snapshot

MADE_UP_ADDRESS = 1 << 65  # above what any driver gives


@dataclass(slots=True)
class Outcome:
    """One device: recorded and predicted. `*_predicted` were made at the same point with the same size."""

    device: int
    events: int = 0
    allocs: int = 0
    addresses_equal: int = 0
    frees_requested: int = 0
    frees_completed: int = 0
    frees_deferred: int = 0
    segment_allocs_recorded: int = 0
    segment_allocs_predicted: int = 0
    segment_allocs_extra: int = 0
    segment_maps_recorded: int = 0
    segment_maps_predicted: int = 0
    segment_maps_extra: int = 0
    segment_frees_recorded: int = 0  # and unmaps
    segment_frees_predicted: int = 0  # as an empty_cache at that point gives back
    releases: int = 0  # runs of segment_free: empty_cache, garbage collection or pressure
    retries: int = 0  # of them, those followed at once by new memory
    ooms_recorded: int = 0
    ooms_predicted: int = 0
    snapshots_recorded: int = 0
    snapshots_equal: int = 0  # with the recorded sum of active blocks
    start_reserved_bytes: int = 0
    start_blocks: int = 0
    guessed_sizes: int = 0
    contradictions: int = 0
    peak_reserved_recorded_bytes: int = 0
    peak_reserved_predicted_bytes: int = 0
    peak_allocated_predicted_bytes: int = 0
    final_blocks_recorded: int = 0
    final_blocks_equal: int = 0
    free_running: FreeRun | None = None
    statistics: dict[str, int] = field(default_factory=dict)

    @property
    def frees(self) -> int:
        """Frees that the program made; where a recording left these events out, those that were completed."""
        return self.frees_requested or self.frees_completed


@dataclass(frozen=True, slots=True)
class FreeRun:
    """The same trace without the recording's addresses and without putting anything right."""

    segment_allocs_predicted: int
    segment_allocs_extra: int
    segment_maps_predicted: int
    segment_maps_extra: int
    peak_reserved_bytes: int
    final_reserved_bytes: int


@dataclass(frozen=True, slots=True)
class Replay:
    """All devices with a trace."""

    devices: tuple[Outcome, ...]
    notes: tuple[str, ...]

    def total(self, name: str) -> int:
        """The sum of one count over the devices."""
        return sum(getattr(device, name) for device in self.devices)


def replay(snapshot: Snapshot) -> Replay:
    """Each device's trace beside what the rules predict."""
    devices = []
    notes = list(snapshot.notes)
    for record in snapshot.devices:
        if not record.events:
            notes.append(f"device {record.device}: no trace, only its final state is known")
            continue
        settings = snapshot.settings
        start = roll_back(record, settings)
        outcome = _Guided(record, settings, start).run()
        outcome.free_running = _Free(record, settings, start).run()
        devices.append(outcome)
        notes += _notes(outcome, record, snapshot)
    return Replay(tuple(devices), tuple(notes))


def _notes(outcome: Outcome, record: DeviceRecord, snapshot: Snapshot) -> list[str]:
    """What cannot be known, and what did not fit."""
    name = f"device {outcome.device}"
    notes = []
    if not snapshot.settings_recorded:
        notes.append(f"{name}: the allocator's settings were not recorded, torch's own are assumed")
    if outcome.guessed_sizes:
        notes.append(
            f"{name}: {outcome.guessed_sizes} blocks were alive before the trace and freed in it; "
            "the slack of each (up to 1 MiB) is not recorded and was taken as none"
        )
    if outcome.frees_deferred:
        notes.append(
            f"{name}: {outcome.frees_deferred} frees waited for other streams; when those ended is as recorded, "
            "a prediction cannot know"
        )
    if outcome.retries:
        notes.append(
            f"{name}: {outcome.retries} times memory was given back and more was asked for at once: "
            "a retry under pressure or an empty_cache, which the events alone do not tell apart"
        )
    if outcome.contradictions:
        notes.append(
            f"{name}: {outcome.contradictions} events do not fit what the rules made of those before and were put "
            "right; settings that changed during the trace are not recorded"
        )
    if all(event.pool_id is None for event in record.events) and any(
        segment.pool_id != DEFAULT_POOL for segment in record.segments
    ):
        notes.append(
            f"{name}: there are private pools, and this torch did not record which pool an event belongs to: "
            "it was taken from the segment that the address lies in"
        )
    return notes


class _Run:
    """A trace going through a heap. What both runs share: frees, and who holds what."""

    def __init__(self, record: DeviceRecord, settings: Settings, start: Start) -> None:
        self.record = record
        self.settings = settings
        self.start = start
        self.heap = start.heap(settings)
        self.grown: list[Event] = []  # growth recorded since the last event of another kind
        self.held = {
            address: block
            for address, block in self.heap.blocks.items()
            if block.allocated or block.waiting
        }
        _mark_pools(self.heap, record, start)
        self.attempts = _attempts(record.events)
        self.unknown_pools = 0
        self.made_up = MADE_UP_ADDRESS
        self.latest_pool = DEFAULT_POOL  # of the last allocation
        self.refused: set[int] = (
            set()
        )  # requests for which nothing was free before memory was given back
        self.outcome = Outcome(record.device)

    def pool_id(self, index: int) -> PoolId:
        """The pool of an event: as recorded, else that of the segment it lies in, else what the rules leave.

        Older versions do not record it. Where the segment is gone at the end, new memory although the default pool
        has a block that fits belongs to a private pool: the latest one, or a new one where that has a block too.
        """
        known = self.start.pool_ids[index]
        if known is not None:
            return known
        event = self.record.events[index]
        block = self.heap.blocks.get(event.address)
        if event.action != "alloc" or not self.grown:
            pool_id = block.pool.id if block is not None else DEFAULT_POOL
        else:
            pool_id = self._unknown_pool(event)
        self.start.pool_ids[index] = pool_id
        return pool_id

    def _unknown_pool(self, event: Event) -> PoolId:
        size = self.settings.round_size(event.size_bytes)

        def fits(pool_id: PoolId) -> bool:
            return self.heap.find(self.heap.pool(size, pool_id), event.stream, size) is not None

        latest = (UNKNOWN, self.unknown_pools)
        if not fits(DEFAULT_POOL) and (self.latest_pool != latest or fits(latest)):
            return DEFAULT_POOL
        if not self.unknown_pools or fits(latest):
            self.unknown_pools += 1
            latest = (UNKNOWN, self.unknown_pools)
        return latest

    def _attempt(self, index: int) -> None:
        """Search for a request whose first attempt failed, now: torch does not search again after its retry."""
        event = self.record.events[index]
        size = self.settings.round_size(event.size_bytes)
        pool = self.heap.pool(size, self.start.pool_ids[index] or DEFAULT_POOL)
        if self.heap.find(pool, event.stream, size) is None:
            self.refused.add(index)

    def request_free(self, event: Event, index: int) -> None:
        block = self.held.get(event.address)
        if block is None or not block.allocated:
            self.outcome.contradictions += 1
            return
        self.heap.request_free(block)
        block.waiting = 1
        if index in self.start.silent:
            self.complete_free(event)

    def complete_free(self, event: Event) -> None:
        block = self.held.pop(event.address, None)
        if block is None:
            self.outcome.contradictions += 1
            return
        if block.allocated:
            self.heap.request_free(block)
        block.waiting = 0
        self.heap.complete_free(block)


class _Guided(_Run):
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
        predicted = None if index in self.refused else heap.find(pool, event.stream, size)
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


class _Free(_Run):
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
        block = None if index in self.refused else heap.find(pool, event.stream, size)
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


def _attempts(events: tuple[Event, ...]) -> dict[int, int]:
    """By the event with which a retry begins: the request (alloc or oom) that it was for.

    A retry is one run of events: frees that were waiting for other streams, memory given back, new memory, the
    request. An empty_cache right before a request looks the same; the search then finds the same in both places,
    unless frees that it waited for joined to a block that fits.
    """
    found = {}
    first: int | None = None  # of the run
    released = grew = False
    for index, event in enumerate(events):
        action = event.action
        before = events[index - 1] if index else event
        if action in ("segment_free", "segment_unmap"):
            released, grew = released or not event.emptied, False
        elif action in ("segment_alloc", "segment_map"):
            grew = released
        elif action == "free_completed":
            if (before.action, before.address) == ("free_requested", event.address):
                # an ordinary free, or one that waited and is the first to be completed
                first, released, grew = None, False, False
        else:
            # an oom also ends a retry that had nothing to give back
            if first is not None and (action == "oom" or (grew and action == "alloc")):
                found[first] = index
            first, released, grew = None, False, False
            continue
        if first is None:
            first = index
    return found


def _mark_pools(heap: Heap, record: DeviceRecord, start: Start) -> None:
    """How each pool grows and splits, by what the recording shows rather than by the settings at its end."""
    for segment in record.segments:
        for block in segment.blocks:
            rest = block.size_bytes - heap.settings.round_size(block.requested_bytes)
            if (
                segment.pool_id != DEFAULT_POOL
                and block.state == "allocated"
                and rest > (0 if segment.small or segment.expandable else SMALL_BYTES)
                and block.size_bytes < heap.settings.max_split_bytes
            ):
                for small in (True, False):
                    heap.pool_of(segment.pool_id, small).split = False
    for found in start.ranges:
        heap.pool_of(found.pool_id, found.small).expandable = True
    paged = {found.pool_id for found in start.ranges}
    for index, event in enumerate(record.events):
        if event.action == "segment_alloc":
            pool_id = start.pool_ids[index] or DEFAULT_POOL
            small = event.size_bytes == heap.settings.page_size(small=True)
            if pool_id not in paged:
                heap.pool_of(pool_id, small).expandable = False
