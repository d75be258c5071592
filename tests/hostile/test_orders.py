"""Every order that a right plan's waits allow gives the plain CPU's answer."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import pytest
import torch

from tests.hostile.device import HostileDevice
from tests.hostile.lab import SETTINGS, Lab, drawn
from tests.hostile.scheduler import (
    EXTREMES,
    Blocked,
    Condition,
    Scheduler,
    at_random,
    by_rank,
    policies,
)
from tests.hostile.waits import Graph


def test_the_settings_differ_in_every_lever(lab: Lab) -> None:
    found = [lab.plan(name).levers for name in SETTINGS]
    assert {levers.order for levers in found} == {"all_first", "vision_then_llm", "prefetch"}
    assert {levers.images_together for levers in found} == {True, False}
    assert {levers.staging_depth for levers in found} == {1, 2, 3}
    assert {levers.tiles.prompt_rows == 1 for levers in found} == {True, False}
    assert {lab.plan(name).model.text.tied for name in SETTINGS} == {True, False}
    copies = [copy for name in SETTINGS for copy in lab.plan(name).copies]
    assert {copy.wraps for copy in copies} == {copy.once for copy in copies} == {True, False}
    assert all(lab.plan(name).decode_repeats == 3 for name in SETTINGS)


def test_the_extreme_orders_and_a_random_one_give_the_answer_of_the_cpu(
    lab: Lab, setting: str
) -> None:
    for name, policy in policies(1):
        answer = lab.hostile(setting, policy)
        assert answer.error is None, name
        assert answer.equals(lab.expected(setting)), name


@pytest.mark.full
def test_all_rankings_and_many_random_orders_give_the_answer_of_the_cpu(
    lab: Lab, setting: str
) -> None:
    for name, policy in policies(100, every_rank=True):
        assert lab.hostile(setting, policy).equals(lab.expected(setting)), name


@pytest.mark.parametrize(
    "seeds", [range(4), pytest.param(range(4, 60), marks=pytest.mark.full)], ids=["few", "many"]
)
def test_drawn_settings_give_the_answer_of_the_cpu_too(lab: Lab, seeds: range) -> None:
    for seed in seeds:
        name = f"drawn {seed}"
        lab.settings[name] = drawn(seed)
        assert Graph(lab.plan(name), lab.locations(name)).unordered() == [], name
        for policy in (by_rank(*EXTREMES["moves stop halfway"]), at_random(seed)):
            assert lab.hostile(name, policy).equals(lab.expected(name)), name


def test_nothing_is_left_of_a_run(lab: Lab) -> None:
    lab.hostile("all streamed, 1 slot", at_random(0))
    assert "reader" not in {thread.name for thread in threading.enumerate()}


# --- what the scheduler can do ------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_order_again_and_another_seed_another(lab: Lab) -> None:
    picks = []
    for seed in (0, 0, 1):
        scheduler = Scheduler(at_random(seed))
        lab.run("all streamed, 3 slots", HostileDevice(scheduler), scheduler)
        picks.append(scheduler.picks)
    assert picks[0] == picks[1] != picks[2]


@pytest.mark.parametrize(
    ("extreme", "late", "lag"),
    [
        ("copies early, compute late", "compute", 20),
        # no more than the ring holds
        ("the host runs ahead, copies late", "copy", 6),
    ],
)
def test_a_queue_lags_behind_the_host_as_its_rank_says(
    lab: Lab, extreme: str, late: str, lag: int
) -> None:
    scheduler = Scheduler(by_rank(*EXTREMES[extreme]))
    longest = 0

    class Watched(HostileDevice):
        def issue(self, call: Callable[[], None]) -> None:
            nonlocal longest
            super().issue(call)
            longest = max(longest, scheduler.length(late))

    lab.run("all resident, in turn", Watched(scheduler), scheduler)
    assert longest >= lag


def openmp_threads() -> int:
    """How many threads the calling thread's next product takes; asked of OpenMP, for torch would set it first."""
    try:
        return int(ctypes.CDLL(None).omp_get_max_threads())
    except (AttributeError, TypeError):  # a torch without, or Windows
        pytest.skip("OpenMP is not there to be asked")


@pytest.mark.parametrize("threads", [1, 2])
def test_a_queues_calls_take_as_many_threads_whoever_has_the_baton(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scheduler = Scheduler(by_rank("reader", "compute", "copy", "main"))
        found: list[tuple[str, int]] = []

        def call() -> None:
            found.append((threading.current_thread().name, openmp_threads()))

        def body() -> None:
            scheduler.put("compute", call)
            scheduler.pause(lambda: len(found) == 2)

        scheduler.put("compute", call)
        scheduler.drain("compute")
        scheduler.started("reader", body)
        scheduler.drain("compute")
    finally:
        torch.set_num_threads(before)
    assert found == [("MainThread", threads), ("reader", threads)]


def test_a_wait_that_nobody_can_end_is_found_at_once() -> None:
    scheduler = Scheduler(at_random(0))
    with pytest.raises(Blocked):
        scheduler.pause(lambda: False)
    condition = Condition(scheduler)
    with pytest.raises(Blocked), condition:
        condition.wait()
    # but a wait with a time ends by itself, once
    with condition:
        assert not condition.wait(timeout=1.0)
        with pytest.raises(Blocked):
            condition.wait(timeout=1.0)


def test_an_error_in_a_queue_reaches_the_host() -> None:
    scheduler = Scheduler(at_random(0))

    def broken() -> None:
        raise ValueError("odd")

    scheduler.put("compute", broken)
    with pytest.raises(ValueError, match="odd"):
        scheduler.drain("compute")
