"""Text to bytes and back; nothing else in the project reads or writes sizes as text."""

from __future__ import annotations

import re

from planner.errors import UnitsError

KIB, MIB, GIB = 2**10, 2**20, 2**30

MOST_BYTES = 2**60

_FACTORS = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": KIB,
    "MiB": MIB,
    "GiB": GIB,
    "TiB": 2**40,
}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([A-Za-z]{1,3})")


def parse_bytes(text: str, *, what: str = "size", or_none: bool = False) -> int:
    """`16GB` is 16 * 10**9 bytes, `6.5GiB` is 6.5 * 2**30, rounded down; a number without a unit is refused, and 0 unless `or_none`.

    Raises UnitsError naming `what`, the text found and the accepted form.
    """
    match = _SIZE.fullmatch(text.strip())
    factor = _FACTORS.get(match[2]) if match else None
    if match is None or factor is None:
        raise UnitsError(
            f"{what}: wanted a size such as 16GB (10^9 bytes) or 16GiB (2^30 bytes), found {text!r}; "
            f"units: {', '.join(_FACTORS)}"
        )
    whole, _, fraction = match[1].partition(".")
    # integers throughout, so that a size never depends on how a float rounds
    scale: int = 10 ** len(fraction)
    size_bytes = int(whole + fraction) * factor // scale
    if size_bytes <= 0 and not or_none:
        raise UnitsError(f"{what}: wanted a size above zero, found {text!r}")
    if size_bytes > MOST_BYTES:
        raise UnitsError(f"{what}: wanted a size of at most an exbibyte, found {text!r}")
    return size_bytes


def format_gib(size_bytes: int, *, digits: int = 2) -> str:
    """`5.59 GiB`, as torch reports sizes."""
    return f"{size_bytes / GIB:.{digits}f} GiB"


def format_mib(size_bytes: int, *, digits: int = 1) -> str:
    """`12.5 MiB`, for terms too small to show in GiB."""
    return f"{size_bytes / MIB:.{digits}f} MiB"


def format_gb_up(size_bytes: int) -> str:
    """The smallest `--vram` text with one decimal in GB that is not below `size_bytes`: `7.4GB`."""
    tenths = -(-size_bytes // 10**8)
    return f"{tenths // 10}.{tenths % 10}GB"


def format_seconds(seconds: float) -> str:
    """`0.27 s` or `93 ms` or `2 min 05 s`."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 99.5:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
