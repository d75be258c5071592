"""What every device owes the executor: the same tests on the plain CPU, on late queues, and on a card."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from executor.device import Chunk, Device
from executor.files import Files
from planner.errors import OutOfMemory
from planner.plan.program import HostUnit

SIZE = 256 * 1024


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A file of SIZE bytes, no two pages alike."""
    path = tmp_path / "weights"
    draws = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=draws)
    path.write_bytes(values.numpy().tobytes())
    return path


def test_a_chunk_lands_in_its_ranges_and_nowhere_else(device: Device, stored: Path) -> None:
    arena = device.allocate_arena(2 * SIZE)
    device.issue(lambda: arena.fill_(7))
    device.copy_waits(device.mark_compute())
    with closing(Files()) as files:
        device.fill(Chunk(stored, 100, ((4096, 70000), (SIZE, SIZE + 30000))), files)
        device.compute_waits(device.mark_copy())
        device.synchronize()
    found, wanted = arena[: 2 * SIZE].to("cpu"), stored.read_bytes()
    assert bytes(found[4096:70000].tolist()) == wanted[100 : 100 + 65904]
    assert bytes(found[SIZE : SIZE + 30000].tolist()) == wanted[66004 : 66004 + 30000]
    found[4096:70000] = found[SIZE : SIZE + 30000] = 7
    assert bool((found == 7).all())


def test_compute_that_waits_for_a_copy_sees_it_and_copies_that_wait_spoil_nothing(
    device: Device, stored: Path
) -> None:
    """One slot, filled again and again; each time compute takes its sum beside it."""
    rounds, width = 24, SIZE // 32
    arena = device.allocate_arena(width + 4096 + rounds * 8)
    slot = arena[:width]
    sums = arena[width + 4096 : width + 4096 + rounds * 8].view(torch.int64)
    issued = []
    with closing(Files()) as files:
        for number in range(rounds):
            if issued:
                device.copy_waits(issued[-1])
            device.fill(Chunk(stored, number * 4096, ((0, width),)), files)
            device.compute_waits(device.mark_copy())

            def add(number: int = number) -> None:
                torch.sum(slot, dim=0, dtype=torch.int64, out=sums[number])

            device.issue(add)
            issued.append(device.mark_compute())
        device.host_waits()
    data = torch.frombuffer(bytearray(stored.read_bytes()), dtype=torch.uint8)
    wanted = [int(data[n * 4096 : n * 4096 + width].sum()) for n in range(rounds)]
    assert sums.tolist() == wanted


def test_what_stays_in_host_memory_is_moved_from_there(device: Device, stored: Path) -> None:
    arena = device.allocate_arena(SIZE)
    tier = device.host_tier([HostUnit(unit="u", offset_bytes=512, size_bytes=50000)])
    chunk = Chunk(stored, 2048, ((0, 20000), (65536, 95536)))
    at = tier.start("u")
    with closing(Files()) as files:
        tier.read(at, chunk, files)
    for _ in range(2):
        device.issue(lambda: arena.fill_(0))
        device.copy_waits(device.mark_compute())
        device.move(tier.moves(at, chunk))
        device.compute_waits(device.mark_copy())
        device.synchronize()
        found, wanted = arena.to("cpu"), stored.read_bytes()
        assert bytes(found[:20000].tolist()) == wanted[2048:22048]
        assert bytes(found[65536:95536].tolist()) == wanted[22048:52048]


def test_time_goes_forward(device: Device) -> None:
    arena = device.allocate_arena(SIZE)
    start = device.tick()
    device.issue(lambda: arena.fill_(1))
    end = device.tick()
    device.synchronize()
    assert 0.0 <= device.seconds(start, end) < 10.0


def test_peaks_and_what_is_held_agree(device: Device) -> None:
    device.allocate_arena(SIZE)
    device.reset_peak()
    device.synchronize()
    held, peak = device.held_bytes(), device.peak_bytes()
    if held is None or peak is None:
        assert device.name == "hostile"
        return
    assert 0 < held
    # the counters of pages drift by some pages a core, and the context is another reading of them
    drift = 2**20
    assert peak >= held - drift
    context = device.context_bytes()
    assert context is not None
    assert 0 <= context <= held + drift


def test_an_arena_that_is_too_large_is_refused_with_the_numbers(device: Device) -> None:
    if device.name == "hostile":
        pytest.skip("its arena is a plain tensor")
    with pytest.raises(OutOfMemory, match=r"the arena needs 1048576.00 GiB.*free.*smaller budget"):
        device.allocate_arena(2**50)
