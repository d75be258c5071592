"""What a replay found: recorded beside predicted, device by device."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    frees_unrequested: int = 0  # of blocks that nobody had given up: these events were left out
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
    pools_inferred: int = 0  # private ones that nobody recorded
    elsewhere_in_private: int = 0  # allocations in private pools, not at the address of the rules
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
        if self.frees_unrequested and not self.frees_requested:
            return self.frees_completed
        return self.frees_requested


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
