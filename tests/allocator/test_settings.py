"""Strings of PYTORCH_ALLOC_CONF, read as torch reads them."""

from __future__ import annotations

import pytest

from planner.allocator import Settings, parse_settings
from planner.errors import InputError
from planner.units import MIB


def test_nothing_said_is_torchs_own_settings() -> None:
    assert parse_settings("") == parse_settings("  ") == Settings()


def test_every_setting_is_read_with_spaces_anywhere() -> None:
    found = parse_settings(
        " expandable_segments : True, max_split_size_mb:64,max_non_split_rounding_mb: 32 ,"
        "large_segment_size_mb:40,garbage_collection_threshold:0.6,per_process_memory_fraction:0.5,"
        "roundup_power2_divisions:[256:1, 512:2,>:4],backend:native,pinned_num_register_threads:8"
    )
    divisions = (1,) * 9 + (2,) + (4,) * 6
    assert found == Settings(
        max_split_bytes=64 * MIB,
        max_non_split_rounding_bytes=32 * MIB,
        garbage_collection_threshold=0.6,
        roundup_divisions=divisions,
        expandable_segments=True,
        large_segment_bytes=40 * MIB,
        memory_fraction=0.5,
    )


def test_sizes_between_two_entries_of_divisions_are_not_rounded() -> None:
    found = parse_settings("roundup_power2_divisions:[4:2,64:8]").roundup_divisions
    assert found == (2, 2, 2, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("colour:red", "unknown setting 'colour'; known: backend, expandable_segments"),
        ("expandable_segments", "wanted settings such as key:value"),
        ("expandable_segments:true", "wanted True or False, found 'true'"),
        ("max_split_size_mb:19", "wanted at least 20, found 19"),
        ("max_split_size_mb:x", "wanted a whole number, found 'x'"),
        ("garbage_collection_threshold:1", "between 0 and 1"),
        ("per_process_memory_fraction:nan", "from 0 to 1"),
        ("roundup_power2_divisions:3", "powers of two"),
        ("roundup_power2_divisions:[3:4]", "powers of two"),
        ("roundup_power2_divisions:[256]", "entries such as 256:4"),
        ("roundup_power2_divisions:[256:4", "key:value"),
        ("backend:cudaMallocAsync", "wanted native, found cudaMallocAsync"),
    ],
)
def test_what_torch_would_not_take_is_told(text: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        parse_settings(text)


def test_keys_of_another_version_are_passed_over_where_a_recording_has_them() -> None:
    text = "use_uvm:True,max_split_size_mb:32"
    assert parse_settings(text, strict=False).max_split_bytes == 32 * MIB
