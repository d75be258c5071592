from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from executor.arena import GUARD_EDGE_BYTES, Arena, check_places, complement
from executor.cpu import CpuDevice
from executor.memory import read_memory
from planner.errors import OutOfMemory, PlanFileError, RunFailed
from planner.units import MIB

pytestmark = pytest.mark.skipif(read_memory() is None, reason="needs /proc")


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    device = CpuDevice()
    yield device
    device.close()


def test_views_and_weights_lie_at_the_planned_offsets(parts: Any, device: CpuDevice) -> None:
    step = parts.step(
        "prefill/mlp", unit="u", weights="weights/u", reads=("x",), writes=("x", "scratch")
    )
    plan = parts.plan(
        steps=[step],
        units=[parts.unit("u", ("a", "norm.weight", (8,), 0), ("b", "mlp.weight", (4, 8), 64))],
        buffers=[
            parts.buffer("x", 512, 512, views=[("x", "bfloat16", (4, 8), 64)]),
            parts.buffer("scratch", 1024, 512, views=[("y", "float32", (2, 8), 0)]),
            parts.buffer("weights/u", 2048, 512, kind="weights"),
        ],
    )
    arena = Arena(plan, device)
    views, weights = arena.views(step), arena.weights(step)
    base = views["x"].data_ptr() - (512 + 64)
    assert base % 4096 == 0
    assert views["x"].shape == (4, 8)
    assert views["x"].dtype == torch.bfloat16
    assert views["y"].data_ptr() - base == 1024
    assert weights["norm.weight"].data_ptr() - base == 2048
    assert weights["mlp.weight"].data_ptr() - base == 2048 + 64
    assert weights["mlp.weight"].shape == (4, 8)
    assert weights["mlp.weight"].dtype == torch.float32
    assert arena.views(step) is views  # made once


def test_two_views_of_one_name_go_by_their_buffers_names(parts: Any, device: CpuDevice) -> None:
    step = parts.step("vision/merger", reads=("vision/x",), writes=("prefill/x",))
    plan = parts.plan(
        steps=[step],
        buffers=[
            parts.buffer("vision/x", 0, 512, views=[("x", "float32", (4,), 0)]),
            parts.buffer("prefill/x", 512, 512, views=[("x", "float32", (4,), 0)]),
        ],
    )
    views = Arena(plan, device).views(step)
    assert views["x"].data_ptr() == views["vision/x"].data_ptr()
    assert views["prefill/x"].data_ptr() == views["x"].data_ptr() + 512


def test_releasing_dead_ranges_lowers_the_resident_set(parts: Any, device: CpuDevice) -> None:
    plan = parts.plan(
        steps=[parts.step("vision/a"), parts.step("prefill/b")],
        buffers=[
            parts.buffer("first", 0, 1000, lifetimes=[(0, 2)]),
            parts.buffer("dead", 1000, 40 * MIB, lifetimes=[(0, 1)]),
            parts.buffer("alive", 1000 + 40 * MIB, 8 * MIB, lifetimes=[(0, 2)]),
        ],
    )
    arena = Arena(plan, device)
    assert arena.resident_bytes() == 0
    arena.fill_canaries([(0, arena.size_bytes)])
    before = read_memory()
    assert arena.dead_ranges(1) == [(1000, 1000 + 40 * MIB)]
    arena.release(arena.dead_ranges(1))
    after = read_memory()
    assert before is not None
    assert after is not None
    assert before.rss_bytes - after.rss_bytes > 39 * MIB
    resident = arena.resident_bytes()
    assert resident is not None
    assert 8 * MIB <= resident <= 8 * MIB + 3 * 4096
    assert arena.resident_bytes([arena.range("alive")]) == resident - 4096
    # the pages that dead and alive share are kept
    assert int(arena._bytes[999]) == 0xFF
    assert int(arena._bytes[arena.range("alive")[0]]) == 0xFF


def test_a_stray_write_is_caught_and_a_declared_one_is_not(parts: Any, device: CpuDevice) -> None:
    step = parts.step("prefill/a", reads=("in",), writes=("out",))
    plan = parts.plan(
        steps=[step],
        buffers=[
            parts.buffer("in", 0, 4096, views=[("in", "uint8", (4096,), 0)]),
            parts.buffer("out", 4096, 4096, views=[("out", "uint8", (4096,), 0)]),
        ],
        arena_bytes=3 * 4096,
    )
    arena = Arena(plan, device)
    views, before = arena.views(step), arena.guard(step)
    views["out"].fill_(1)
    arena.check_canaries(step, before)
    views["in"][17] = 1
    with pytest.raises(RunFailed, match=r"prefill/a: changed arena bytes .*\(in\)"):
        arena.check_canaries(step, before)


def test_of_a_large_arena_the_bytes_beside_declared_ranges_are_guarded(
    parts: Any, device: CpuDevice
) -> None:
    step = parts.step("prefill/a", writes=("out",))
    plan = parts.plan(
        steps=[step], buffers=[parts.buffer("out", 64 * MIB, MIB)], arena_bytes=300 * MIB
    )
    arena = Arena(plan, device)
    held = read_memory()
    before = arena.guard(step)
    looked = read_memory()
    assert held is not None
    assert looked is not None
    assert looked.rss_bytes - held.rss_bytes < MIB  # looking at untouched pages is free
    assert sum(stop - start for (start, stop), _ in before) == 4 * GUARD_EDGE_BYTES
    arena._bytes[65 * MIB] = 1
    with pytest.raises(RunFailed, match="outside the buffers"):
        arena.check_canaries(step, before)


def test_an_arena_beyond_the_systems_memory_is_refused_with_the_numbers(
    parts: Any, device: CpuDevice
) -> None:
    plan = parts.plan(buffers=[parts.buffer("x", 0, 2**50)])
    with pytest.raises(
        OutOfMemory, match=r"the arena needs 1048576\.00 GiB, the system has .* GiB free"
    ):
        Arena(plan, device)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"buffers": [("x", 4096, 4096)], "arena_bytes": 4096}, "outside the arena"),
        ({"view": ("float32", (2000,), 0)}, "outside its buffer"),
        ({"view": ("float32", (2,), 2)}, "not a multiple of 4"),
        ({"view": ("complex64", (2,), 0)}, "cannot be used"),
        ({"reads": ("nothing",)}, "which the plan lacks"),
        ({"unit": "u"}, "has no place"),
    ],
)
def test_a_plan_with_a_misplaced_part_is_refused(
    parts: Any, change: dict[str, Any], words: str
) -> None:
    view = change.get("view")
    buffers = change.get("buffers", [("x", 0, 4096)])
    plan = parts.plan(
        steps=[parts.step("prefill/a", reads=change.get("reads", ()), unit=change.get("unit"))],
        buffers=[
            parts.buffer(name, at, size, views=[("v", *view)] if view else [])
            for name, at, size in buffers
        ],
        arena_bytes=change.get("arena_bytes"),
    )
    with pytest.raises(PlanFileError, match=words):
        check_places(plan)


def test_the_complement_of_overlapping_ranges_is_what_none_covers() -> None:
    assert complement([(4, 6), (0, 2), (5, 8)], 10) == [(2, 4), (8, 10)]
    assert complement([], 3) == [(0, 3)]
    assert complement([(0, 3)], 3) == []
