"""Pinned host memory as a tier: what it may hold, what it holds, and what that brings."""

from __future__ import annotations

from typing import Any

import pytest

from planner.check import check
from planner.host_tier import PIECE_BYTES, RING_BYTES, capacity_bytes
from planner.profile import DeviceProfile, load_profile
from planner.schedule import pinned, spread

GB = 10**9
CARD = load_profile("rtx-4060-8gb")


def card(**changes: int) -> DeviceProfile:
    rates = {
        "host_to_device_bytes_per_s": 20 * GB,
        "page_cache_bytes_per_s": 5 * GB,
        "disk_bytes_per_s": GB,
        "pin_bytes_per_s": 2 * GB,
    }
    return CARD.model_copy(update={**rates, **changes})


def test_what_the_files_take_of_host_memory_is_left_to_them_where_they_fit() -> None:
    assert capacity_bytes(card(), 10 * GB, 30 * GB, 1000) == (
        (10 * GB - RING_BYTES) // PIECE_BYTES * PIECE_BYTES
    )
    assert capacity_bytes(card(), 40 * GB, 30 * GB, 1000) == (
        (10 * GB - RING_BYTES) // PIECE_BYTES * PIECE_BYTES
    )


def test_nothing_is_pinned_where_that_takes_longer_than_it_brings() -> None:
    # a byte from the page cache takes 0.2 ns, over the link 0.05, and pinning it 0.5: after 3 iterations nothing is won
    assert capacity_bytes(card(), 40 * GB, 10 * GB, 3) == 0
    assert capacity_bytes(card(), 40 * GB, 10 * GB, 4) > 0
    assert capacity_bytes(card(), 0, 10 * GB, 1000) == 0
    assert capacity_bytes(card(pin_bytes_per_s=0), 40 * GB, 10 * GB, 1000) == 0


@pytest.mark.parametrize("capacity", [0, 1, 5, 11, 12, 17, 29, 30, 100])
def test_as_many_units_stay_as_fit_and_lie_evenly(capacity: int) -> None:
    sizes = (1, 5) * 5
    found = pinned(sizes, capacity)
    assert sum(sizes[i] for i in found) <= capacity
    assert found == spread(len(found), len(sizes))
    if len(found) < len(sizes):
        assert sum(sizes[i] for i in spread(len(found) + 1, len(sizes))) > capacity


def test_a_plan_takes_the_loops_units_from_host_memory_and_reads_each_once(kit: Any) -> None:
    plan = kit.plan("7b", 8 * GB, CARD, kit.workload(new=64), ram_bytes=64 * GB)
    kept = {unit.unit for unit in plan.host_units}
    looped = [c for c in plan.copies if c.phase == "decode" and not c.once]
    assert looped
    assert all(copy.source == "host" and copy.unit in kept for copy in looped)
    assert all(copy.source == "disk" for copy in plan.copies if copy.phase != "decode")
    assert check(plan) == []


def test_less_host_memory_holds_fewer_units_and_takes_longer(kit: Any) -> None:
    plans = [
        kit.plan("7b", 8 * GB, CARD, kit.workload(new=64), ram_bytes=ram)
        for ram in (64 * GB, 4 * GB, 0)
    ]
    held = [sum(unit.size_bytes for unit in plan.host_units) for plan in plans]
    assert held[0] > held[1] > held[2] == 0
    assert held[1] <= 4 * GB
    assert plans[0].prediction.seconds < plans[1].prediction.seconds < plans[2].prediction.seconds
    assert all(check(plan) == [] for plan in plans)


def test_a_copy_from_host_memory_before_its_unit_was_read_is_found_by_the_checker(kit: Any) -> None:
    plan = kit.plan("7b", 8 * GB, CARD, kit.workload(new=64), ram_bytes=64 * GB)
    gone = plan.model_copy(update={"host_units": plan.host_units[1:]})
    assert any("is not yet" in problem for problem in check(gone))
    first = plan.host_units[0]
    over = plan.model_copy(
        update={
            "host_units": (
                first,
                *(u.model_copy(update={"offset_bytes": 0}) for u in plan.host_units[1:]),
            )
        }
    )
    assert any("overlaps another" in problem for problem in check(over))
