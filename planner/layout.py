"""Offsets of buffers in the arena: no two that are alive at the same step may share a byte.

The problem is dynamic storage allocation, NP-hard in general; plans are close to nested stacks, for which first fit
by a good order is optimal or nearly so. Several orders are tried in turn and the lowest height is kept; the largest
sum of live bytes is the lower bound at which trying stops.
Source: Pisarchyk and Lee 2020, arXiv:2001.03288 (greedy by size and by breadth).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from planner.buffers import ALIGNMENT
from planner.graph import Intervals


class Item(NamedTuple):
    name: str
    size_bytes: int
    intervals: Intervals
    life: int  # the same intervals as a bit set: bit i is step i


class Layout(NamedTuple):
    offsets: dict[str, int]
    height_bytes: int
    lower_bound_bytes: int


def pack(sizes: Mapping[str, int], lifetimes: Mapping[str, Intervals]) -> Layout:
    """The lowest layout found of buffers with these sizes (multiples of ALIGNMENT) and lifetimes."""
    items = [Item(name, sizes[name], spans, _bits(spans)) for name, spans in lifetimes.items()]
    lower = _lower_bound(items)
    best: dict[str, int] = {}
    best_height = -1
    for order in _ORDERS:
        offsets, height = _first_fit(sorted(items, key=order))
        if best_height < 0 or height < best_height:
            best, best_height = offsets, height
        if best_height <= lower:
            break
    return Layout(best, max(best_height, 0), lower)


def _length(item: Item) -> int:
    return item.life.bit_count()


_ORDERS: Sequence[Callable[[Item], tuple[int | str, ...]]] = (
    # what lives longest lies lowest, so that short-lived buffers share the rest
    lambda item: (-_length(item), -item.size_bytes, item.name),
    lambda item: (-item.size_bytes, -_length(item), item.name),
    lambda item: (-item.size_bytes * _length(item), item.name),
    lambda item: (item.intervals[0][0], -item.size_bytes, item.name),
    lambda item: (-item.intervals[-1][1], -_length(item), item.name),
)


def _first_fit(items: Sequence[Item]) -> tuple[dict[str, int], int]:
    """Each item at the lowest offset that is free throughout its life."""
    placed: list[tuple[int, int, int]] = []  # (offset, end, life), by offset
    offsets: dict[str, int] = {}
    height = 0
    for item in items:
        offset = 0
        for start, end, life in placed:
            if not life & item.life:
                continue
            if start >= offset + item.size_bytes:
                break
            offset = max(offset, end)
        offsets[item.name] = offset
        entry = (offset, offset + item.size_bytes, item.life)
        bisect.insort(placed, entry)
        height = max(height, entry[1])
    assert height % ALIGNMENT == 0
    return offsets, height


def _bits(spans: Intervals) -> int:
    life = 0
    for birth, death in spans:
        life |= (1 << death) - (1 << birth)
    return life


def _lower_bound(items: Sequence[Item]) -> int:
    changes: dict[int, int] = {}
    for item in items:
        for birth, death in item.intervals:
            changes[birth] = changes.get(birth, 0) + item.size_bytes
            changes[death] = changes.get(death, 0) - item.size_bytes
    total = peak = 0
    for step in sorted(changes):
        total += changes[step]
        peak = max(peak, total)
    return peak
