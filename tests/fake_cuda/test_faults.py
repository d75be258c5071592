"""A card that fails, that was used before, or on which other programs come and go."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

from executor import cuda_errors
from executor.prepare import memory_errors
from planner.errors import OutOfMemory, RunFailed
from planner.units import GIB, MIB
from tests.fake_cuda.card import CONTEXT_BYTES, FakeCard

ILLEGAL = "CUDA error: an illegal memory access was encountered\nCompile with ..."


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (RuntimeError(ILLEGAL), RunFailed, "norm: the card failed: CUDA error: an illegal memory"),
        (RuntimeError("CUDA error: out of memory"), OutOfMemory, "no room left beside the arena"),
        (RuntimeError("CUDA driver error: out of memory"), OutOfMemory, "close other programs"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            OutOfMemory,
            "smaller budget",
        ),
        (
            RuntimeError("CUDA error: no kernel image is available for execution on the device"),
            RunFailed,
            "has no code for this card",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), OutOfMemory, "norm: memory was"),
        (torch.AcceleratorError("in other words"), RunFailed, "the card failed: in other words"),
    ],
)
def test_what_torch_raises_for_a_card_becomes_one_line(
    error: RuntimeError, kind: type[RunFailed], words: str
) -> None:
    with pytest.raises(kind, match=words) as found, memory_errors("norm"):
        raise error
    assert type(found.value) is kind
    assert "\n" not in str(found.value)


def test_a_mistake_of_our_own_is_not_blamed_on_the_card() -> None:
    mistake = RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")
    assert cuda_errors.typed("norm", mistake) is None
    with pytest.raises(RuntimeError, match="must match"), memory_errors("norm"):
        raise mistake


@pytest.mark.parametrize("fails", [False, True])
def test_pinned_pieces_are_given_back_unless_the_card_failed(fails: bool) -> None:
    """Freeing one asks the card, inside a destructor: where it fails the process ends there."""
    from executor.cuda import CudaDevice

    card = FakeCard("12.0", 16 * GIB, nvml="process")
    with card.installed():
        device = CudaDevice()
        device.allocate_arena(64 * MIB)
        device.cap(2 * GIB)
        pinned = [weakref.ref(piece) for piece in device.pinned()]
        assert len(pinned) == 3
        failing = mock.patch.object(torch.cuda, "synchronize", side_effect=RuntimeError(ILLEGAL))
        with failing if fails else nullcontext():
            device.close()  # no second error
        del failing  # its error knows the frames
        gc.collect()
        assert [piece() is None for piece in pinned] == [not fails] * 3
        assert (card.fraction == 1.0) is not fails
        assert device.pinned() == ()


def test_the_second_run_of_a_process_counts_the_context_too() -> None:
    from executor.cuda import CudaDevice

    card = FakeCard("12.0", 16 * GIB, others_bytes=GIB, nvml="card")
    with card.installed():
        for _ in range(2):
            device = CudaDevice()
            device.allocate_arena(64 * MIB)
            assert device.context_bytes() == CONTEXT_BYTES
            device.close()


def test_what_others_free_meanwhile_ends_no_run() -> None:
    from executor.cuda import CudaDevice

    card = FakeCard("12.0", 16 * GIB, others_bytes=2 * GIB, nvml="card")
    with card.installed():
        device = CudaDevice()
        device.allocate_arena(64 * MIB)
        before = device.peak_bytes()
        card.others_bytes = 0
        device.reset_peak()
        assert device.peak_bytes() == 64 * MIB < before  # what the allocator holds, at least
        device.close()


def test_an_arena_beyond_what_is_free_is_not_even_asked_for() -> None:
    """Some drivers would give it, in host memory."""
    from executor.cuda import CudaDevice

    card = FakeCard("12.0", 16 * GIB, others_bytes=8 * GIB)
    asked: list[Any] = []
    with card.installed():
        device = CudaDevice()
        with (
            mock.patch.object(torch, "empty", side_effect=asked.append),
            pytest.raises(OutOfMemory, match=r"needs 9.00 GiB; the card has 7.51 GiB"),
        ):
            device.allocate_arena(9 * GIB)
        assert asked == []
        device.close()
