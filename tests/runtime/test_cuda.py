"""What of the CUDA device can be tried without a card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from executor.arena import sum_of
from executor.cuda import CudaDevice
from executor.device import Chunk
from executor.queues import pieces_of
from planner.errors import RunFailed


@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 100, 1000])
def test_pinned_pieces_bring_every_byte_to_its_place(piece_bytes: int) -> None:
    stored = bytes(range(200))
    chunk = Chunk(Path("f"), 30, ((100, 164), (0, 36), (300, 301)))
    arena = bytearray(400)
    for part in pieces_of(chunk, piece_bytes):
        assert part.size_bytes <= piece_bytes
        piece = stored[part.offset_bytes : part.offset_bytes + part.size_bytes]
        for at, start, stop in part.moves:
            arena[start:stop] = piece[at : at + stop - start]
    assert arena[100:164] == stored[30:94]
    assert arena[0:36] == stored[94:130]
    assert arena[300:301] == stored[130:131]
    assert sum(arena) == sum(stored[30:131])


@pytest.mark.parametrize(("start", "stop"), [(0, 64), (3, 61), (5, 7), (8, 8), (12, 20)])
def test_the_sum_that_guards_a_range_begins_anywhere_and_sees_every_byte(
    start: int, stop: int
) -> None:
    """A buffer's end is the start of what a step must not change, and need not be a multiple of eight."""
    memory = torch.arange(64, dtype=torch.uint8)
    before = sum_of(memory[start:stop])
    for at in range(64):
        memory[at] += 1
        assert (sum_of(memory[start:stop]) != before) is (start <= at < stop)
        memory[at] -= 1


@pytest.mark.parametrize(
    ("cuda", "rocm", "card", "said"),
    [
        (None, None, False, "built without CUDA; install a CUDA build"),
        ("12.8", None, False, "CUDA 12.8.* finds no card or no driver"),
        (None, "6.4", True, "built for ROCm 6.4, plans are for CUDA; install a CUDA build"),
        (None, "6.4", False, "built for ROCm 6.4"),
    ],
)
def test_a_torch_that_runs_no_cuda_is_refused_with_what_to_do(
    cuda: str | None, rocm: str | None, card: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", rocm)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
    with pytest.raises(RunFailed, match=f"--device cuda: .*{said}.*or run with --device cpu"):
        CudaDevice()
