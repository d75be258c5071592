"""Expandable segments: one range of virtual addresses by stream and pool, whose pages are mapped as they are needed.

A range is a chain of blocks like any segment; blocks that no pages back are `mapped=False` and begin and end at pages.
Source: c10/cuda/CUDACachingAllocator.cpp, find_expandable_block, map_block, try_allocate_expandable_block, unmap_block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from planner.allocator.heap import Block, Heap, Pool, Reservation


class Pages(NamedTuple):
    """Mapped or unmapped addresses."""

    address: int
    size_bytes: int


class Growth(NamedTuple):
    """The block that growing gave, None where the driver refused, and what was mapped for it."""

    block: Block | None
    mapped: tuple[Pages, ...]


def reserve(heap: Heap, pool: Pool, stream: int, address: int, size_bytes: int) -> Block:
    """One unmapped block: a new range of virtual addresses."""
    page = heap.settings.page_size(pool.small)
    block = Block(pool, stream, address, -(-size_bytes // page) * page)
    block.mapped = False
    block.reservation = Reservation(address, block.size_bytes, page)
    heap.blocks[address] = block
    pool.insert_unmapped(block)
    return block


def find_room(heap: Heap, pool: Pool, stream: int, size_bytes: int) -> Block | None:
    """The lowest unmapped range with room for a request, or the free block right in front of it."""
    for address in pool.unmapped.get(stream, ()):
        block = heap.blocks[address]
        if block.previous is not None and block.previous.is_free:
            block = block.previous
        room, part = 0, block
        while room < size_bytes and part.is_free:
            room += part.size_bytes
            if part.next is None:
                break
            part = part.next
        if room >= size_bytes:
            return block
    return None


def grow(
    heap: Heap,
    pool: Pool,
    stream: int,
    size_bytes: int,
    *,
    new_range: Callable[[], tuple[int, int]],
    driver_gives: Callable[[int], bool] = lambda size_bytes: True,
) -> Growth:
    """A free block of at least `size_bytes`, with what is missing of it mapped.

    `new_range` is (address, size) of a range for a pool without room. A refusal leaves what was mapped before it.
    """
    block = find_room(heap, pool, stream, size_bytes)
    if block is None:
        block = reserve(heap, pool, stream, *new_range())
    mapped: list[Pages] = []
    missing = size_bytes
    if block.mapped:
        missing -= block.size_bytes
    while missing > 0:
        part = block.next if block.mapped else block
        assert part is not None  # find_room saw it
        pages = map_pages(heap, part, min(missing, part.size_bytes), driver_gives)
        if pages is None:
            return Growth(None, tuple(mapped))
        mapped.append(pages)
        block = part
        missing = size_bytes - block.size_bytes
    return Growth(block, tuple(mapped))


def map_pages(
    heap: Heap,
    block: Block,
    size_bytes: int,
    driver_gives: Callable[[int], bool] = lambda size_bytes: True,
) -> Pages | None:
    """Back the front of an unmapped block by pages; it joins its free neighbours. None where the driver refuses."""
    assert block.reservation is not None
    page = block.reservation.page_bytes
    pages = Pages(block.address, min(-(-size_bytes // page) * page, block.size_bytes))
    if not driver_gives(pages.size_bytes):
        return None
    pool = block.pool
    pool.remove_unmapped(block)
    if pages.size_bytes < block.size_bytes:
        pool.insert_unmapped(heap.cut(block, pages.size_bytes))
    block.mapped = True
    heap.join(block, block.previous)
    heap.join(block, block.next)
    pool.insert(block)
    heap.count_reserved(pool, pages.size_bytes)
    heap.note("segment_map", *pages, block.stream, pool)
    return pages


def whole_pages(block: Block) -> Pages:
    """The pages that lie wholly inside a free block."""
    assert block.reservation is not None
    base, page = block.reservation.address, block.reservation.page_bytes
    start = base + -(-(block.address - base) // page) * page
    end = base + (block.address + block.size_bytes - base) // page * page
    return Pages(start, max(end - start, 0))


def unmap_pages(heap: Heap, block: Block, pages: Pages) -> None:
    """Give pages inside a free block back to the driver; what is left of the block on either side stays free."""
    pool = block.pool
    pool.remove(block)
    if pages.address > block.address:
        front, block = block, heap.cut(block, pages.address - block.address)
        pool.insert(front)
    if pages.size_bytes < block.size_bytes:
        pool.insert(heap.cut(block, pages.size_bytes))
    block.mapped = False
    heap.join(block, block.previous)
    heap.join(block, block.next)
    pool.insert_unmapped(block)
    heap.count_reserved(pool, -pages.size_bytes)
    heap.note("segment_unmap", *pages, block.stream, pool)
    if not block.is_split:
        # nothing is mapped any more: the addresses go back too
        pool.remove_unmapped(block)
        del heap.blocks[block.address]
