"""Settings of torch's CUDA caching allocator, and the sizes that follow from them alone.

Sources: c10/core/AllocatorConfig.h and .cpp, c10/cuda/CUDACachingAllocator.cpp (round_size, get_allocation_size).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from itertools import pairwise

from planner.errors import InputError
from planner.units import GIB, MIB

MIN_BLOCK_BYTES = 512  # kMinBlockSize
SMALL_BYTES = MIB  # kSmallSize
SMALL_SEGMENT_BYTES = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT_BYTES = 20 * MIB  # large_segment_size, once the constant kLargeBuffer
MIN_LARGE_BYTES = 10 * MIB  # kMinLargeAlloc
ROUND_LARGE_BYTES = 2 * MIB  # kRoundLarge
ROUNDUP_INTERVALS = 16  # of sizes, by powers of two: below 2 MiB, then up to 64 GiB and above
UNLIMITED = 2**64 - 1

# known to torch, without effect on what the device holds
IGNORED = frozenset(
    {
        "backend",
        "graph_capture_record_stream_reuse",
        "pinned_free_catch_all",
        "pinned_max_cached_size_mb",
        "pinned_max_round_threshold_mb",
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_use_background_threads",
        "pinned_use_cuda_host_register",
        "pinned_use_hip_host_register",
        "release_lock_on_cudamalloc",
        "release_lock_on_hipmalloc",
        "throw_on_cudamalloc_oom",
    }
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides where a block goes. The defaults are torch's."""

    max_split_bytes: int = UNLIMITED
    max_non_split_rounding_bytes: int = 20 * MIB
    garbage_collection_threshold: float = 0.0
    roundup_divisions: tuple[int, ...] = (0,) * ROUNDUP_INTERVALS
    expandable_segments: bool = False
    large_segment_bytes: int = LARGE_SEGMENT_BYTES
    memory_fraction: float = 1.0
    uncached: bool = False  # PYTORCH_NO_CUDA_MEMORY_CACHING

    def round_size(self, size_bytes: int) -> int:
        """Bytes of the block that a request of `size_bytes` needs."""
        if size_bytes < MIN_BLOCK_BYTES:
            return MIN_BLOCK_BYTES
        interval = min(max(size_bytes.bit_length() - 21, 0), ROUNDUP_INTERVALS - 1)
        divisions = self.roundup_divisions[interval]
        if divisions > 1 and size_bytes > MIN_BLOCK_BYTES * divisions:
            return _next_division(size_bytes, divisions)
        return -(-size_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES

    def segment_size(self, block_bytes: int) -> int:
        """Bytes asked of the driver for a block of rounded size `block_bytes` where none is free."""
        if block_bytes <= SMALL_BYTES:
            return SMALL_SEGMENT_BYTES
        if block_bytes < MIN_LARGE_BYTES:
            return max(self.large_segment_bytes, block_bytes)
        return -(-block_bytes // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES

    def page_size(self, small: bool) -> int:
        """Bytes that an expandable segment maps at once."""
        return SMALL_SEGMENT_BYTES if small else self.large_segment_bytes


def _next_division(size_bytes: int, divisions: int) -> int:
    """The next of `divisions` equal steps between two powers of two."""
    floor = 1 << (size_bytes.bit_length() - 1)
    if size_bytes == floor:
        return size_bytes
    step = floor >> (divisions.bit_length() - 1)
    return -(-size_bytes // step) * step if step else 2 * floor


def parse_settings(text: str, *, what: str = "PYTORCH_ALLOC_CONF", strict: bool = True) -> Settings:
    """Settings of a string such as `expandable_segments:True,roundup_power2_divisions:[256:1,>:4]`.

    Raises InputError naming `what`; where not `strict`, keys that are not known are left out, as torch of another
    version knew them.
    """
    settings = Settings()
    for key, value in _pairs(text, what):
        if key == "max_split_size_mb":
            settings = replace(settings, max_split_bytes=_mib(value, key, what, least=20))
        elif key == "max_non_split_rounding_mb":
            size = _mib(value, key, what, least=20)
            settings = replace(settings, max_non_split_rounding_bytes=size)
        elif key == "large_segment_size_mb":
            settings = replace(settings, large_segment_bytes=_mib(value, key, what, least=2))
        elif key == "garbage_collection_threshold":
            share = _share(value, key, what)
            if not 0 < share < 1:
                raise InputError(f"{what}: {key}: wanted a number between 0 and 1, found {value!r}")
            settings = replace(settings, garbage_collection_threshold=share)
        elif key == "per_process_memory_fraction":
            settings = replace(settings, memory_fraction=_share(value, key, what))
        elif key == "expandable_segments":
            if value not in ("True", "False"):
                raise InputError(f"{what}: {key}: wanted True or False, found {value!r}")
            settings = replace(settings, expandable_segments=value == "True")
        elif key == "roundup_power2_divisions":
            settings = replace(settings, roundup_divisions=parse_divisions(value, what))
        elif key == "backend" and value == "cudaMallocAsync":
            raise InputError(
                f"{what}: backend: wanted native, found cudaMallocAsync: that is the driver's own allocator, "
                "whose placement is not known"
            )
        elif strict and key not in IGNORED:
            known = ", ".join(sorted(IGNORED | set(_KEYS)))
            raise InputError(f"{what}: unknown setting {key!r}; known: {known}")
    return settings


_KEYS = (
    "expandable_segments",
    "garbage_collection_threshold",
    "large_segment_size_mb",
    "max_non_split_rounding_mb",
    "max_split_size_mb",
    "per_process_memory_fraction",
    "roundup_power2_divisions",
)


def parse_divisions(value: str, what: str) -> tuple[int, ...]:
    """Divisions by interval of sizes, from one number or from `[256:1,512:2,>:8]` (sizes in MiB).

    The first entry also holds for all smaller sizes, `>` for all sizes behind the last entry; what lies between two
    entries is not rounded. Source: AllocatorConfig.cpp, parseRoundUpPower2Divisions.
    """
    key = "roundup_power2_divisions"
    if not value.startswith("["):
        return (_power(value, key, what),) * ROUNDUP_INTERVALS
    found = [0] * ROUNDUP_INTERVALS
    last = 0
    entries = [entry for entry in value[1:-1].split(",") if entry]
    for number, entry in enumerate(entries):
        boundary, colon, text = entry.partition(":")
        if not colon:
            raise InputError(f"{what}: {key}: wanted entries such as 256:4, found {entry!r}")
        divisions = 0 if text == "0" else _power(text, key, what)
        if boundary == ">":
            found[last + 1 :] = [divisions] * (ROUNDUP_INTERVALS - last - 1)
            continue
        index = min(_power(boundary, key, what).bit_length() - 1, ROUNDUP_INTERVALS - 1)
        if number == 0:
            found[:index] = [divisions] * index
        found[index] = divisions
        last = index
    return tuple(found)


def _pairs(text: str, what: str) -> list[tuple[str, str]]:
    """`key:value` pairs; commas and colons inside brackets belong to the value."""
    squeezed = "".join(text.split())
    if not squeezed:
        return []
    marks = [-1, *(m.start() for m in re.finditer(r",(?![^\[]*\])", squeezed)), len(squeezed)]
    pairs = []
    for start, end in pairwise(marks):
        entry = squeezed[start + 1 : end]
        if not entry:
            continue
        key, colon, value = entry.partition(":")
        bracketed = value.startswith("[") or value.endswith("]")
        if not colon or not value or bracketed != (value.startswith("[") and value.endswith("]")):
            raise InputError(f"{what}: wanted settings such as key:value, found {entry!r}")
        pairs.append((key, value))
    return pairs


def _whole(value: str, key: str, what: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", value):
        raise InputError(f"{what}: {key}: wanted a whole number, found {value!r}")
    return int(value)


def _mib(value: str, key: str, what: str, *, least: int) -> int:
    number = _whole(value, key, what)
    if number < least:
        raise InputError(f"{what}: {key}: wanted at least {least}, found {number}")
    return min(number * MIB, UNLIMITED)


def _power(value: str, key: str, what: str) -> int:
    number = _whole(value, key, what)
    if number < 1 or number & (number - 1) or number > 64 * GIB:
        raise InputError(f"{what}: {key}: wanted powers of two, found {value!r}")
    return number


def _share(value: str, key: str, what: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise InputError(f"{what}: {key}: wanted a number from 0 to 1, found {value!r}")
    return share
