"""Each rule of the allocator on its own, with numbers worked out by hand."""

from __future__ import annotations

import pytest

from planner.allocator import CachingAllocator, Settings, parse_settings
from planner.errors import OutOfMemory
from planner.units import GIB, KIB, MIB


def offsets(*blocks: object) -> list[int]:
    """Addresses relative to the first block."""
    first = blocks[0].address  # type: ignore[attr-defined]
    return [block.address - first for block in blocks]  # type: ignore[attr-defined]


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requested", "rounded"),
    [(1, 512), (511, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)],
)
def test_sizes_are_rounded_to_512_bytes(requested: int, rounded: int) -> None:
    assert Settings().round_size(requested) == rounded


@pytest.mark.parametrize(
    ("block", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (41 * MIB, 42 * MIB),
    ],
)
def test_segments_are_2_mib_then_20_then_the_size_itself(block: int, segment: int) -> None:
    assert Settings().segment_size(block) == segment


@pytest.mark.parametrize(
    ("requested", "rounded"),
    [
        (1200, 1536),  # below 512 * 4: by 512
        (2049, 2560),  # between 2048 and 4096 steps of 512
        (5000, 5120),  # steps of 1024 from 4096
        (8192, 8192),  # a power of two stays
        (9 * MIB + 1, 10 * MIB),  # steps of 2 MiB from 8 MiB
    ],
)
def test_with_four_divisions_sizes_go_to_quarters_between_powers_of_two(
    requested: int, rounded: int
) -> None:
    assert parse_settings("roundup_power2_divisions:4").round_size(requested) == rounded


def test_divisions_may_differ_by_size() -> None:
    settings = parse_settings("roundup_power2_divisions:[2:1,4:2,>:8]")
    assert settings.round_size(2 * MIB + 1) == 2 * MIB + 512  # one division: as without
    assert settings.round_size(5 * MIB) == 6 * MIB  # halves between 4 and 8 MiB
    assert settings.round_size(8 * MIB + 1) == 9 * MIB  # eighths above


# --- pools, search, split, merge ----------------------------------------------------------------------------------


def test_small_and_large_requests_never_share_a_segment() -> None:
    allocator = CachingAllocator()
    allocator.release(allocator.malloc(2 * MIB))
    allocator.malloc(512)
    assert allocator.reserved_bytes == (20 + 2) * MIB


def test_the_smallest_block_that_fits_is_taken() -> None:
    allocator = CachingAllocator()
    large, small = allocator.malloc(40 * MIB), allocator.malloc(30 * MIB)
    address = small.address
    allocator.release(large)
    allocator.release(small)
    assert allocator.malloc(20 * MIB).address == address


def test_among_equal_blocks_the_lowest_address_is_taken() -> None:
    allocator = CachingAllocator()
    first, second = allocator.malloc(12 * MIB), allocator.malloc(12 * MIB)
    low = min(first.address, second.address)
    allocator.release(second)
    allocator.release(first)
    assert allocator.malloc(12 * MIB).address == low


@pytest.mark.parametrize(("rest", "splits"), [(MIB, False), (MIB + 512, True)])
def test_a_large_block_splits_when_more_than_a_mebibyte_is_left(rest: int, splits: bool) -> None:
    allocator = CachingAllocator()
    block = allocator.malloc(20 * MIB - rest)
    assert block.size_bytes == (20 * MIB - rest if splits else 20 * MIB)
    assert allocator.stats.inactive_split_bytes.all.current == (rest if splits else 0)


def test_a_small_block_splits_down_to_512_bytes() -> None:
    allocator = CachingAllocator()
    first, second = allocator.malloc(MIB), allocator.malloc(MIB - 512)
    assert offsets(first, second) == [0, MIB]
    assert second.size_bytes == MIB - 512
    assert allocator.reserved_bytes == 2 * MIB


def test_freed_neighbours_join_and_serve_a_larger_request() -> None:
    allocator = CachingAllocator()
    a, b, c = (allocator.malloc(6 * MIB) for _ in range(3))
    assert offsets(a, b, c) == [0, 6 * MIB, 12 * MIB]
    start = a.address
    allocator.release(a)
    allocator.release(c)  # joins the 2 MiB behind it
    assert allocator.stats.inactive_split.all.current == 2
    allocator.release(b)
    assert allocator.stats.inactive_split.all.current == 0  # one whole segment
    assert allocator.malloc(19 * MIB).address == start
    assert allocator.reserved_bytes == 20 * MIB


# --- streams ------------------------------------------------------------------------------------------------------


def test_a_stream_never_takes_another_streams_block() -> None:
    allocator = CachingAllocator()
    allocator.release(allocator.malloc(12 * MIB, stream=1))
    allocator.malloc(12 * MIB, stream=2)
    assert allocator.reserved_bytes == 24 * MIB


def test_a_block_used_on_another_stream_stays_active_until_that_stream_has_passed() -> None:
    allocator = CachingAllocator()
    block = allocator.malloc(12 * MIB)
    allocator.record_stream(block, 5)
    allocator.release(block)
    assert allocator.stats.allocated_bytes.all.current == 0
    assert allocator.stats.active_bytes.all.current == 12 * MIB
    allocator.malloc(12 * MIB)
    assert allocator.reserved_bytes == 24 * MIB
    allocator.pass_events(5)
    allocator.malloc(12 * MIB)
    assert allocator.reserved_bytes == 24 * MIB


def test_use_on_its_own_stream_defers_nothing() -> None:
    allocator = CachingAllocator()
    block = allocator.malloc(12 * MIB)
    allocator.record_stream(block, 0)
    allocator.release(block)
    assert allocator.stats.active_bytes.all.current == 0


def test_empty_cache_waits_for_all_streams() -> None:
    allocator = CachingAllocator()
    block = allocator.malloc(12 * MIB)
    allocator.record_stream(block, 5)
    allocator.release(block)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


# --- giving back --------------------------------------------------------------------------------------------------


def test_empty_cache_keeps_segments_with_a_live_block() -> None:
    allocator = CachingAllocator()
    held = allocator.malloc(6 * MIB)
    allocator.release(allocator.malloc(6 * MIB))
    allocator.release(allocator.malloc(30 * MIB))
    assert allocator.reserved_bytes == 50 * MIB
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB
    allocator.release(held)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_a_refusal_of_the_driver_gives_cached_segments_back_and_tries_again() -> None:
    allocator = CachingAllocator(free_bytes=50 * MIB)
    allocator.release(allocator.malloc(30 * MIB))
    allocator.malloc(40 * MIB)
    assert allocator.reserved_bytes == 40 * MIB
    assert allocator.stats.num_alloc_retries == 1
    assert allocator.stats.num_ooms == 0


def test_what_fits_neither_way_is_out_of_memory() -> None:
    allocator = CachingAllocator(free_bytes=50 * MIB)
    allocator.malloc(30 * MIB)
    with pytest.raises(OutOfMemory, match=r"wanted a block of 30\.0 MiB, reserved 30\.0 MiB"):
        allocator.malloc(30 * MIB)
    assert (allocator.stats.num_alloc_retries, allocator.stats.num_ooms) == (1, 1)
    assert allocator.reserved_bytes == 30 * MIB


def test_the_fraction_limits_what_is_reserved_not_what_is_requested() -> None:
    settings = parse_settings("per_process_memory_fraction:0.5")
    allocator = CachingAllocator(settings, total_bytes=80 * MIB)
    allocator.malloc(6 * MIB)  # 20 MiB
    allocator.malloc(20 * MIB)
    with pytest.raises(OutOfMemory, match=r"limit 40\.0 MiB"):
        allocator.malloc(512)


def test_garbage_collection_gives_back_what_was_not_wanted_for_longest() -> None:
    settings = parse_settings("garbage_collection_threshold:0.3,per_process_memory_fraction:0.5")
    allocator = CachingAllocator(settings, total_bytes=400 * MIB)  # limit 200, threshold 60
    old, young = allocator.malloc(30 * MIB), allocator.malloc(24 * MIB)
    allocator.release(old)
    for _ in range(4):  # searches of the large pool, which is the clock
        allocator.malloc(4 * MIB, stream=1)
    allocator.release(young)
    assert allocator.reserved_bytes == (30 + 24 + 20) * MIB
    allocator.malloc(40 * MIB)  # 74 > 60: the older of the two goes, and that is enough
    assert allocator.reserved_bytes == (24 + 20 + 40) * MIB


def test_blocks_of_max_split_size_are_neither_split_nor_given_to_smaller_requests() -> None:
    allocator = CachingAllocator(parse_settings("max_split_size_mb:32"))
    block = allocator.malloc(64 * MIB)
    allocator.release(block)
    allocator.malloc(24 * MIB)  # would fit
    assert allocator.reserved_bytes == (64 + 24) * MIB
    assert allocator.malloc(50 * MIB).size_bytes == 64 * MIB  # within 20 MiB: whole
    assert allocator.stats.oversize_allocations.current == 1
    assert allocator.stats.oversize_segments.current == 1


def test_an_oversize_block_is_not_taken_for_a_request_20_mib_smaller() -> None:
    allocator = CachingAllocator(parse_settings("max_split_size_mb:32"))
    allocator.release(allocator.malloc(64 * MIB))
    allocator.malloc(44 * MIB)
    assert allocator.reserved_bytes == (64 + 44) * MIB


def test_with_max_split_size_a_refusal_gives_just_one_oversize_block_back() -> None:
    allocator = CachingAllocator(parse_settings("max_split_size_mb:32"), free_bytes=150 * MIB)
    for block in [allocator.malloc(40 * MIB), allocator.malloc(100 * MIB)]:
        allocator.release(block)
    allocator.malloc(64 * MIB)  # the smallest that is at least as large: 100
    assert allocator.reserved_bytes == (40 + 64) * MIB
    assert allocator.stats.num_alloc_retries == 0


# --- private pools ------------------------------------------------------------------------------------------------


def test_a_captures_segments_are_its_own_until_nobody_uses_it() -> None:
    allocator = CachingAllocator()
    allocator.release(allocator.malloc(12 * MIB))
    allocator.begin_pool((1, 0))
    block = allocator.malloc(12 * MIB)
    allocator.end_pool((1, 0))
    assert allocator.reserved_bytes == 24 * MIB
    assert allocator.stats.reserved_bytes_by_private_pool[1, 0].current == 12 * MIB
    allocator.release(block)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 12 * MIB  # the default pool's went, the capture's stayed
    allocator.release_pool((1, 0))
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_only_the_streams_of_a_capture_go_to_its_pool() -> None:
    allocator = CachingAllocator()
    allocator.begin_pool((1, 0), frozenset({3}))
    assert allocator.malloc(512, stream=0).pool.id == (0, 0)
    assert allocator.malloc(512, stream=3).pool.id == (1, 0)


def test_nothing_is_given_back_during_a_capture() -> None:
    allocator = CachingAllocator(free_bytes=30 * MIB)
    allocator.release(allocator.malloc(20 * MIB))
    allocator.begin_pool((1, 0))
    with pytest.raises(OutOfMemory):
        allocator.malloc(20 * MIB)
    assert allocator.stats.num_alloc_retries == 0


def test_a_pool_that_does_not_split_hands_out_whole_segments() -> None:
    allocator = CachingAllocator()
    allocator.create_pool((0, 1), split=False)
    allocator.begin_pool((0, 1))
    assert allocator.malloc(2 * MIB).size_bytes == 20 * MIB


def test_a_pool_may_lend_its_blocks_where_the_driver_refuses() -> None:
    allocator = CachingAllocator(free_bytes=20 * MIB)
    allocator.create_pool((0, 1), use_on_oom=True)
    allocator.begin_pool((0, 1))
    allocator.release(allocator.malloc(20 * MIB))
    allocator.end_pool((0, 1))
    assert allocator.malloc(12 * MIB).pool.id == (0, 1)


# --- expandable segments ------------------------------------------------------------------------------------------


def test_expandable_segments_map_20_mib_pages_and_only_what_is_missing() -> None:
    allocator = CachingAllocator(parse_settings("expandable_segments:True"))
    first = allocator.malloc(30 * MIB)
    assert allocator.reserved_bytes == 40 * MIB
    second = allocator.malloc(15 * MIB)  # 10 are there, 5 are missing
    assert allocator.reserved_bytes == 60 * MIB
    assert offsets(first, second) == [0, 30 * MIB]
    allocator.malloc(512)
    assert allocator.reserved_bytes == 62 * MIB
    assert allocator.stats.segment.all.current == 0


def test_expandable_segments_split_to_the_last_512_bytes() -> None:
    allocator = CachingAllocator(parse_settings("expandable_segments:True"))
    assert allocator.malloc(20 * MIB - 512).size_bytes == 20 * MIB - 512
    assert allocator.stats.inactive_split.all.current == 0  # not counted here


def test_a_hole_that_fits_is_preferred_to_the_growing_end() -> None:
    allocator = CachingAllocator(parse_settings("expandable_segments:True"))
    first, _ = allocator.malloc(16 * MIB), allocator.malloc(12 * MIB)  # 12 MiB left at the end
    address = first.address
    allocator.release(first)
    assert allocator.malloc(8 * MIB).address == address  # not the end, though 12 is less than 16


def test_empty_cache_unmaps_whole_pages_inside_free_blocks() -> None:
    allocator = CachingAllocator(parse_settings("expandable_segments:True"))
    first, second = allocator.malloc(50 * MIB), allocator.malloc(5 * MIB)
    assert allocator.reserved_bytes == 60 * MIB
    start = first.address
    allocator.release(first)
    allocator.empty_cache()  # pages 0 and 1; page 2 is partly used
    assert allocator.reserved_bytes == 20 * MIB
    assert allocator.malloc(45 * MIB).address == start  # mapped again where there is room first
    assert allocator.reserved_bytes == 60 * MIB
    assert second.address == start + 50 * MIB


def test_larger_pages_are_a_setting() -> None:
    conf = "expandable_segments:True,large_segment_size_mb:64"
    allocator = CachingAllocator(parse_settings(conf))
    allocator.malloc(5 * MIB)
    assert allocator.reserved_bytes == 64 * MIB


# --- the rest -----------------------------------------------------------------------------------------------------


def test_a_request_of_nothing_takes_nothing() -> None:
    allocator = CachingAllocator()
    allocator.release(allocator.malloc(0))
    assert allocator.reserved_bytes == 0
    assert set(allocator.stats.as_dict().values()) == {0}


def test_without_a_cache_every_block_comes_and_goes_by_itself() -> None:
    allocator = CachingAllocator(Settings(uncached=True))
    block = allocator.malloc(3 * MIB + 1)
    assert allocator.reserved_bytes == 3 * MIB + 512
    allocator.release(block)
    assert allocator.reserved_bytes == 0


def test_peaks_start_anew_after_a_reset() -> None:
    allocator = CachingAllocator()
    allocator.release(allocator.malloc(30 * MIB))
    allocator.malloc(5 * KIB)
    stats = allocator.stats.as_dict()
    assert stats["allocated_bytes.all.peak"] == 30 * MIB
    assert stats["requested_bytes.small_pool.current"] == 5 * KIB
    allocator.stats.reset_peaks()
    stats = allocator.stats.as_dict()
    assert stats["allocated_bytes.all.peak"] == 5 * KIB
    assert stats["reserved_bytes.all.peak"] == 32 * MIB
    assert stats["allocated_bytes.all.allocated"] == 30 * MIB + 5 * KIB
    allocator.stats.reset_accumulated()
    assert allocator.stats.as_dict()["allocated_bytes.all.allocated"] == 0


def test_ten_thousand_small_blocks_need_what_they_add_up_to() -> None:
    allocator = CachingAllocator()
    for _ in range(10_000):
        allocator.malloc(1000)
    assert allocator.reserved_bytes == -(-10_000 // 2048) * 2 * MIB
    assert allocator.reserved_bytes < GIB
