"""A recording's state before its first event: its final state with every event undone, last to first.

A trace is a ring that keeps the last events, so it may begin anywhere. What is known at its end (segments, live
blocks) minus what happened is what there was at its beginning. Not known is the size of a block that was alive then
and freed since: an event tells what was requested, not the slack of up to 1 MiB that an unsplit block of the large
pool carries. Where blocks beside it, or an allocation right behind it while it lived, tell its end, it is known too.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from planner.allocator.heap import DEFAULT_POOL, Heap, Piece, PoolId, Reservation
from planner.allocator.settings import MIN_BLOCK_BYTES, SMALL_BYTES, SMALL_SEGMENT_BYTES, Settings
from planner.replay.snapshot import DeviceRecord, Event
from planner.units import GIB

UNKNOWN = 1 << 64  # first part of made-up ids of pools that nobody recorded
RANGE_BYTES = 1024 * GIB  # of an expandable segment's addresses; their end is not recorded


@dataclass(slots=True)
class Live:
    """A block that was alive. `size_bytes` None: not known yet."""

    requested_bytes: int
    size_bytes: int | None
    waiting: bool


@dataclass(slots=True)
class Segment:
    size_bytes: int
    stream: int
    small: bool
    pool_id: PoolId | None


@dataclass(slots=True)
class Range:
    """The addresses of one expandable segment, and which of them are mapped."""

    address: int
    size_bytes: int
    stream: int
    small: bool
    pool_id: PoolId
    mapped: list[tuple[int, int]] = field(default_factory=list)  # sorted, disjoint [start, end)

    def add(self, start: int, end: int) -> None:
        kept = [(s, e) for s, e in self.mapped if e < start or s > end]
        joined = [(s, e) for s, e in self.mapped if not (e < start or s > end)]
        if joined:
            start, end = min(start, joined[0][0]), max(end, joined[-1][1])
        bisect.insort(kept, (start, end))
        self.mapped = kept

    def cut(self, start: int, end: int) -> None:
        kept = []
        for s, e in self.mapped:
            if e <= start or s >= end:
                kept.append((s, e))
                continue
            if s < start:
                kept.append((s, start))
            if e > end:
                kept.append((end, e))
        self.mapped = kept


@dataclass(slots=True)
class Start:
    """What there was before the first event, and which pool each event belongs to."""

    segments: dict[int, Segment]
    ranges: list[Range]
    live: dict[int, Live]
    pool_ids: list[PoolId | None]  # None: of a segment that is gone, its pool was never told
    silent: set[int] = field(default_factory=set)  # frees whose completion was not recorded
    guessed_sizes: int = 0  # blocks whose slack cannot be known
    contradictions: int = 0  # events that do not fit what comes after them

    def range_of(self, address: int) -> Range | None:
        """The expandable segment that an address belongs to."""
        index = bisect.bisect_right(self.ranges, address, key=lambda found: found.address)
        found = self.ranges[index - 1] if index else None
        return found if found is not None and address < found.address + found.size_bytes else None

    def heap(self, settings: Settings) -> Heap:
        """An allocator's blocks as they were."""
        heap = Heap(settings)
        addresses = sorted(self.live)
        spans: list[tuple[int, int, Segment | Range]] = [
            (address, segment.size_bytes, segment) for address, segment in self.segments.items()
        ]
        spans += [(found.address, found.size_bytes, found) for found in self.ranges if found.mapped]
        end = 0
        for address, size, segment in sorted(spans, key=lambda span: span[:2]):
            if address < end or not size:
                self.contradictions += 1  # lies in another one
                continue
            end = address + size
            pool = heap.pool_of(segment.pool_id or DEFAULT_POOL, segment.small)
            if isinstance(segment, Range):
                reservation = Reservation(address, size, settings.page_size(segment.small))
                pieces = self._range_pieces(addresses, segment)
                heap.load_segment(pool, segment.stream, pieces, reservation)
            else:
                heap.load_segment(pool, segment.stream, self._pieces(addresses, address, end))
        return heap

    def _range_pieces(self, addresses: list[int], found: Range) -> list[Piece]:
        """As `_pieces`, with what is not mapped between."""
        pieces = []
        at = found.address
        for start, end in found.mapped:
            if start > at:
                pieces.append(Piece(at, start - at, 0, "unmapped"))
            pieces += self._pieces(addresses, start, end)
            at = end
        if at < found.address + found.size_bytes:
            pieces.append(Piece(at, found.address + found.size_bytes - at, 0, "unmapped"))
        return pieces

    def _pieces(self, addresses: list[int], start: int, end: int) -> list[Piece]:
        """Live blocks of `[start, end)` and the free ones between them."""
        pieces = []
        at = start
        low, high = bisect.bisect_left(addresses, start), bisect.bisect_left(addresses, end)
        for address in addresses[low:high]:
            live = self.live[address]
            if address < at or not live.size_bytes:
                continue  # contradicts what lies in front of it
            if address > at:
                pieces.append(Piece(at, address - at, 0, "free"))
            size = min(live.size_bytes, end - address)
            state = "waiting" if live.waiting else "allocated"
            pieces.append(Piece(address, size, live.requested_bytes, state))
            at = address + size
        if at < end:
            pieces.append(Piece(at, end - at, 0, "free"))
        return pieces


def roll_back(record: DeviceRecord, settings: Settings) -> Start:
    """The state before the first event of one device's recording."""
    start = Start({}, _ranges(record, settings), {}, [DEFAULT_POOL] * len(record.events))
    for segment in record.segments:
        if segment.expandable:
            found = start.range_of(segment.address)
            assert found is not None  # its addresses are among those that the ranges were made of
            found.add(segment.address, segment.address + segment.size_bytes)
        else:
            start.segments[segment.address] = Segment(
                segment.size_bytes,
                segment.stream,
                segment.small,
                segment.pool_id if record.pools_told else None,
            )
        for block in segment.blocks:
            if block.state != "free":
                start.live[block.address] = Live(
                    block.requested_bytes, block.size_bytes, block.state == "waiting"
                )
    bases = sorted(start.segments)
    completes = any(event.action == "free_completed" for event in record.events)
    for index in range(len(record.events) - 1, -1, -1):
        _undo(start, record.events[index], index, bases, completes)
    _infer_sizes(start, record.events, settings)
    return start


def _undo(start: Start, event: Event, index: int, bases: list[int], completes: bool) -> None:
    action, address = event.action, event.address
    live = start.live
    if action in ("oom", "snapshot"):
        start.pool_ids[index] = event.pool_id or DEFAULT_POOL
        return
    if action != "segment_free":
        start.pool_ids[index] = _pool_id(start, event, bases)
    else:
        start.pool_ids[index] = event.pool_id
    if action == "alloc":
        if live.pop(address, None) is None:
            start.contradictions += 1
    elif action == "free_completed":
        if address in live:
            start.contradictions += 1
        live[address] = Live(event.size_bytes, None, True)
    elif action == "free_requested":
        found = live.get(address)
        if found is None:
            live[address] = Live(event.size_bytes, None, False)
            start.silent.add(index)
            start.contradictions += completes
        else:
            start.contradictions += not found.waiting
            found.waiting = False
    elif action == "segment_alloc":
        segment = start.segments.pop(address, None)
        if segment is None:
            start.contradictions += 1
        else:
            start.contradictions += segment.size_bytes != event.size_bytes
            del bases[bisect.bisect_left(bases, address)]
    elif action == "segment_free":
        if address in start.segments:
            start.contradictions += 1
        else:
            start.contradictions += _overlaps(start, bases, event)
            bisect.insort(bases, address)
        small = event.size_bytes == SMALL_SEGMENT_BYTES
        start.segments[address] = Segment(event.size_bytes, event.stream, small, event.pool_id)
    else:
        found_range = start.range_of(address)
        if found_range is None:
            start.contradictions += 1  # of no size
        elif action == "segment_map":
            found_range.cut(address, address + event.size_bytes)
        else:
            found_range.add(address, address + event.size_bytes)


def _overlaps(start: Start, bases: list[int], event: Event) -> bool:
    """Whether a segment lies where others are."""
    index = bisect.bisect_left(bases, event.address)
    before = bases[index - 1] if index else None
    return (before is not None and before + start.segments[before].size_bytes > event.address) or (
        index < len(bases) and event.address + event.size_bytes > bases[index]
    )


def _pool_id(start: Start, event: Event, bases: list[int]) -> PoolId | None:
    """The pool an event belongs to: as recorded, or that of the segment it lies in."""
    if event.pool_id is not None:
        return event.pool_id
    if start.ranges:
        found = start.range_of(event.address)
        if found is not None:
            return found.pool_id
    index = bisect.bisect_right(bases, event.address)
    if index:
        segment = start.segments[bases[index - 1]]
        if event.address < bases[index - 1] + segment.size_bytes:
            return segment.pool_id
    return DEFAULT_POOL


class _Seen(NamedTuple):
    """Addresses of an expandable segment that were mapped at some time. None: not told."""

    address: int
    size_bytes: int
    stream: int
    small: bool | None
    pool_id: PoolId | None


def _ranges(record: DeviceRecord, settings: Settings) -> list[Range]:
    """The expandable segments that the final state and the events show: neighbours of one stream and pool."""
    seen = [
        _Seen(s.address, s.size_bytes, s.stream, s.small, s.pool_id)
        for s in record.segments
        if s.expandable
    ]
    large_page = settings.page_size(small=False)
    for event in record.events:
        if event.action in ("segment_map", "segment_unmap"):
            small: bool | None = None
            if event.size_bytes % large_page:
                small = True
            elif event.action == "segment_map" and large_page > SMALL_SEGMENT_BYTES:
                small = False  # a small request never lacks more than one page
            seen.append(_Seen(event.address, event.size_bytes, event.stream, small, event.pool_id))
    private = any(segment.pool_id != DEFAULT_POOL for segment in record.segments)
    ranges: list[Range] = []
    pool_ids: list[PoolId | None] = []
    for area in _areas(seen, large_page):
        last = ranges[-1] if ranges else None
        if (
            last is not None
            and (last.stream, last.small) == (area.stream, area.small)
            and (area.address - last.address) % settings.page_size(last.small) == 0
            and area.address - last.address < RANGE_BYTES
            and (
                pool_ids[-1] == area.pool_id
                or (None in (pool_ids[-1], area.pool_id) and not private)
            )
        ):
            pool_ids[-1] = pool_ids[-1] or area.pool_id
            last.size_bytes = area.address + area.size_bytes - last.address
            continue
        ranges.append(
            Range(area.address, area.size_bytes, area.stream, bool(area.small), DEFAULT_POOL)
        )
        pool_ids.append(area.pool_id)
    for index, (found, pool_id) in enumerate(zip(ranges, pool_ids, strict=True)):
        # a pool has one range by stream and size class: of two that do not say theirs, one is a private pool's
        others = [
            (pool_ids[i] or DEFAULT_POOL) == DEFAULT_POOL
            for i, other in enumerate(ranges)
            if (other.stream, other.small) == (found.stream, found.small)
            and (i < index or pool_ids[i] == DEFAULT_POOL)
        ]
        found.pool_id = pool_id or ((UNKNOWN, index) if any(others) else DEFAULT_POOL)
    # all are as large as 1.125 times the card; drivers put them side by side, so that the least distance tells it
    distances = [following.address - found.address for found, following in pairwise(ranges)]
    extents = [found.size_bytes for found in ranges]
    least = max(extents, default=0)
    size_bytes = min((d for d in distances if d >= least), default=RANGE_BYTES)
    for found in ranges:
        page = settings.page_size(found.small)
        found.size_bytes = max(-(-size_bytes // page) * page, found.size_bytes)
    for found, following, extent in zip(ranges, ranges[1:], extents, strict=False):
        room = (following.address - found.address) // settings.page_size(found.small)
        found.size_bytes = max(
            min(found.size_bytes, room * settings.page_size(found.small)), extent
        )
    return ranges


def _areas(seen: list[_Seen], large_page: int) -> list[_Seen]:
    """Addresses without a gap; size class and pool from whichever entry tells them."""
    areas: list[_Seen] = []
    for entry in sorted(seen, key=lambda entry: entry[:2]):
        last = areas[-1] if areas else None
        if last is None or entry.address > last.address + last.size_bytes:
            areas.append(entry)
            continue
        end = max(last.address + last.size_bytes, entry.address + entry.size_bytes)
        areas[-1] = last._replace(
            size_bytes=end - last.address,
            small=last.small if last.small is not None else entry.small,
            pool_id=last.pool_id or entry.pool_id,
        )
    # only given back, in whole large pages: large
    return [
        a._replace(small=bool(a.size_bytes % large_page)) if a.small is None else a for a in areas
    ]


# --- sizes of blocks that were alive at the start and are gone at the end ----------------------------------------------


def _infer_sizes(start: Start, events: tuple[Event, ...], settings: Settings) -> None:
    """Give every live block a size: rounded, or with the slack that its neighbours show."""
    addresses = sorted(start.live)
    open_gaps: dict[int, int] = {}  # block: the end of what may be its slack or free
    bases = sorted(start.segments)
    for index, address in enumerate(addresses):
        live = start.live[address]
        if live.size_bytes is not None:
            continue
        rounded = settings.round_size(live.requested_bytes)
        live.size_bytes = rounded
        if start.ranges and start.range_of(address) is not None:
            continue  # expandable segments split to the last 512 bytes
        place = bisect.bisect_right(bases, address)
        if not place:
            start.contradictions += 1
            continue
        segment = start.segments[bases[place - 1]]
        end = bases[place - 1] + segment.size_bytes
        if address >= end:
            start.contradictions += 1
            continue
        if index + 1 < len(addresses):
            end = min(end, addresses[index + 1])
        gap = end - address - rounded
        if gap <= 0:
            live.size_bytes = end - address
            start.contradictions += gap < 0
        elif segment.small:
            continue
        elif gap <= SMALL_BYTES or rounded >= settings.max_split_bytes:
            # not split; or a free rest that no request of the large pool fits in, which comes to the same
            live.size_bytes = end - address
        else:
            open_gaps[address] = end
    if open_gaps:
        _watch(start, events, open_gaps, settings)


def _watch(
    start: Start, events: tuple[Event, ...], open_gaps: dict[int, int], settings: Settings
) -> None:
    """Close gaps by the first allocation behind a block while it lives: it is cut from the front of what is free."""
    order = sorted(open_gaps)
    for event in events:
        if not open_gaps:
            return
        if event.action == "alloc":
            index = bisect.bisect_right(order, event.address) - 1
            address = order[index] if index >= 0 else -1
            if address in open_gaps and address < event.address < open_gaps[address]:
                live = start.live[address]
                slack = event.address - address - settings.round_size(live.requested_bytes)
                if 0 <= slack <= SMALL_BYTES and slack % MIN_BLOCK_BYTES == 0:
                    live.size_bytes = event.address - address
                    del open_gaps[address]
        elif event.action in ("free_requested", "free_completed") and event.address in open_gaps:
            # freed before anything showed its end: it may have had a slack
            del open_gaps[event.address]
            start.guessed_sizes += 1
    start.guessed_sizes += len(open_gaps)
