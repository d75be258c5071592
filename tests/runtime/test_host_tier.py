from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from executor.arena import Arena
from executor.cpu import CpuDevice
from executor.device import Chunk
from executor.files import Files
from executor.host_tier import HostTier
from executor.weights import Reader
from planner.errors import OutOfMemory
from planner.plan import Plan
from planner.plan.program import HostUnit

SIZE = 4096  # bytes of a unit of the streaming plan
KEPT = ("u0", "u1")  # those that prefill and decode bring


class CountingFiles(Files):
    """Notes where each read begins."""

    def __init__(self, log: list[int]) -> None:
        super().__init__()
        self._log = log

    def read(self, path: Path, offset_bytes: int, targets: Any) -> None:
        self._log.append(offset_bytes)
        super().read(path, offset_bytes, targets)


def kept_plan(plan: Plan) -> Plan:
    """The streaming plan with the units that come twice kept in host memory."""
    places = tuple(
        HostUnit(unit=unit, offset_bytes=i * SIZE, size_bytes=SIZE) for i, unit in enumerate(KEPT)
    )
    copies = tuple(
        copy.model_copy(update={"source": "host"})
        if copy.phase == "decode" and copy.unit in KEPT
        else copy
        for copy in plan.copies
    )
    return plan.model_copy(update={"host_units": places, "copies": copies})


def test_a_kept_unit_is_read_once_and_every_step_still_finds_its_weights(
    streaming: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[int] = []
    monkeypatch.setattr("executor.weights.weight_files", lambda *_: CountingFiles(log))
    plan = kept_plan(streaming.plan)
    device = CpuDevice()
    arena = Arena(plan, device)
    found = []
    with Reader(plan, device, streaming.locations, decode_iterations=3) as reader:
        rounds = [(step, 0) for step in plan.steps if step.phase == "prefill"]
        rounds += [(s, k) for k in range(3) for s in plan.steps if s.phase == "decode"]
        for step, iteration in rounds:
            reader.begin_step(step, iteration)
            found.append(float(arena.weights(step)["weight"].mean()))
            reader.finish_step(step)
    assert found == [1, 2] + [1, 2, 3, 4] * 3
    assert log == [0, SIZE] + [2 * SIZE, 3 * SIZE] * 3
    arena.close()
    device.close()


def test_bytes_of_a_unit_may_lie_across_pieces_and_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(200)))
    tier = HostTier(
        (HostUnit(unit="u", offset_bytes=50, size_bytes=120),),
        lambda size_bytes: torch.zeros(size_bytes, dtype=torch.uint8),
        piece_bytes=64,
    )
    files = Files()
    chunk = Chunk(path, 40, ((300, 310), (400, 510)))
    tier.read(tier.start("u"), chunk, files)
    files.close()
    moves = tier.moves(tier.start("u"), chunk)
    assert [stop - start for (start, stop), _ in moves] == [len(source) for _, source in moves]
    assert max(len(source) for _, source in moves) <= 64
    arena = torch.zeros(600, dtype=torch.uint8)
    for (start, stop), source in moves:
        arena[start:stop] = source
    assert arena[300:310].tolist() == list(range(40, 50))
    assert arena[400:510].tolist() == list(range(50, 160))


def test_refused_pinned_memory_says_what_was_wanted_and_what_to_do(tmp_path: Path) -> None:
    taken = []

    def pin(size_bytes: int) -> torch.Tensor:
        if taken:
            raise RuntimeError("cannot lock pages")
        taken.append(size_bytes)
        return torch.zeros(size_bytes, dtype=torch.uint8)

    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(100))
    tier = HostTier((HostUnit(unit="u", offset_bytes=0, size_bytes=100),), pin, piece_bytes=64)
    files = Files()
    with pytest.raises(OutOfMemory, match=r"pinned host memory.*cannot lock pages.*--ram"):
        tier.read(0, Chunk(path, 0, ((0, 100),)), files)
    files.close()
