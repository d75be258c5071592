"""How many bytes of streamed weights may stay in pinned host memory, from where each iteration of decode takes them."""

from __future__ import annotations

from planner.profile import DeviceProfile
from planner.units import MIB

PIECE_BYTES = 256 * MIB  # executor.host_tier: pinned memory is taken in such pieces
RING_BYTES = 192 * MIB  # executor.queues: the pinned pieces through which all else comes


def capacity_bytes(profile: DeviceProfile, ram_bytes: int, total_bytes: int, repeats: int) -> int:
    """Bytes of weights that may stay in pinned memory; 0 where there is none, or where so few iterations do not repay pinning them.

    Where the files fit host memory, what they take there (the page cache) is left to them.
    """
    if not profile.pin_bytes_per_s or ram_bytes <= 0:
        return 0
    cached = total_bytes <= ram_bytes
    slow = profile.page_cache_bytes_per_s if cached else profile.disk_bytes_per_s
    link = profile.host_to_device_bytes_per_s
    if repeats * (1 / min(slow, link) - 1 / link) <= 1 / profile.pin_bytes_per_s:
        return 0
    left = ram_bytes - (total_bytes if cached else 0) - RING_BYTES
    return max(left, 0) // PIECE_BYTES * PIECE_BYTES
