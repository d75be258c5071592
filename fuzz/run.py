"""Runs targets over numbered cases and says which of them ended in anything but an error of planner.errors.

A case is its target's name and number: the same on every machine with the same versions of what it reads with.
"""

from __future__ import annotations

import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Iterable
from random import Random
from typing import NamedTuple

from fuzz.target import Place
from fuzz.targets import TARGETS
from planner.errors import StowplanError
from planner.units import MIB

SECONDS = 5.0  # no case takes longer, on however slow a machine
WATCHED = 50  # every so many cases, what Python allocates is watched
BYTES_PER_BYTE, FREE_BYTES = (
    100,
    2 * 2**20,
)  # what a case may allocate: JSON makes some 60 bytes of `{},`

ROOM_BYTES = (
    128 * MIB
)  # beyond what a process has mapped once its target is ready; no input has 1 MB


class Finding(NamedTuple):
    target: str
    number: int
    what: str
    data: bytes


class Tally(NamedTuple):
    cases: int
    read: int  # without an error
    refused: Counter[str]  # by type of error
    seconds: float
    most_bytes_per_byte: float
    findings: list[Finding]


def case(target: str, number: int) -> Random:
    """Where the case's choices come from."""
    return Random(f"{target} {number}")


def run(target: str, numbers: Iterable[int], *, most_findings: int = 20) -> Tally:
    """What came of the target's cases of these numbers."""
    # Pillow and others warn of what they read; that is no finding
    warnings.simplefilter("ignore")
    place = Place()
    try:
        return _run(target, numbers, place, most_findings)
    finally:
        place.close()


def run_limited(target: str, first: int, stop: int) -> Tally:
    """One block, in a process that may not take much more memory than it has when it starts."""
    import os
    import resource

    import executor.image
    import executor.prepare
    import executor.record  # noqa: F401
    from executor.memory import data_bytes

    # libraries in C print what they find
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    run(target, range(first, first + 1))  # imports and makes what it needs
    mapped = data_bytes()
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    if mapped is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (mapped + ROOM_BYTES, limits[1]))
    try:
        return run(target, range(first, stop))
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def _run(name: str, numbers: Iterable[int], place: Place, most_findings: int) -> Tally:
    make, read = TARGETS[name](place)
    refused: Counter[str] = Counter()
    findings: list[Finding] = []
    seen: set[str] = set()
    cases = good = 0
    most = 0.0
    begin = time.perf_counter()
    for number in numbers:
        data = make(case(name, number))
        watched = number % WATCHED == 0
        if watched:
            tracemalloc.start()
        what, start = "", time.perf_counter()
        try:
            read(data)
            good += 1
        except StowplanError as error:
            refused[type(error).__name__] += 1
            what = _wordy(str(error), len(data))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            what = "".join(traceback.format_exception(error)[-6:])
        seconds = time.perf_counter() - start
        if watched:
            allocated = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            allowed = FREE_BYTES + BYTES_PER_BYTE * len(data)
            most = max(most, allocated / allowed)
            if allocated > allowed:
                what = what or f"allocated {allocated} bytes for {len(data)}"
        if seconds > SECONDS:
            what = what or f"took {seconds:.1f} s"
        cases += 1
        # one of a kind is enough: the same place in the code, whatever the input
        kind = what.rpartition(", line ")[0] or what
        if what and kind not in seen:
            seen.add(kind)
            findings.append(Finding(name, number, what, data))
            if len(findings) >= most_findings:
                break
    return Tally(cases, good, refused, time.perf_counter() - begin, most, findings)


def _wordy(message: str, size_bytes: int) -> str:
    """Nothing, if the message is fit for people: not empty, not endless, further lines indented."""
    if not message.strip():
        return "an error without words"
    if len(message) > 2000 + 4 * min(size_bytes, 4096):  # it may quote a name
        return f"an error of {len(message)} characters"
    return ""
