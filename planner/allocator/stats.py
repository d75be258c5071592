"""The caching allocator's statistics, as torch counts them (c10/core/CachingDeviceAllocator.h: DeviceStats)."""

from __future__ import annotations

from collections.abc import Iterator


class Stat:
    """One counter: how much now, the most at once, and how much came and went in all."""

    __slots__ = ("allocated", "current", "freed", "peak")

    def __init__(self) -> None:
        self.current = self.peak = self.allocated = self.freed = 0

    def add(self, amount: int) -> None:
        self.current += amount
        self.allocated += amount
        if self.current > self.peak:
            self.peak = self.current

    def take(self, amount: int) -> None:
        self.current -= amount
        self.freed += amount

    def move(self, change: int) -> None:
        """Add or take, whichever `change` says."""
        if change > 0:
            self.add(change)
        elif change < 0:
            self.take(-change)


class ByPool:
    """One statistic over both kinds of pools and over each."""

    __slots__ = ("all", "large", "small")

    def __init__(self) -> None:
        self.all, self.small, self.large = Stat(), Stat(), Stat()

    def add(self, amount: int, small: bool) -> None:
        self.all.add(amount)
        (self.small if small else self.large).add(amount)

    def take(self, amount: int, small: bool) -> None:
        self.all.take(amount)
        (self.small if small else self.large).take(amount)

    def move(self, change: int, small: bool) -> None:
        self.all.move(change)
        (self.small if small else self.large).move(change)


class Statistics:
    """Every statistic of one device's allocator. Counts are of blocks or segments, `*_bytes` are bytes.

    requested: unrounded sizes of active blocks; allocated: block sizes from malloc to free; active: the same until
    the block is back in its pool; reserved: segments, or mapped pages; inactive_split: free blocks that have a
    neighbour in their segment (expandable segments are left out).
    """

    NAMES = (
        "allocation",
        "segment",
        "active",
        "inactive_split",
        "allocated_bytes",
        "reserved_bytes",
        "active_bytes",
        "inactive_split_bytes",
        "requested_bytes",
    )

    def __init__(self) -> None:
        self.allocation = ByPool()
        self.segment = ByPool()
        self.active = ByPool()
        self.inactive_split = ByPool()
        self.allocated_bytes = ByPool()
        self.reserved_bytes = ByPool()
        self.active_bytes = ByPool()
        self.inactive_split_bytes = ByPool()
        self.requested_bytes = ByPool()
        self.reserved_bytes_by_private_pool: dict[tuple[int, int], Stat] = {}
        self.oversize_allocations = Stat()
        self.oversize_segments = Stat()
        self.num_alloc_retries = 0
        self.num_ooms = 0
        self.num_sync_all_streams = 0
        self.num_device_alloc = 0
        self.num_device_free = 0

    def reset_peaks(self) -> None:
        """torch.cuda.reset_peak_memory_stats: every peak becomes what is now."""
        for stat in self._stats():
            stat.peak = stat.current

    def reset_accumulated(self) -> None:
        """torch.cuda.reset_accumulated_memory_stats: what came and went, and all counts, become zero."""
        for stat in self._stats():
            stat.allocated = stat.freed = 0
        self.num_alloc_retries = self.num_ooms = self.num_sync_all_streams = 0
        self.num_device_alloc = self.num_device_free = 0

    def as_dict(self) -> dict[str, int]:
        """Flat, with the keys of torch.cuda.memory_stats: `allocated_bytes.all.peak`."""
        flat: dict[str, int] = {}
        for name in self.NAMES:
            pools: ByPool = getattr(self, name)
            for kind, stat in (
                ("all", pools.all),
                ("small_pool", pools.small),
                ("large_pool", pools.large),
            ):
                for field in ("current", "peak", "allocated", "freed"):
                    flat[f"{name}.{kind}.{field}"] = getattr(stat, field)
        for name in ("oversize_allocations", "oversize_segments"):
            for field in ("current", "peak", "allocated", "freed"):
                flat[f"{name}.{field}"] = getattr(getattr(self, name), field)
        for name in (
            "num_alloc_retries",
            "num_ooms",
            "num_sync_all_streams",
            "num_device_alloc",
            "num_device_free",
        ):
            flat[name] = getattr(self, name)
        return flat

    def _stats(self) -> Iterator[Stat]:
        for name in self.NAMES:
            pools: ByPool = getattr(self, name)
            yield from (pools.all, pools.small, pools.large)
        yield from (self.oversize_allocations, self.oversize_segments)
        yield from self.reserved_bytes_by_private_pool.values()
