from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.checkpoint.template import unit_sizes
from planner.plan.shapes import WindowRun
from planner.plan.tiles import window_tiles
from planner.schedule import PhaseResidency, Program, program, spread
from planner.workload import window_runs


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3000))
def test_window_tiles_cover_every_row_with_whole_windows(rows: int, cols: int, tile: int) -> None:
    windows = window_runs(2 * rows, 2 * cols, window=8)
    tiles = window_tiles(windows, tile)
    assert sum(run.count * run.rows for run in windows) == 4 * rows * cols
    assert tiles[0].start == 0
    assert tiles[-1].stop == 4 * rows * cols
    assert all(a.stop == b.start for a, b in pairwise(tiles))
    for piece in tiles:
        covered = sum(count * run for count, run in piece.runs)
        assert covered == piece.stop - piece.start > 0
        assert covered <= tile or sum(count for count, _ in piece.runs) == 1
    in_order = [run for piece in tiles for count, run in piece.runs for _ in range(count)]
    assert in_order == [run.rows for run in windows for _ in range(run.count)]


def test_a_tile_is_filled_with_as_many_windows_as_it_holds() -> None:
    tiles = window_tiles((WindowRun(count=5, rows=64), WindowRun(count=2, rows=32)), 160)
    assert [(t.start, t.stop, t.runs) for t in tiles] == [
        (0, 128, ((2, 64),)),
        (128, 256, ((2, 64),)),
        (256, 384, ((1, 64), (2, 32))),
    ]


@given(st.integers(0, 80), st.integers(1, 80))
def test_residents_are_spread_evenly(resident: int, total: int) -> None:
    resident = min(resident, total)
    chosen = sorted(spread(resident, total))
    assert len(chosen) == resident
    assert all(0 <= position < total for position in chosen)
    gaps = [b - a for a, b in pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def drafted(kit: Any, **changes: Any) -> Program:
    checkpoint = kit.tiny()
    sizes = unit_sizes(checkpoint.shape, 256)
    return program(kit.choice(**changes), checkpoint.shape, kit.workload(), sizes)


SETTINGS = [
    {"depth": depth, "vision": vision, "prefill": prefill, "decode": decode}
    for depth in (1, 2, 3)
    for vision in (PhaseResidency(0, 0), PhaseResidency(3, 4))
    for prefill, decode in (
        (PhaseResidency(0, 0), PhaseResidency(0, 0)),
        (PhaseResidency(1, 2), PhaseResidency(3, 2, 3)),
        (PhaseResidency(4, 4, 3), PhaseResidency(4, 4, 3)),
    )
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_copy_comes_before_the_step_it_serves_and_every_unit_arrives(
    kit: Any, setting: dict[str, Any]
) -> None:
    made = drafted(kit, **setting)
    by_id = {copy.id: copy for copy in made.copies}
    assert len(by_id) == len(made.copies)
    for copy in made.copies:
        assert copy.wraps or copy.after < copy.need
        assert copy.id in made.steps[copy.need].waits
        assert made.steps[copy.need].unit == copy.unit
    arrived: set[str] = set()
    for step in made.steps:
        for wait in step.waits:
            arrived.add(by_id[wait].unit)
        assert step.unit is None or step.unit in arrived
        assert step.unit is None or step.weights in made.buffers


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_slot_is_refilled_only_after_the_step_that_used_it(
    kit: Any, setting: dict[str, Any]
) -> None:
    made = drafted(kit, **setting)
    user: dict[str, int] = {}
    for copy in sorted(made.copies, key=lambda copy: copy.need):
        if copy.buffer.startswith("staging/"):
            used = user.get(copy.buffer)
            if used is not None:
                assert copy.after >= used
            user[copy.buffer] = copy.need
    for copy in made.copies:
        if copy.wraps:
            # in the loop the first refill waits for the slot's last use of the iteration before
            assert copy.after == user[copy.buffer]


def test_residents_of_prefill_stay_in_decode(kit: Any) -> None:
    made = drafted(kit, prefill=PhaseResidency(2, 1, 1), decode=PhaseResidency(3, 4, 2))
    places = {step.id: step.weights for step in made.steps}
    for id, place in places.items():
        if id.startswith("prefill/") and place and place.startswith("weights/"):
            assert places[id.replace("prefill/", "decode/")] == place


def test_without_images_there_is_no_vision_phase(kit: Any) -> None:
    checkpoint = kit.tiny()
    sizes = unit_sizes(checkpoint.shape, 256)
    made = program(kit.choice(), checkpoint.shape, kit.workload(()), sizes)
    assert set(made.starts) == {"prefill", "decode"}
    assert not any(name.startswith("vision/") for name in made.buffers)
