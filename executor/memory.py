"""Readings of this process's memory from /proc, and the few switches of malloc and the kernel that make them exact.

Every reading is None where the system has no /proc (macOS, Windows); callers say so in a note and go on.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from planner.errors import OutOfMemory
from planner.units import KIB, format_gib

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
THRESHOLD_BYTES = 64 * KIB
_PROC = Path("/proc/self")


class HostMemory(NamedTuple):
    """What the process holds: now, at most since the last reset, and the two parts of now."""

    rss_bytes: int
    peak_bytes: int  # VmHWM
    anonymous_bytes: int  # RssAnon
    file_bytes: int  # RssFile: code and mapped files


def read_memory() -> HostMemory | None:
    """VmRSS, VmHWM, RssAnon and RssFile in bytes; None where /proc lacks them."""
    fields = _status_fields()
    try:
        return HostMemory(
            fields["VmRSS"], fields["VmHWM"], fields["RssAnon"], fields.get("RssFile", 0)
        )
    except KeyError:
        return None


def reset_peak() -> bool:
    """True where VmHWM now starts anew from VmRSS; False where the kernel does not offer it."""
    try:
        # no buffering: the write must reach the kernel before the next reading; and no file made where none is
        handle = os.open(_PROC / "clear_refs", os.O_WRONLY)
        try:
            os.write(handle, b"5")
        finally:
            os.close(handle)
    except OSError:
        return False
    return True


def data_bytes() -> int | None:
    """VmData: private writable mappings, what RLIMIT_DATA counts; None where /proc lacks it."""
    return _status_fields().get("VmData")


def process_age_s() -> float:
    """Seconds since this process was started; 0 where /proc lacks it."""
    stat, uptime = _lines(_PROC / "stat"), _lines(Path("/proc/uptime"))
    if not stat or not uptime:
        return 0.0
    # proc(5): field 22 of stat is the start in clock ticks; the name, field 2, may hold spaces
    started = int(stat[0].rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, float(uptime[0].split()[0]) - started)


def available_bytes() -> int | None:
    """Bytes that the system, or this process's control group, could still give; None where neither says."""
    limits = []
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * KIB)
    group = _cgroup()
    if group is not None:
        try:
            most = (group / "memory.max").read_text().strip()
            if most != "max":
                used = int((group / "memory.current").read_text())
                stat = dict(line.split() for line in _lines(group / "memory.stat"))
                limits.append(int(most) - used + int(stat.get("inactive_file", 0)))
        except (OSError, ValueError):
            pass  # a group without a limit of its own
    return max(0, min(limits)) if limits else None


def fix_malloc_thresholds() -> bool:
    """True where glibc's malloc now maps blocks from 64 KiB on and gives them back when freed.

    With the default, dynamic thresholds freed blocks of up to 32 MiB stay in the heap, and VmHWM passes the sum of
    live bytes by 40 to 140 MiB.
    """
    mallopt = _libc_function("mallopt")
    if mallopt is None:
        return False
    # 1 is success (mallopt(3))
    return all(
        mallopt(option, THRESHOLD_BYTES) == 1 for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)
    )


def malloc_trim() -> bool:
    """True where glibc looked for free heap pages to give back."""
    trim = _libc_function("malloc_trim")
    if trim is None:
        return False
    trim(0)
    return True


def limit_data(limit_bytes: int) -> int:
    """The soft RLIMIT_DATA that held before; from now on private writable mappings may not pass `limit_bytes`."""
    if resource is None:
        raise OutOfMemory("a limit on data was asked for, but this system has no RLIMIT_DATA")
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard))
    except (OSError, ValueError) as error:
        raise OutOfMemory(
            f"a limit of {format_gib(limit_bytes)} on data could not be set: {error}"
        ) from None
    return before


def lift_limit(before: int) -> None:
    """Put the soft RLIMIT_DATA back to what `limit_data` found."""
    if resource is not None:
        resource.setrlimit(
            resource.RLIMIT_DATA, (before, resource.getrlimit(resource.RLIMIT_DATA)[1])
        )


@lru_cache(maxsize=1)
def libc() -> ctypes.CDLL:
    """The C library. Once: each CDLL brings classes of its own, which wait long for the collector of cycles."""
    return ctypes.CDLL(None)


def _libc_function(name: str) -> ctypes._NamedFuncPointer | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = getattr(libc(), name)
    except (OSError, AttributeError):  # musl has neither
        return None
    # musl defines no gnu_get_libc_version; its mallopt, where a shim offers one, means nothing
    return function if hasattr(libc(), "gnu_get_libc_version") else None


def _status_fields() -> dict[str, int]:
    fields = {}
    for line in _lines(_PROC / "status"):
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
            fields[name] = int(words[0]) * KIB
    return fields


def _cgroup() -> Path | None:
    """This process's folder in the unified hierarchy."""
    for line in _lines(_PROC / "cgroup"):
        if line.startswith("0::"):
            return Path("/sys/fs/cgroup") / line[3:].strip().lstrip("/")
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4 * KIB
