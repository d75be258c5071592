"""What was allocated outside the arena, in order: a step's blocks as a plan lists them."""

from __future__ import annotations

from typing import NamedTuple


class Block(NamedTuple):
    """One allocation outside the arena: `[birth, death)` counted in allocations since the trace began."""

    size_bytes: int
    birth: int
    death: int


class Trace:
    """Allocations in order, and how many had been made when each went."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.deaths: dict[int, int] = {}
        self.events: list[tuple[bool, int]] = []  # (taken, number), in order

    def take(self, size_bytes: int) -> int:
        number = len(self.sizes)
        self.sizes.append(size_bytes)
        self.events.append((True, number))
        return number

    def give(self, number: int) -> None:
        self.deaths[number] = len(self.sizes)
        self.events.append((False, number))

    def sequences(self) -> list[tuple[Block, ...]]:
        """Every distinct run of allocations between two moments at which nothing is held, in order."""
        found: dict[tuple[Block, ...], None] = {}
        start = 0
        while start < len(self.sizes):
            stop = start + 1
            end = self.deaths[start]
            while stop < end:
                end = max(end, self.deaths[stop])
                stop += 1
            found[
                tuple(
                    Block(self.sizes[i], i - start, self.deaths[i] - start)
                    for i in range(start, stop)
                )
            ] = None
            start = stop
        return list(found)

    def blocks(self) -> tuple[Block, ...]:
        """The distinct sequences behind one another: what a plan lists for a step."""
        blocks: list[Block] = []
        for sequence in self.sequences():
            start = len(blocks)
            blocks += [Block(b.size_bytes, start + b.birth, start + b.death) for b in sequence]
        return tuple(blocks)
