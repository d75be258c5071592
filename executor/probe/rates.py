"""Bytes per second of memory and files."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from executor import memory
from executor.files import Files, readers_beside_a_card
from executor.probe.bench import Bench, best, pages, typical
from executor.probe.beside import Shared, beside
from executor.weights import READ_BYTES
from planner.units import MIB


class Rates(NamedTuple):
    """Bytes per second of memory and files; 0 or None where nothing could be measured."""

    host_to_device: int
    pageable: int | None  # a card: from memory that is not pinned
    page_cache: int
    disk: int | None
    readers: int  # threads that read files together
    first_touch: int
    beside: Shared


def measured_rates(bench: Bench, folder: Path | None, size_bytes: int) -> Rates:
    """Copies, page cache, disk, new pages."""
    size_bytes = min(size_bytes, bench.memory.numel())
    pageable = None
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as file:
        piece = os.urandom(MIB)
        for _ in range(size_bytes // MIB):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        host, readers = bench.memory[:size_bytes], 1
        if bench.device.type == "cuda":
            host, readers = torch.empty(size_bytes, dtype=torch.uint8), readers_beside_a_card()
        with closing(Files(readers)) as files:
            reads = partial(_read, files, Path(file.name), host)
            disk = _cold(file.fileno(), reads, size_bytes)
            page_cache = typical(reads, size_bytes, 7)
        to_device = page_cache
        shared = beside(bench, file.fileno(), host, page_cache)
        if bench.device.type == "cuda":
            pageable = _transfer(bench, host)
            to_device = _transfer(bench, host.pin_memory())
    touch = 0 if bench.device.type == "cuda" else _first_touch(size_bytes)
    return Rates(to_device, pageable, page_cache, disk, readers, touch, shared)


def _read(files: Files, path: Path, target: Tensor) -> None:
    view = memoryview(target.numpy())  # type: ignore[arg-type]
    for start in range(0, len(view), READ_BYTES):
        files.read(path, start, [view[start : start + READ_BYTES]])


def _cold(handle: int, reads: Callable[[], None], size_bytes: int) -> int | None:
    """Bytes per second of a file that is not in the page cache; None where it cannot be put out of it."""
    if not hasattr(os, "posix_fadvise"):
        return None
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    return best(reads, size_bytes, 1)


def _transfer(bench: Bench, host: Tensor) -> int:
    """Bytes per second of one large copy to the card."""
    target = bench.memory[: host.numel()]

    def call() -> None:
        target.copy_(host, non_blocking=True)
        bench.synchronize()

    call()
    return best(call, host.numel(), 5)


def _first_touch(size_bytes: int) -> int:
    """Bytes per second of writing to new pages, beyond the writing itself."""
    times = []
    for _ in range(5):
        mapping = pages(size_bytes)
        fresh = torch.frombuffer(mapping, dtype=torch.uint8)
        # one thread, as the reader is
        laps = []
        for _ in range(2):
            start = time.perf_counter()
            fresh[:: memory.PAGE_BYTES] = 1
            laps.append(time.perf_counter() - start)
        times.append(max(laps[0] - laps[1], 1e-9))
        del fresh
        mapping.close()
    return round(size_bytes / statistics.median(times))
