"""A trace going through a heap: what the run that follows the recording and the one that does not have in common."""

from __future__ import annotations

from planner.allocator.heap import DEFAULT_POOL, Block, Heap, Pool, PoolId
from planner.allocator.settings import SMALL_BYTES, Settings
from planner.replay.outcome import Outcome
from planner.replay.rollback import UNKNOWN, Start
from planner.replay.snapshot import DeviceRecord, Event

MADE_UP_ADDRESS = 1 << 65  # above what any driver gives


class TraceRun:
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

        Older versions do not record it. Where the segment is gone at the end, or its pool was never told, new memory
        although the default pool has a block that fits belongs to a private pool: the latest one that has no such
        block, or a new one.
        """
        known = self.start.pool_ids[index]
        if known is not None:
            return known
        event = self.record.events[index]
        block = self.heap.blocks.get(event.address)
        if event.action != "alloc" or not self.grown:
            pool_id = block.pool.id if block is not None else DEFAULT_POOL
        else:
            pool_id = self._unknown_pool(event, index)
        self.start.pool_ids[index] = pool_id
        return pool_id

    def _unknown_pool(self, event: Event, index: int) -> PoolId:
        if index in self.refused:
            return DEFAULT_POOL  # a retry asks for memory whatever is free by then
        size = self.settings.round_size(event.size_bytes)

        def fits(pool_id: PoolId) -> bool:
            return self.heap.find(self.heap.pool(size, pool_id), event.stream, size) is not None

        if self.latest_pool != DEFAULT_POOL and not fits(self.latest_pool):
            return self.latest_pool
        if not fits(DEFAULT_POOL):
            return DEFAULT_POOL
        for number in range(self.unknown_pools, 0, -1):
            if not fits((UNKNOWN, number)):
                return UNKNOWN, number
        self.unknown_pools += 1
        return UNKNOWN, self.unknown_pools

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
            self.outcome.frees_unrequested += 1
            self.heap.request_free(block)
        block.waiting = 0
        self.heap.complete_free(block)

    def grown_before(self, event: Event, index: int, pool: Pool, size: int) -> Block | None:
        """The block that was got for the first event's request, where the ring was cut between the two.

        torch takes it without a search, which might not find it (a block of max_split_size or more) or might find
        another one (freed by a retry).
        """
        block = None if index else self.heap.blocks.get(event.address)
        if block is None or not block.is_free or not block.mapped or block.stream != event.stream:
            return None
        if block.pool is not pool or block.size_bytes < size:
            return None
        if block.reservation is not None:
            return block if block.size_bytes - size < block.reservation.page_bytes else None
        whole = not block.is_split and block.size_bytes == self.settings.segment_size(size)
        return block if whole else None


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
