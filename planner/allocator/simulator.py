"""torch's CUDA caching allocator on one device: what a sequence of requests makes it reserve.

`CachingAllocator` decides when memory is asked of the driver and when it goes back: growth, limit, garbage
collection, release and retry, streams and their events, private pools. Where blocks lie is `planner.allocator.heap`'s part.
Source: c10/cuda/CUDACachingAllocator.cpp (malloc, alloc_block, release_cached_blocks, garbage_collect_cached_blocks,
process_events, beginAllocateToPool), which has not changed in effect from torch 2.3 to 2.13.
"""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass

from planner.allocator.expandable import grow, unmap_pages, whole_pages
from planner.allocator.heap import DEFAULT_POOL, OUTSIDE, Block, Heap, Pool, PoolId
from planner.allocator.settings import MIN_BLOCK_BYTES, UNLIMITED, Settings
from planner.allocator.stats import Statistics
from planner.errors import OutOfMemory
from planner.units import GIB, MIB, format_mib

FIRST_ADDRESS = 0x7F0000000000
RANGE_BYTES = (
    1024 * GIB
)  # virtual addresses of an expandable segment where the device's size is not given


@dataclass(slots=True)
class PrivatePool:
    """A pool of a graph capture or of torch.cuda.MemPool. Its segments may go once nobody uses it."""

    users: int = 0
    segments: int = 0


@dataclass(slots=True)
class Event:
    """What must pass on a stream before a block used there is free."""

    block: Block
    passed: bool = False


class CachingAllocator:
    """The allocator of one device, with no memory reserved.

    `total_bytes` is the card's memory, of which `settings.memory_fraction` limits what may be reserved; `free_bytes`
    is what the driver can give (None: always enough). Addresses are made up, ascending.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        total_bytes: int | None = None,
        free_bytes: int | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.heap = Heap(self.settings)
        self.free_bytes = free_bytes
        self.limit_bytes: int | None = None
        self._total_bytes = total_bytes
        if total_bytes is not None:
            self.set_memory_fraction(self.settings.memory_fraction)
        self._range_bytes = RANGE_BYTES if total_bytes is None else total_bytes + total_bytes // 8
        self._next_address = FIRST_ADDRESS
        self._events: dict[int, deque[Event]] = {}
        self._deferred: list[Block] = []  # freed during a capture, used on other streams
        self._private: dict[PoolId, PrivatePool] = {}
        self._lenders: list[PoolId] = []
        self._active: list[tuple[PoolId, frozenset[int] | None, bool]] = []

    @property
    def reserved_bytes(self) -> int:
        """Bytes held from the driver."""
        return self.heap.reserved_bytes

    @property
    def stats(self) -> Statistics:
        return self.heap.stats

    # --- requests -------------------------------------------------------------------------------------------------

    def malloc(self, size_bytes: int, stream: int = 0) -> Block:
        """A block of at least `size_bytes`, for `stream`. OutOfMemory where neither cache, driver nor limit allow it."""
        if size_bytes == 0 or self.settings.uncached:
            return self._outside(size_bytes, stream)
        if not self._active:
            self._process_events()
        size = self.settings.round_size(size_bytes)
        pool = self.heap.pool(size, self._pool_id(stream))
        block = self._find(pool, stream, size) or self._obtain(pool, stream, size)
        if block is None:
            self.stats.num_ooms += 1
            free = max((self.free_bytes or 0) - self.reserved_bytes, 0)
            self.heap.note("oom", free, size, stream, pool)
            raise OutOfMemory(self._refusal(size))
        return self.heap.take(block, size, size_bytes)

    def release(self, block: Block) -> None:
        """Give a block back; where other streams used it, it is free once they have passed this point."""
        if block.pool.id == OUTSIDE:
            if block.size_bytes:
                self.heap.count_reserved(block.pool, -block.size_bytes)
            return
        self.heap.request_free(block)
        if not block.uses:
            self.heap.complete_free(block)
        elif self._active:
            self._deferred.append(block)
        else:
            self._insert_events(block)

    def record_stream(self, block: Block, stream: int) -> None:
        """Note that work on another stream uses the block."""
        if stream != block.stream:
            block.uses[stream] = bool(self._active) or block.uses.get(stream, False)

    def pass_events(self, stream: int | None = None) -> None:
        """Work on a stream (None: on all) has reached this point; the next malloc sees it."""
        for found, events in self._events.items():
            if stream is None or found == stream:
                for event in events:
                    event.passed = True

    def empty_cache(self, pool_id: PoolId = DEFAULT_POOL) -> None:
        """Give segments without a live block back to the driver, after all events have passed.

        Of the default pools and of private ones that nobody uses any more; or of one such private pool alone.
        """
        self._release_cached(None if pool_id == DEFAULT_POOL else pool_id)

    # --- settings while it runs -----------------------------------------------------------------------------------

    def set_memory_fraction(self, fraction: float) -> None:
        """Limit reserved bytes to a share of the card's memory; a whole share is no limit (before torch 2.9 it was)."""
        if self._total_bytes is None:
            raise ValueError("a share of a card whose memory is not known")
        self.limit_bytes = int(fraction * self._total_bytes) if fraction < 1 else None

    def set_settings(self, settings: Settings) -> None:
        """Go on with other settings, as torch.cuda.memory._set_allocator_settings does; blocks stay as they are."""
        self.settings = self.heap.settings = settings
        for pool in self.heap.pools.values():
            pool.expandable = settings.expandable_segments

    # --- pools ----------------------------------------------------------------------------------------------------

    def begin_pool(
        self, pool_id: PoolId, streams: frozenset[int] | None = None, *, capture: bool = True
    ) -> None:
        """Send requests of these streams (None: all) to a pool of their own, until `end_pool`.

        A graph capture (not a MemPool of a newer torch) also forbids to release cached memory meanwhile.
        """
        self._private.setdefault(pool_id, PrivatePool()).users += 1
        self._active.append((pool_id, streams, capture))

    def create_pool(self, pool_id: PoolId, *, split: bool = True, use_on_oom: bool = False) -> None:
        """A torch.cuda.MemPool: one user until `release_pool`.

        Without `split` it hands out whole segments; `use_on_oom` lends its free blocks where the driver refuses.
        """
        self._private.setdefault(pool_id, PrivatePool()).users += 1
        for small in (True, False):
            self.heap.pool_of(pool_id, small).split = split
        if use_on_oom:
            self._lenders.append(pool_id)

    def end_pool(self, pool_id: PoolId) -> None:
        """Requests go where they went before `begin_pool`; the pool stays."""
        self._active = [entry for entry in self._active if entry[0] != pool_id]

    def release_pool(self, pool_id: PoolId) -> None:
        """One user fewer: with the last one gone, the pool's segments may be released like any others."""
        self._private[pool_id].users -= 1

    def _pool_id(self, stream: int) -> PoolId:
        for pool_id, streams, _ in reversed(self._active):
            if streams is None or stream in streams:
                return pool_id
        return DEFAULT_POOL

    # --- growth ---------------------------------------------------------------------------------------------------

    def _find(self, pool: Pool, stream: int, size: int) -> Block | None:
        if self._collects:
            pool.searches += 1
        return self.heap.find(pool, stream, size)

    def _obtain(self, pool: Pool, stream: int, size: int) -> Block | None:
        """A new free block, if need be after giving cached segments back."""
        if self._collects:
            self._collect_garbage()
        block = self._grow(pool, stream, size)
        if block is None and pool.id == DEFAULT_POOL:
            for pool_id in self._lenders:
                block = block or self._find(self.heap.pool(size, pool_id), stream, size)
        if block is None and self._release_oversize(pool, stream, size):
            block = self._grow(pool, stream, size)
        if block is None and not any(capture for _, _, capture in self._active):
            self._release_cached()
            self.stats.num_alloc_retries += 1
            block = self._grow(pool, stream, size)
        return block

    def _grow(self, pool: Pool, stream: int, size: int) -> Block | None:
        segment = self.settings.segment_size(size)
        if self.limit_bytes is not None and self.reserved_bytes + segment > self.limit_bytes:
            return None
        if pool.expandable:
            if size > self._range_bytes:
                return None  # more than any range of addresses
            block = grow(
                self.heap,
                pool,
                stream,
                size,
                new_range=lambda: (self._made_up(self._range_bytes), self._range_bytes),
                driver_gives=self._driver_gives,
            ).block
            if block is not None:
                self._count_segment(pool, 1)
            return block
        if not self._driver_gives(segment):
            return None
        self._count_segment(pool, 1)
        return self.heap.add_segment(pool, stream, self._made_up(segment), segment)

    def _driver_gives(self, size_bytes: int) -> bool:
        return self.free_bytes is None or self.reserved_bytes + size_bytes <= self.free_bytes

    def _made_up(self, size_bytes: int) -> int:
        address = self._next_address
        self._next_address += -(-size_bytes // (2 * MIB)) * 2 * MIB
        return address

    def _count_segment(self, pool: Pool, change: int) -> None:
        if pool.id != DEFAULT_POOL:
            self._private[pool.id].segments += change

    # --- release --------------------------------------------------------------------------------------------------

    @property
    def _collects(self) -> bool:
        return self.limit_bytes is not None and self.settings.garbage_collection_threshold > 0

    def _collect_garbage(self) -> None:
        """Give whole large segments back that were not wanted for longest, until the threshold is kept."""
        assert self.limit_bytes is not None
        threshold = int(self.settings.garbage_collection_threshold * self.limit_bytes)
        excess = self.reserved_bytes - threshold
        if excess <= 0:
            return
        pool = self.heap.pool_of(DEFAULT_POOL, small=False)
        unsplit = [block for block in self.heap.free_blocks(pool) if not block.is_split]
        while excess > 0 and unsplit:
            mean = sum(pool.searches - block.age_base for block in unsplit) / len(unsplit)
            old = [
                b for b in unsplit if b.reservation is None and pool.searches - b.age_base >= mean
            ]
            if not old:
                return
            for block in old:
                excess -= block.size_bytes
                self._release_segment(block)
            unsplit = [block for block in unsplit if block not in old]

    def _release_oversize(self, pool: Pool, stream: int, size: int) -> bool:
        """Whether oversize segments of this stream were given back, enough for the request."""
        limit = self.settings.max_split_bytes
        keys = pool.free.get(stream)
        if limit == UNLIMITED or not keys:
            return False
        wanted = max(size, limit)
        index = bisect.bisect_left(keys, (wanted, 0))
        if index < len(keys):
            block = self.heap.blocks[keys[index][1]]
            if block.reservation is None and not block.is_split:
                self._release_segment(block)
                return True
        released = 0
        for found, address in reversed(keys[:index]):
            if released >= wanted or found < limit:
                break
            block = self.heap.blocks[address]
            if block.reservation is None and not block.is_split:
                released += found
                self._release_segment(block)
        return released >= wanted

    def _release_cached(self, only: PoolId | None = None) -> None:
        """Every segment without a live block, of the default pools and of private ones that nobody uses."""
        if only is None and not self._active:
            self._synchronize(None)
            for small in (False, True):
                self._release_pool(self.heap.pool_of(DEFAULT_POOL, small))
        unused = [pool_id for pool_id, private in self._private.items() if not private.users]
        for pool_id in unused:
            if only is not None:
                if pool_id != only:
                    continue
                self._synchronize(pool_id)
            for small in (True, False):
                self._release_pool(self.heap.pool_of(pool_id, small))
            if self._private[pool_id].segments == 0:
                del self._private[pool_id]

    def _release_pool(self, pool: Pool) -> None:
        blocks = list(self.heap.free_blocks(pool))
        for block in blocks:
            if block.reservation is None and not block.is_split:
                self._release_segment(block)
        for block in blocks:
            if block.reservation is not None:
                pages = whole_pages(block)
                if pages.size_bytes:
                    unmap_pages(self.heap, block, pages)
                    self._count_segment(pool, -1)

    def _release_segment(self, block: Block) -> None:
        self.heap.remove_segment(block)
        self._count_segment(block.pool, -1)

    # --- events ---------------------------------------------------------------------------------------------------

    def _insert_events(self, block: Block) -> None:
        for stream in block.uses:
            self._events.setdefault(stream, deque()).append(Event(block))
        block.waiting += len(block.uses)
        block.uses = {}
        if not block.waiting:
            self.heap.complete_free(block)

    def _insert_deferred(self) -> None:
        """Blocks freed during a capture: only streams noted before it still count."""
        for block in self._deferred:
            block.uses = {stream: False for stream, captured in block.uses.items() if not captured}
            self._insert_events(block)
        self._deferred = []

    def _process_events(self) -> None:
        """Free the blocks whose events have passed; each stream's events in order."""
        self._insert_deferred()
        for stream, events in list(self._events.items()):
            while events and events[0].passed:
                self._finish(events.popleft().block)
            if not events:
                del self._events[stream]

    def _synchronize(self, pool_id: PoolId | None) -> None:
        """Wait for all events, or for those of one pool's blocks."""
        self.stats.num_sync_all_streams += 1
        self._insert_deferred()
        for stream, events in list(self._events.items()):
            kept: deque[Event] = deque()
            for event in events:
                if pool_id is None or event.block.pool.id == pool_id:
                    self._finish(event.block)
                else:
                    kept.append(event)
            self._events[stream] = kept

    def _finish(self, block: Block) -> None:
        block.waiting -= 1
        if not block.waiting:
            self.heap.complete_free(block)

    # --- beside the cache -----------------------------------------------------------------------------------------

    def _outside(self, size_bytes: int, stream: int) -> Block:
        """What no pool holds: a request of nothing, or with caching switched off a segment of its own.

        torch counts neither; here the bytes without a cache count as reserved, because the device holds them.
        """
        size = -(-size_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
        if size and not self._driver_gives(size):
            self.stats.num_ooms += 1
            raise OutOfMemory(self._refusal(size))
        block = Block(Pool(OUTSIDE, True, False), stream, self._made_up(size), size)
        block.requested_bytes = size_bytes
        if size:
            self.heap.count_reserved(block.pool, size)
        return block

    def _refusal(self, size: int) -> str:
        bounds = [
            f"{name} {format_mib(bound)}"
            for name, bound in (("limit", self.limit_bytes), ("the driver has", self.free_bytes))
            if bound is not None
        ]
        return (
            f"the allocator would run out of memory: wanted a block of {format_mib(size)}, "
            f"reserved {format_mib(self.reserved_bytes)}, {', '.join(bounds)}"
        )
