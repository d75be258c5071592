"""Sizes as text: what is accepted, what is refused, and how sizes and seconds are shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import UnitsError
from planner.units import (
    format_gb_up,
    format_gib,
    format_mib,
    format_seconds,
    parse_bytes,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("16GB", 16 * 10**9),
        ("16GiB", 16 * 2**30),
        ("6.5GiB", 13 * 2**29),
        (" 512 MiB ", 2**29),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("1B", 1),
        ("0.1GB", 10**8),  # 0.1 is no binary fraction: integers must be exact
        ("1.1GB", 1_100_000_000),
        ("0.000001GB", 1000),
        ("2TiB", 2**41),
        ("1.5B", 1),
    ],
)
def test_a_size_with_a_unit_is_read_exactly(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        *("16", "16G", "16gb", "16Gb", "16GIB", "GB", "", "-1GB", "+1GB", "1e9B", "1,5GB"),
        *(
            "0GB",
            "0.4B",
            "1 000MB",
            "16GB16GB",
            ".5GB",
            "5.GB",
            "\uff11\uff16GB",
            "16\nGB",
            "16GB\n1GB",
            "inf GB",
        ),
        *("9999999999GB", "1.0000001GB", "nan", "16  GB"),
    ],
)
def test_a_size_without_an_accepted_unit_is_refused(text: str) -> None:
    with pytest.raises(UnitsError, match="--vram: wanted a size"):
        parse_bytes(text, what="--vram")


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_units_error(text: str) -> None:
    try:
        size_bytes = parse_bytes(text)
    except UnitsError:
        return
    assert size_bytes > 0


def test_sizes_are_shown_in_binary_units() -> None:
    assert format_gib(16 * 10**9) == "14.90 GiB"
    assert format_gib(0) == "0.00 GiB"
    assert format_mib(13_107_200) == "12.5 MiB"


@given(st.integers(1, 10**14))
def test_a_suggested_budget_is_never_below_the_need(size_bytes: int) -> None:
    suggested = parse_bytes(format_gb_up(size_bytes))
    assert size_bytes <= suggested < size_bytes + 10**8


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ms"),
        (0.093, "93 ms"),
        (0.0994, "99 ms"),
        (0.0996, "0.10 s"),
        (0.27, "0.27 s"),
        (9.994, "9.99 s"),
        (9.996, "10.0 s"),
        (99.4, "99.4 s"),
        (99.6, "1 min 40 s"),
        (119.7, "2 min 00 s"),
        (125.0, "2 min 05 s"),
        (5025.0, "83 min 45 s"),
    ],
)
def test_seconds_are_shown_in_the_unit_that_reads_best(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
