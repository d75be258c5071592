from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from executor.arena import Arena
from executor.cpu import CpuDevice
from executor.device import Chunk
from executor.files import Files
from executor.weights import EmbeddingRows, Piece, Reader, chunks, pieces
from planner.errors import CheckpointError, RunFailed
from planner.plan import Plan
from planner.plan.shapes import TensorLocation


class SlowDevice(CpuDevice):
    """A CPU whose reads take `delay_s` longer, and which notes them."""

    def __init__(self, delay_s: float = 0.0) -> None:
        super().__init__()
        self.delay_s = delay_s
        self.read: list[int] = []

    def fill(self, chunk: Chunk, files: Files) -> None:
        time.sleep(self.delay_s)
        self.read.append(chunk.offset_bytes)
        super().fill(chunk, files)


def execute(
    plan: Plan, arena: Arena, reader: Reader, repeats: int, delay_s: float = 0.0
) -> list[float]:
    """What each step finds in its weights, in order; the answer is the sum over a slow step's whole duration."""
    found = []
    sequence = [(s, 0) for s in plan.steps if s.phase != "decode"]
    sequence += [(s, k) for k in range(repeats) for s in plan.steps if s.phase == "decode"]
    for step, iteration in sequence:
        reader.begin_step(step, iteration)
        weight = arena.weights(step)["weight"]
        first = weight.clone()
        time.sleep(delay_s)  # a copy that does not wait would overwrite the slot now
        assert torch.equal(first, weight)
        found.append(float(weight.mean()))
        reader.finish_step(step)
    return found


@pytest.mark.parametrize(("read_s", "compute_s"), [(0.0, 0.003), (0.003, 0.0), (0.0, 0.0)])
def test_every_step_finds_its_own_weights_however_slow_one_queue_is(
    streaming: Any, read_s: float, compute_s: float
) -> None:
    device = SlowDevice(read_s)
    arena = Arena(streaming.plan, device)
    with Reader(streaming.plan, device, streaming.locations, decode_iterations=3) as reader:
        found = execute(streaming.plan, arena, reader, 3, compute_s)
    assert found == [1, 2] + [1, 2, 3, 4] * 3
    size = 4096
    assert device.read == [i * size for i in [0, 1] + [0, 1, 2, 3] * 3]
    timing = reader.timings()["copy:decode/3"]
    assert (timing.runs, timing.size_bytes) == (3, 3 * size)
    arena.close()
    device.close()


def test_a_slot_is_refilled_only_after_the_step_that_used_it(streaming: Any) -> None:
    device = SlowDevice()
    Arena(streaming.plan, device)
    steps = streaming.plan.steps
    with Reader(streaming.plan, device, streaming.locations, decode_iterations=2) as reader:
        time.sleep(0.05)
        # nothing of decode: its first copies wrap, so they wait for the end of prefill
        assert len(device.read) == 2
        reader.begin_step(steps[0])
        reader.finish_step(steps[0])
        time.sleep(0.05)
        assert len(device.read) == 2
        reader.begin_step(steps[1])
        reader.finish_step(steps[1])
        reader.begin_step(steps[2])
        time.sleep(0.05)
        assert len(device.read) == 4
        reader.finish_step(steps[2])  # decode/0 frees slot 0 for unit 2
        time.sleep(0.05)
        assert len(device.read) == 5


def test_held_copies_begin_when_they_are_let_go_and_those_that_the_first_step_waits_for_before(
    streaming: Any,
) -> None:
    device = SlowDevice()
    arena = Arena(streaming.plan, device)
    with Reader(
        streaming.plan, device, streaming.locations, decode_iterations=3, hold=True
    ) as reader:
        reader.begin_step(streaming.plan.steps[0])
        time.sleep(0.05)
        assert device.read == [0]
        assert reader.copied_bytes() == 4096
        reader.let_go()
        assert execute(streaming.plan, arena, reader, 3) == [1, 2] + [1, 2, 3, 4] * 3


def test_a_reader_whose_copies_are_still_held_ends(streaming: Any) -> None:
    device = SlowDevice()
    Arena(streaming.plan, device)
    with Reader(
        streaming.plan, device, streaming.locations, decode_iterations=3, hold=True
    ) as reader:
        reader.begin_step(streaming.plan.steps[0])
    assert device.read == [0]
    assert not reader._thread.is_alive()


def test_a_copy_marked_once_runs_in_the_first_iteration_only(parts: Any, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(bytes(1024))
    locations = {"w": TensorLocation(tmp_path / "w", 0, 1024, (256,), "float32")}
    steps = [
        parts.step("prefill/a"),
        parts.step("decode/a", unit="u", weights="b", waits=("copy:decode/a",)),
    ]
    plan = parts.plan(
        steps=steps,
        copies=[parts.copy("decode/a", "u", "b", after="prefill/a", once=True)],
        units=[parts.unit("u", ("w", "weight", (256,), 0))],
        buffers=[parts.buffer("b", 0, 1024, kind="weights")],
        decode_repeats=3,
    )
    device = SlowDevice()
    Arena(plan, device)
    with Reader(plan, device, locations, decode_iterations=3) as reader:
        reader.finish_step(steps[0])
        for iteration in range(3):
            reader.begin_step(steps[1], iteration)
            reader.finish_step(steps[1])
    assert len(device.read) == 1


def test_stopping_early_ends_the_thread_and_closes_its_files(streaming: Any) -> None:
    device = SlowDevice()
    arena = Arena(streaming.plan, device)
    with Reader(streaming.plan, device, streaming.locations, decode_iterations=10**6) as reader:
        execute(streaming.plan, arena, reader, 2)
        reader.stop()
    assert not reader._thread.is_alive()
    assert not reader._files._handles


def test_an_interrupt_in_a_step_ends_the_thread(streaming: Any) -> None:
    device = SlowDevice()
    Arena(streaming.plan, device)

    def interrupted(reader: Reader) -> None:
        with reader:
            reader.begin_step(streaming.plan.steps[0])
            raise KeyboardInterrupt

    reader = Reader(streaming.plan, device, streaming.locations, decode_iterations=3)
    with pytest.raises(KeyboardInterrupt):
        interrupted(reader)
    assert not reader._thread.is_alive()
    assert "stowplan-reader" not in {thread.name for thread in threading.enumerate()}


def test_a_file_cut_off_while_it_is_read_is_named(streaming: Any) -> None:
    device = SlowDevice(0.01)
    arena = Arena(streaming.plan, device)
    with Reader(streaming.plan, device, streaming.locations, decode_iterations=3) as reader:
        with open(streaming.path, "r+b") as file:
            file.truncate(9000)
        with pytest.raises(CheckpointError, match=r"weights\.bin: the file ends at byte 9000"):
            execute(streaming.plan, arena, reader, 3)
    assert not reader._thread.is_alive()


def test_a_file_that_is_gone_is_named(streaming: Any) -> None:
    device = SlowDevice()
    arena = Arena(streaming.plan, device)
    streaming.path.unlink()
    with pytest.raises(CheckpointError, match=r"weights\.bin: cannot be opened: No such file"):
        with Reader(streaming.plan, device, streaming.locations, decode_iterations=3) as reader:
            execute(streaming.plan, arena, reader, 3)


def test_an_error_of_another_kind_in_the_thread_fails_the_run(streaming: Any) -> None:
    class Broken(SlowDevice):
        def fill(self, chunk: Chunk, files: Files) -> None:
            raise ValueError("odd")

    device = Broken()
    arena = Arena(streaming.plan, device)
    with pytest.raises(RunFailed, match="the reader of weights failed: odd"):
        with Reader(streaming.plan, device, streaming.locations, decode_iterations=3) as reader:
            execute(streaming.plan, arena, reader, 3)


def test_a_wait_for_a_copy_that_never_comes_ends_the_run(streaming: Any) -> None:
    device = SlowDevice()
    arena = Arena(streaming.plan, device)
    with pytest.raises(RunFailed, match="decode/0: waits for copy:decode/0, which will not come"):
        with Reader(streaming.plan, device, streaming.locations, decode_iterations=1) as reader:
            execute(streaming.plan, arena, reader, 2)


def test_a_step_and_a_copy_exclude_one_another_in_check_runs(streaming: Any) -> None:
    device = SlowDevice()
    Arena(streaming.plan, device)
    reader = Reader(streaming.plan, device, streaming.locations, decode_iterations=1, alone=True)
    with reader:
        with reader.alone:
            seen = len(device.read)
            time.sleep(0.05)
            assert len(device.read) == seen
        time.sleep(0.05)
        assert len(device.read) == 2


@pytest.mark.parametrize("plain", [False, True])
def test_short_reads_are_continued_and_plain_reads_do_where_preadv_is_missing(
    streaming: Any, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    if plain:
        monkeypatch.delattr(os, "preadv")
    else:
        real = os.preadv

        def short(handle: int, views: list[memoryview], offset: int) -> int:
            return real(handle, [views[0][:1000]], offset)

        monkeypatch.setattr(os, "preadv", short)
    device = CpuDevice()
    arena = Arena(streaming.plan, device)
    with Reader(streaming.plan, device, streaming.locations, decode_iterations=1) as reader:
        assert execute(streaming.plan, arena, reader, 1) == [1, 2, 1, 2, 3, 4]
    target = bytearray(9000)
    files = Files()
    view = memoryview(target)
    files.read(streaming.path, 0, [view[5000:], view[:0], view[:5000]])
    files.close()
    stored = streaming.path.read_bytes()
    assert bytes(target) == stored[4000:9000] + stored[:4000]


def test_neighbours_in_a_file_are_read_together_up_to_the_limit() -> None:
    path = Path("f")
    parts = [
        Piece(path, 100, 0, 50),
        Piece(path, 0, 512, 100),
        Piece(path, 200, 1024, 30),
    ]
    assert chunks(parts, 1000) == [
        Chunk(path, 0, ((512, 612), (0, 50))),
        Chunk(path, 200, ((1024, 1054),)),
    ]
    assert chunks(parts, 60) == [
        Chunk(path, 0, ((512, 572),)),
        Chunk(path, 60, ((572, 612), (0, 20))),
        Chunk(path, 120, ((20, 50),)),
        Chunk(path, 200, ((1024, 1054),)),
    ]


def test_a_row_tile_is_read_from_its_rows(parts: Any) -> None:
    unit = parts.unit("u", ("w", "weight", (2, 8), 64))
    tensor = unit.tensors[0].model_copy(update={"row_start": 3, "row_stop": 5})
    unit = unit.model_copy(update={"tensors": (tensor,)})
    buffer = parts.buffer("b", 4096, 512)
    locations = {"w": TensorLocation(Path("f"), 1000, 10 * 32, (10, 8), "float32")}
    assert pieces(unit, buffer, locations) == [Piece(Path("f"), 1000 + 3 * 32, 4096 + 64, 64)]


@pytest.mark.parametrize(
    ("location", "words"),
    [
        (None, "no tensor w, which u needs"),
        (TensorLocation(Path("f"), 0, 32, (1, 8), "float32"), "the checkpoint has 1"),
        (
            TensorLocation(Path("f"), 0, 32, (2, 8), "bfloat16"),
            "wants 64 bytes, the checkpoint has 32",
        ),
    ],
)
def test_a_tensor_of_another_shape_is_refused_before_anything_is_read(
    parts: Any, location: TensorLocation | None, words: str
) -> None:
    unit = parts.unit("u", ("w", "weight", (2, 8), 0))
    locations = {"w": location} if location else {}
    with pytest.raises(CheckpointError, match=words):
        pieces(unit, parts.buffer("b", 0, 512), locations)


def test_embedding_rows_come_from_the_file_in_the_order_asked_for(tmp_path: Path) -> None:
    table = torch.randn(300, 8).to(torch.bfloat16)
    path = tmp_path / "w"
    path.write_bytes(b"head" + table.view(torch.uint8).numpy().tobytes())
    name = "model.embed_tokens.weight"
    rows = EmbeddingRows(
        {name: TensorLocation(path, 4, table.numel() * 2, (300, 8), "bfloat16")}, (300, 8)
    )
    ids = torch.randint(0, 300, (600,))
    out = torch.zeros(600, 8, dtype=torch.bfloat16)
    rows(ids, out)
    assert torch.equal(out, table[ids])
    spread = torch.zeros(3, 16, dtype=torch.bfloat16)[:, ::2]
    rows([5, 0, 5], spread)
    assert torch.equal(spread, table[[5, 0, 5]])
    rows.close()
    assert not rows._files._handles
