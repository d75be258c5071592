"""torch's CUDA caching allocator, as far as a plan needs it: bytes reserved by a sequence of allocations and frees.

Rules of c10/cuda/CUDACachingAllocator.cpp with default settings: sizes rounded to 512 bytes; small pool up to 1 MiB
in segments of 2 MiB, 20 MiB segments below 10 MiB, above that the size rounded up to 2 MiB; best fit, lowest address
among equals; a rest is split off when it is at least 512 bytes (small pool) or more than 1 MiB (large pool); a freed
block joins its free neighbours; nothing returns to the driver.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.units import MIB

MIN_BLOCK_BYTES = 512  # kMinBlockSize
SMALL_BYTES = MIB  # kSmallSize
SMALL_SEGMENT_BYTES = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT_BYTES = 20 * MIB  # large_segment_size
MIN_LARGE_BYTES = 10 * MIB  # kMinLargeAlloc
ROUND_LARGE_BYTES = 2 * MIB  # kRoundLarge


@dataclass(slots=True)
class Block:
    """A piece of a segment, linked to its neighbours in it."""

    address: int
    size_bytes: int
    small: bool
    free: bool = False
    previous: Block | None = None
    next: Block | None = None


class CachingAllocator:
    """One stream's pools. `reserved_bytes` only grows."""

    def __init__(self) -> None:
        self.reserved_bytes = 0
        self._free: list[Block] = []
        self._next_address = 0

    def malloc(self, size_bytes: int) -> Block:
        """A block of at least `size_bytes`."""
        size = max(-(-size_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES, MIN_BLOCK_BYTES)
        small = size <= SMALL_BYTES
        fitting = [b for b in self._free if b.small == small and b.size_bytes >= size]
        if fitting:
            block = min(fitting, key=lambda b: (b.size_bytes, b.address))
            self._free.remove(block)
        else:
            segment = _segment_bytes(size)
            self.reserved_bytes += segment
            block = Block(self._next_address, segment, small)
            self._next_address += segment
        block.free = False
        rest = block.size_bytes - size
        if rest >= MIN_BLOCK_BYTES if small else rest > SMALL_BYTES:
            tail = Block(block.address + size, rest, small, True, block, block.next)
            if block.next is not None:
                block.next.previous = tail
            block.next, block.size_bytes = tail, size
            self._free.append(tail)
        return block

    def release(self, block: Block) -> None:
        """Give a block back to its pool."""
        block.free = True
        for left, right in ((block, block.next), (block.previous, block)):
            if left is None or right is None or not (left.free and right.free):
                continue
            for known in (left, right):
                if known in self._free:
                    self._free.remove(known)
            left.size_bytes += right.size_bytes
            left.next = right.next
            if right.next is not None:
                right.next.previous = left
            block = left
        self._free.append(block)


def _segment_bytes(size: int) -> int:
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < MIN_LARGE_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES
