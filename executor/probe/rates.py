"""Bytes per second of memory and files, and how much steps and copies slow one another down."""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from executor import memory
from executor.attention import attend
from executor.files import Files, readers_beside_a_card
from executor.ops import linear, rms_norm
from executor.probe.bench import SHORT, Bench, best, pages, typical
from executor.threads import start_thread
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
    beside: tuple[float, float]


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
        beside = _beside(bench, file.fileno(), host, page_cache)
        if bench.device.type == "cuda":
            pageable = _transfer(bench, host)
            to_device = _transfer(bench, host.pin_memory())
    touch = 0 if bench.device.type == "cuda" else _first_touch(size_bytes)
    return Rates(to_device, pageable, page_cache, disk, readers, touch, beside)


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


def _beside(bench: Bench, handle: int, target: Tensor, rate: int) -> tuple[float, float]:
    """How fast steps and a reader are while both run, in proportion to each alone; a card's do not share anything."""
    if bench.device.type != "cpu":
        return 1.0, 1.0
    rows, width, heads = (256, 64, 4) if bench.sizes is SHORT else (1024, 1280, 16)
    count = 5 if bench.sizes is SHORT else 24
    x, y, out = (bench.numbers(rows, width, dtype=torch.bfloat16) for _ in range(3))
    wide = [bench.numbers(rows, 3 * width, dtype=torch.bfloat16) for _ in range(2)]
    up = bench.numbers(3 * width, width, dtype=torch.bfloat16)
    down = bench.numbers(width, 3 * width, dtype=torch.bfloat16)
    ones, norm32 = torch.ones(width, dtype=torch.bfloat16), torch.empty(256, width)
    qkv = wide[0].view(rows // 64, 64, 3, heads, width // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def work() -> float:
        """What a block of the vision tower does: many calls of all sizes, between which cores wait for each other."""
        start = time.perf_counter()
        for _ in range(count):
            rms_norm(x, ones, y, scratch=norm32, eps=1e-6)
            linear(y, up, None, out=wide[0])
            attend(q, k, v, kernel=bench.kernel, scale=0.1)
            linear(y, up, None, out=wide[1])
            torch.ops.aten.silu_(wide[1])
            wide[1].mul_(wide[0])
            linear(wide[1], down, None, out=out)
            y.add_(out)
        return time.perf_counter() - start

    work()
    shares = []
    for _ in range(1 if bench.sizes is SHORT else 7):
        alone = work()
        moved, stop = [0], threading.Event()

        def read(moved: list[int] = moved, stop: threading.Event = stop) -> None:
            view = memoryview(target.numpy())  # type: ignore[arg-type]
            while not stop.is_set():
                for start in range(0, len(view), READ_BYTES):
                    if stop.is_set():
                        return
                    moved[0] += os.preadv(handle, [view[start : start + READ_BYTES]], start)

        if not hasattr(os, "preadv"):
            return 0.5, 1.0
        reader = threading.Thread(target=read)
        start_thread(reader, "a reader beside steps")
        beside = work()
        stop.set()
        reader.join()
        shares.append((alone / beside, moved[0] / rate / beside))
    found = (statistics.median(share) for share in zip(*shares, strict=True))
    compute, copy = (round(min(1.0, max(0.01, share)), 3) for share in found)
    return compute, copy
