"""How much steps and a reader of files slow one another down on the CPU, where they share the cores."""

from __future__ import annotations

import os
import queue
import statistics
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from executor.attention import attend
from executor.ops import linear, rms_norm
from executor.probe.bench import SHORT, Bench
from executor.threads import start_thread
from executor.weights import READ_BYTES
from planner.units import MIB

Block = Callable[[], None]


class Shared(NamedTuple):
    """Speeds while both run, in proportion to each alone. `favoured`: of steps, while the reader reads a unit after a rest."""

    compute: float
    copy: float
    favoured: float | None = None


def beside(bench: Bench, handle: int, target: Tensor, rate: int) -> Shared:
    """How fast steps and a reader are together; a card's do not share anything. `rate`: bytes per second of the reader alone."""
    if bench.device.type != "cpu":
        return Shared(1.0, 1.0)
    if not hasattr(os, "preadv"):
        return Shared(0.5, 1.0)
    short = bench.sizes is SHORT
    # a block of a vision tower, and one of a language model with the rows of a small image
    long = _block(bench, *((256, 64, 4) if short else (1024, 1280, 16)))
    quick = _block(bench, *((64, 64, 4) if short else (256, 1024, 8)))
    rounds = 1 if short else 7
    view = memoryview(target.numpy())  # type: ignore[arg-type]
    unit = min(len(view), MIB if short else 24 * MIB)
    always = [_reading(long, 5 if short else 24, handle, view, rate) for _ in range(rounds)]
    bursts = [_bursts(quick, 5 if short else 40, handle, view, unit) for _ in range(2 * rounds + 1)]
    compute, copy = (statistics.median(share) for share in zip(*always, strict=True))
    favoured = statistics.median(bursts)
    return Shared(_share(compute), _share(copy), round(min(compute, max(-1.0, favoured)), 3))


def _share(found: float) -> float:
    return round(min(1.0, max(0.01, found)), 3)


def _block(bench: Bench, rows: int, width: int, heads: int) -> Block:
    """What a block does: calls of all sizes, between which cores wait for each other."""
    x, y, out = (bench.numbers(rows, width, dtype=torch.bfloat16) for _ in range(3))
    wide = [bench.numbers(rows, 3 * width, dtype=torch.bfloat16) for _ in range(2)]
    up = bench.numbers(3 * width, width, dtype=torch.bfloat16)
    down = bench.numbers(width, 3 * width, dtype=torch.bfloat16)
    ones, norm32 = torch.ones(width, dtype=torch.bfloat16), torch.empty(256, width)
    qkv = wide[0].view(rows // 64, 64, 3, heads, width // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def work() -> None:
        rms_norm(x, ones, y, scratch=norm32, eps=1e-6)
        linear(y, up, None, out=wide[0])
        attend(q, k, v, kernel=bench.kernel, scale=0.1)
        linear(y, up, None, out=wide[1])
        torch.ops.aten.silu_(wide[1])
        wide[1].mul_(wide[0])
        linear(wide[1], down, None, out=out)
        y.add_(out)

    return work


def _seconds(block: Block, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        block()
    return time.perf_counter() - start


def _reading(
    block: Block, count: int, handle: int, view: memoryview, rate: int
) -> tuple[float, float]:
    """Shares of steps and of a reader that never rests."""
    _seconds(block, 2)
    alone = _seconds(block, count)
    moved, stop = [0], threading.Event()

    def read() -> None:
        while not stop.is_set():
            for start in range(0, len(view), READ_BYTES):
                if stop.is_set():
                    return
                moved[0] += os.preadv(handle, [view[start : start + READ_BYTES]], start)

    reader = threading.Thread(target=read)
    start_thread(reader, "a reader beside steps")
    both = _seconds(block, count)
    stop.set()
    reader.join()
    return alone / both, moved[0] / rate / both


def _bursts(block: Block, count: int, handle: int, view: memoryview, unit: int) -> float:
    """The share of steps while a reader reads that has waited for them: a unit with each block, as when slots are full."""
    _seconds(block, 2)
    alone = _seconds(block, count)
    wanted: queue.Queue[bool] = queue.Queue()
    reading = [0.0]

    def read() -> None:
        place = 0
        while wanted.get():
            place = place + unit if place + 2 * unit <= len(view) else 0
            start = time.perf_counter()
            os.preadv(handle, [view[place : place + unit]], place)
            reading[0] += time.perf_counter() - start

    def step() -> None:
        wanted.put(True)
        block()

    reader = threading.Thread(target=read)
    start_thread(reader, "a reader beside steps")
    both = _seconds(step, count)
    wanted.put(False)
    reader.join()
    return 1.0 - (both - alone) / max(reading[0], 1e-9)
