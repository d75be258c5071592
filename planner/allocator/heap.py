"""Segments, blocks and pools of the caching allocator: where a request goes, how blocks split and join.

What is decided here depends on nothing but the blocks there are: best fit, splitting, merging. When memory is asked
of the driver or given back is decided by `planner.allocator`, or told by a recording (`planner.replay`).
Source: c10/cuda/CUDACachingAllocator.cpp, get_free_block, should_split, alloc_found_block, free_block.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from planner.allocator.settings import (
    MIN_BLOCK_BYTES,
    SMALL_BYTES,
    UNLIMITED,
    Settings,
)
from planner.allocator.stats import Stat, Statistics

PoolId = tuple[int, int]
DEFAULT_POOL: PoolId = (0, 0)
OUTSIDE: PoolId = (-1, -1)  # of blocks that no pool holds


class Piece(NamedTuple):
    """A block of a segment that is known beforehand. State: allocated, waiting, free or unmapped."""

    address: int
    size_bytes: int
    requested_bytes: int
    state: str


class Reservation:
    """The virtual addresses of one expandable segment, of which pages are mapped as needed."""

    __slots__ = ("address", "page_bytes", "size_bytes")

    def __init__(self, address: int, size_bytes: int, page_bytes: int) -> None:
        self.address = address
        self.size_bytes = size_bytes
        self.page_bytes = page_bytes


class Block:
    """A piece of a segment, linked to its neighbours in it. Three states: allocated, free, or waiting to become free."""

    __slots__ = (
        "address",
        "age_base",
        "allocated",
        "mapped",
        "next",
        "pool",
        "previous",
        "requested_bytes",
        "reservation",
        "size_bytes",
        "stream",
        "uses",
        "waiting",
    )

    def __init__(self, pool: Pool, stream: int, address: int, size_bytes: int) -> None:
        self.pool = pool
        self.stream = stream
        self.address = address
        self.size_bytes = size_bytes
        self.requested_bytes = 0
        self.allocated = False
        self.waiting = 0  # events that must pass before it is free
        self.uses: dict[int, bool] = {}  # other streams it was used on; whether during a capture
        self.mapped = True
        self.reservation: Reservation | None = None
        self.previous: Block | None = None
        self.next: Block | None = None
        self.age_base = 0

    @property
    def is_split(self) -> bool:
        """Whether it has a neighbour in its segment."""
        return self.previous is not None or self.next is not None

    @property
    def is_free(self) -> bool:
        return not (self.allocated or self.waiting or self.uses)


class Pool:
    """Free blocks of one size class of one pool, by stream in order of (size, address)."""

    __slots__ = ("expandable", "free", "id", "searches", "small", "split", "unmapped")

    def __init__(self, pool_id: PoolId, small: bool, expandable: bool) -> None:
        self.id = pool_id
        self.small = small
        self.expandable = expandable
        self.split = True  # a MemPool may be told to hand out whole segments
        self.free: dict[int, list[tuple[int, int]]] = {}
        self.unmapped: dict[int, list[int]] = {}  # addresses of unmapped ranges
        self.searches = 0  # the clock of garbage collection

    def insert(self, block: Block) -> None:
        block.age_base = self.searches
        bisect.insort(self.free.setdefault(block.stream, []), (block.size_bytes, block.address))

    def remove(self, block: Block) -> None:
        keys = self.free[block.stream]
        del keys[bisect.bisect_left(keys, (block.size_bytes, block.address))]

    def insert_unmapped(self, block: Block) -> None:
        bisect.insort(self.unmapped.setdefault(block.stream, []), block.address)

    def remove_unmapped(self, block: Block) -> None:
        addresses = self.unmapped[block.stream]
        del addresses[bisect.bisect_left(addresses, block.address)]


class TraceEntry(NamedTuple):
    """What happened, in the words of torch's memory snapshots."""

    action: str
    address: int
    size_bytes: int
    stream: int
    pool_id: PoolId


class Heap:
    """All blocks of one device, by address. `trace`, where it is a list, takes what happens as torch records it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.trace: list[TraceEntry] | None = None
        self.stats = Statistics()
        self.blocks: dict[int, Block] = {}
        self.pools: dict[tuple[PoolId, bool], Pool] = {}

    @property
    def reserved_bytes(self) -> int:
        return self.stats.reserved_bytes.all.current

    def pool(self, size_bytes: int, pool_id: PoolId = DEFAULT_POOL) -> Pool:
        """The pool for blocks of this rounded size."""
        return self.pool_of(pool_id, size_bytes <= SMALL_BYTES)

    def pool_of(self, pool_id: PoolId, small: bool) -> Pool:
        found = self.pools.get((pool_id, small))
        if found is None:
            found = Pool(pool_id, small, self.settings.expandable_segments)
            self.pools[pool_id, small] = found
        return found

    def free_blocks(self, pool: Pool) -> Iterator[Block]:
        """Free blocks in the pool's order; a copy, so that they may be taken out meanwhile."""
        for stream in sorted(pool.free):
            for _, address in list(pool.free[stream]):
                yield self.blocks[address]

    def note(self, action: str, address: int, size_bytes: int, stream: int, pool: Pool) -> None:
        """Record an event, if somebody wants them."""
        if self.trace is not None:
            self.trace.append(TraceEntry(action, address, size_bytes, stream, pool.id))

    # --- search ---------------------------------------------------------------------------------------------------

    def find(self, pool: Pool, stream: int, size_bytes: int) -> Block | None:
        """The free block that a request of rounded size takes: the smallest that holds it, at the lowest address."""
        keys = pool.free.get(stream)
        if not keys:
            return None
        index = bisect.bisect_left(keys, (size_bytes, 0))
        if index == len(keys):
            return None
        block = self.blocks[keys[index][1]]
        if block.reservation is not None:
            if pool.expandable:
                block = self._least_room(keys, index)
            else:
                # expandable segments were switched off meanwhile; the first block is passed over in any case
                while block.reservation is not None:
                    index += 1
                    if index == len(keys):
                        return None
                    block = self.blocks[keys[index][1]]
        limit = self.settings.max_split_bytes
        if limit != UNLIMITED:
            if size_bytes < limit <= block.size_bytes:
                return None
            rounding = self.settings.max_non_split_rounding_bytes
            if size_bytes >= limit and block.size_bytes >= size_bytes + rounding:
                return None
        return block

    def _least_room(self, keys: list[tuple[int, int]], index: int) -> Block:
        """Best fit where a block counts with the unmapped range behind it: walk on while the next has less room."""
        block = self.blocks[keys[index][1]]
        for _, address in keys[index + 1 :]:
            following = self.blocks[address]
            if block.reservation is None or _room(following) >= _room(block):
                break
            block = following
        return block

    def splits(self, block: Block, size_bytes: int) -> bool:
        """Whether the rest of a block becomes a free block of its own."""
        rest = block.size_bytes - size_bytes
        if not block.pool.split:
            return False
        if block.pool.small or block.pool.expandable:
            return rest >= MIN_BLOCK_BYTES
        return size_bytes < self.settings.max_split_bytes and rest > SMALL_BYTES

    # --- blocks ---------------------------------------------------------------------------------------------------

    def take(self, block: Block, size_bytes: int, requested_bytes: int) -> Block:
        """Hand out a free block, or its front part."""
        return self.take_front(block, size_bytes, requested_bytes, self.splits(block, size_bytes))

    def take_front(self, block: Block, size_bytes: int, requested_bytes: int, split: bool) -> Block:
        """Hand out a free block, split or not."""
        pool, stats, small = block.pool, self.stats, block.pool.small
        pool.remove(block)
        was_split = block.is_split
        counted = block.reservation is None
        if split:
            rest = self.cut(block, size_bytes)
            pool.insert(rest)
            if counted and was_split:
                stats.inactive_split_bytes.take(size_bytes, small)
            elif counted:
                stats.inactive_split_bytes.add(rest.size_bytes, small)
                stats.inactive_split.add(1, small)
        elif was_split and counted:
            stats.inactive_split_bytes.take(block.size_bytes, small)
            stats.inactive_split.take(1, small)
        block.allocated = True
        block.requested_bytes = requested_bytes
        self.note("alloc", block.address, requested_bytes, block.stream, pool)
        stats.allocation.add(1, small)
        stats.allocated_bytes.add(block.size_bytes, small)
        stats.active.add(1, small)
        stats.active_bytes.add(block.size_bytes, small)
        stats.requested_bytes.add(requested_bytes, small)
        if block.size_bytes >= self.settings.max_split_bytes:
            stats.oversize_allocations.add(1)
        return block

    def request_free(self, block: Block) -> None:
        """The program gave the block up: it no longer counts as allocated, but is not free yet."""
        block.allocated = False
        self.note("free_requested", block.address, block.requested_bytes, block.stream, block.pool)
        self.stats.allocation.take(1, block.pool.small)
        self.stats.allocated_bytes.take(block.size_bytes, block.pool.small)
        if block.size_bytes >= self.settings.max_split_bytes:
            self.stats.oversize_allocations.take(1)

    def complete_free(self, block: Block) -> Block:
        """The block, joined with its free neighbours, back in its pool."""
        stats, pool, small = self.stats, block.pool, block.pool.small
        size, requested = block.size_bytes, block.requested_bytes
        self.note("free_completed", block.address, requested, block.stream, pool)
        count = change = 0
        for neighbour in (block.previous, block.next):
            joined = self.join(block, neighbour)
            if joined:
                count -= 1
                change -= joined
        pool.insert(block)
        if block.is_split:
            count += 1
            change += block.size_bytes
        if block.reservation is None:
            stats.inactive_split.move(count, small)
            stats.inactive_split_bytes.move(change, small)
        stats.active.take(1, small)
        stats.active_bytes.take(size, small)
        stats.requested_bytes.take(requested, small)
        return block

    def join(self, block: Block, neighbour: Block | None) -> int:
        """Bytes that `block` gained from a free neighbour, which is gone then; 0 where they do not join."""
        if neighbour is None or not neighbour.is_free or neighbour.mapped != block.mapped:
            return 0
        if neighbour.mapped:
            block.pool.remove(neighbour)
        else:
            block.pool.remove_unmapped(neighbour)
        del self.blocks[neighbour.address]
        if neighbour is block.previous:
            del self.blocks[block.address]
            block.address = neighbour.address
            self.blocks[block.address] = block
            block.previous = neighbour.previous
            if block.previous is not None:
                block.previous.next = block
        else:
            block.next = neighbour.next
            if block.next is not None:
                block.next.previous = block
        block.size_bytes += neighbour.size_bytes
        return neighbour.size_bytes

    def cut(self, block: Block, size_bytes: int) -> Block:
        """The rest of a block that is shortened to `size_bytes`, linked behind it."""
        rest = Block(
            block.pool, block.stream, block.address + size_bytes, block.size_bytes - size_bytes
        )
        rest.reservation, rest.mapped = block.reservation, block.mapped
        rest.previous, rest.next = block, block.next
        if block.next is not None:
            block.next.previous = rest
        block.next, block.size_bytes = rest, size_bytes
        self.blocks[rest.address] = rest
        return rest

    # --- segments -------------------------------------------------------------------------------------------------

    def add_segment(self, pool: Pool, stream: int, address: int, size_bytes: int) -> Block:
        """One free block that is a whole new segment."""
        block = Block(pool, stream, address, size_bytes)
        self.blocks[address] = block
        pool.insert(block)
        self.note("segment_alloc", address, size_bytes, stream, pool)
        self.stats.segment.add(1, pool.small)
        if size_bytes >= self.settings.max_split_bytes:
            self.stats.oversize_segments.add(1)
        self.count_reserved(pool, size_bytes)
        return block

    def load_segment(
        self,
        pool: Pool,
        stream: int,
        pieces: Sequence[Piece],
        reservation: Reservation | None = None,
    ) -> None:
        """Put a segment there whose blocks are known, one behind another."""
        previous: Block | None = None
        small, stats = pool.small, self.stats
        mapped = 0
        for piece in pieces:
            block = Block(pool, stream, piece.address, piece.size_bytes)
            block.reservation, block.mapped = reservation, piece.state != "unmapped"
            block.previous = previous
            if previous is not None:
                previous.next = block
            previous = self.blocks[block.address] = block
            if not block.mapped:
                pool.insert_unmapped(block)
                continue
            mapped += block.size_bytes
            if piece.state == "free":
                pool.insert(block)
                if reservation is None and len(pieces) > 1:
                    stats.inactive_split.add(1, small)
                    stats.inactive_split_bytes.add(block.size_bytes, small)
                continue
            block.requested_bytes = piece.requested_bytes
            stats.active.add(1, small)
            stats.active_bytes.add(block.size_bytes, small)
            stats.requested_bytes.add(block.requested_bytes, small)
            if piece.state == "waiting":
                block.waiting = 1
                continue
            block.allocated = True
            stats.allocation.add(1, small)
            stats.allocated_bytes.add(block.size_bytes, small)
        if mapped:
            self.count_reserved(pool, mapped)
        if reservation is None:
            stats.segment.add(1, small)

    def remove_segment(self, block: Block) -> None:
        """Give a segment that is one free block back to the driver."""
        self.note("segment_free", block.address, block.size_bytes, block.stream, block.pool)
        block.pool.remove(block)
        del self.blocks[block.address]
        self.stats.segment.take(1, block.pool.small)
        if block.size_bytes >= self.settings.max_split_bytes:
            self.stats.oversize_segments.take(1)
        self.count_reserved(block.pool, -block.size_bytes)

    def count_reserved(self, pool: Pool, change: int) -> None:
        """Note bytes that came from the driver, or went back."""
        self.stats.reserved_bytes.move(change, pool.small)
        if pool.id not in (DEFAULT_POOL, OUTSIDE):
            by_pool = self.stats.reserved_bytes_by_private_pool
            by_pool.setdefault(pool.id, Stat()).move(change)
        if change > 0:
            self.stats.num_device_alloc += 1
        else:
            self.stats.num_device_free += 1


def _room(block: Block) -> int:
    behind = block.next
    return block.size_bytes + (behind.size_bytes if behind is not None and not behind.mapped else 0)
