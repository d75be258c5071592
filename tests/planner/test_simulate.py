from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.allocator import CachingAllocator
from planner.checkpoint.template import unit_sizes
from planner.plan import Kept
from planner.plan.program import Outside
from planner.queues import Beside, Job, line, loop
from planner.schedule import PhaseResidency, Program, program
from planner.simulate import Ranges, card_bytes, queue_order, timeline
from planner.units import MIB
from planner.workspace import peak_bytes

# --- seconds --------------------------------------------------------------------------------------------------------


def slow_seconds(made: Program, step_seconds: list[float], copy_seconds: dict[str, float]) -> float:
    """When the last step ends, with both queues written out, the loop unrolled, and heads of queues tried in turn."""
    loop = range(made.decode_start, len(made.steps))
    steps = [(i, 0) for i in range(made.decode_start)]
    copies = [(c, 0) for c in made.copies if c.phase != "decode"]
    for iteration in range(made.decode_repeats):
        steps += [(i, iteration) for i in loop]
        copies += [
            (c, iteration)
            for c in made.copies
            if c.phase == "decode" and not (c.once and iteration)
        ]
    step_end: dict[tuple[int, int], float] = {}
    copy_end: dict[tuple[str, int], float] = {}
    by_id = {copy.id: copy for copy in made.copies}
    compute = copying = 0.0
    while steps or copies:
        moved = False
        if copies:
            copy, iteration = copies[0]
            after: tuple[int, int] | None = (copy.after, iteration)
            if copy.wraps:
                after = (copy.after, iteration - 1) if iteration else (made.decode_start - 1, 0)
            elif copy.after < made.decode_start:
                after = (copy.after, 0) if copy.after >= 0 else None
            if after is None or after in step_end:
                ready = step_end[after] if after else 0.0
                copying = max(copying, ready) + copy_seconds[copy.id]
                copy_end[copy.id, iteration] = copying
                copies.pop(0)
                moved = True
        if steps:
            index, iteration = steps[0]
            waited = []
            for name in made.steps[index].waits:
                copy = by_id[name]
                waited.append((name, 0 if copy.once or copy.phase != "decode" else iteration))
            if all(key in copy_end for key in waited):
                start = max([compute, *(copy_end[key] for key in waited)])
                compute = start + step_seconds[index]
                step_end[index, iteration] = compute
                steps.pop(0)
                moved = True
        assert moved, "deadlock"
    return compute


def drawn(kit: Any, draw: random.Random, new: int) -> tuple[Program, list[float], dict[str, float]]:
    """A program of random levers with random seconds."""
    checkpoint = kit.tiny()
    decode = PhaseResidency(draw.randint(0, 4), draw.randint(0, 4), draw.randint(0, 3))
    prefill = PhaseResidency(
        draw.randint(0, decode.attn), draw.randint(0, decode.mlp), draw.randint(0, decode.head)
    )
    choice = kit.choice(
        order=draw.choice(["all_first", "vision_then_llm"]),
        images_together=draw.random() < 0.5,
        depth=draw.randint(1, 3),
        vision=PhaseResidency(draw.randint(0, 4), draw.randint(0, 4)),
        prefill=prefill,
        decode=decode if new > 1 else prefill,
    )
    workload = kit.workload([(336, 252)] * draw.randint(1, 2), new=new)
    made = program(choice, checkpoint.shape, workload, unit_sizes(checkpoint.shape, 256))
    step_seconds = [draw.uniform(0, 2) for _ in made.steps]
    copy_seconds = {copy.id: draw.uniform(0, 2) for copy in made.copies}
    patient = draw.random() < 0.5
    ordered = queue_order(made, step_seconds, copy_seconds, patient=patient)
    assert sorted(c.id for c in ordered) == sorted(c.id for c in made.copies)
    return replace(made, copies=ordered), step_seconds, copy_seconds


@pytest.mark.parametrize("seed", range(40))
def test_the_timeline_is_that_of_two_queues_run_event_by_event(kit: Any, seed: int) -> None:
    draw = random.Random(seed)
    made, steps, copies = drawn(kit, draw, new=draw.randint(1, 3))
    assert timeline(made, steps, copies).seconds == pytest.approx(slow_seconds(made, steps, copies))


@pytest.mark.parametrize("seed", range(20))
def test_a_long_loop_repeats_its_steady_period(kit: Any, seed: int) -> None:
    made, steps, copies = drawn(kit, random.Random(seed), new=30)
    found = timeline(made, steps, copies).seconds
    assert found == pytest.approx(slow_seconds(made, steps, copies), rel=0.005)


def test_phases_add_up_to_the_whole(kit: Any) -> None:
    made, steps, copies = drawn(kit, random.Random(3), new=5)
    found = timeline(made, steps, copies)
    phases = sum(phase.seconds for phase in found.phases.values())
    assert found.load_seconds + phases == pytest.approx(found.seconds)
    assert list(found.phases) == ["vision", "prefill", "decode"]


# --- bytes ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=15))
def test_ranges_hold_the_bytes_a_set_would_hold(spans: list[tuple[int, int]]) -> None:
    ranges = Ranges()
    slow: set[int] = set()
    for start, length in spans:
        ranges.add(start, start + length)
        slow.update(range(start, start + length))
        assert ranges.total == len(slow)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=8),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=8),
)
def test_ranges_are_cut_as_a_set_is_intersected(
    spans: list[tuple[int, int]], kept: list[tuple[int, int]]
) -> None:
    ranges = Ranges([(start, start + length) for start, length in spans])
    slow = {i for start, length in spans for i in range(start, start + length)}
    keep = {i for start, length in kept for i in range(start, start + length)}
    cut = ranges.only([(start, start + length) for start, length in kept])
    assert cut.total == len(slow & keep)


def block(size: int, birth: int, death: int) -> Outside:
    return Outside(name="block", size_bytes=size, birth=birth, death=death)


def test_blocks_outside_the_arena_count_while_they_are_alive_together() -> None:
    assert peak_bytes(()) == 0
    assert peak_bytes((block(5, 0, 2), block(7, 2, 3), block(3, 1, 3))) == 10


def test_a_small_request_takes_a_segment_of_two_mebibytes() -> None:
    allocator = CachingAllocator()
    allocator.malloc(1)
    assert allocator.reserved_bytes == 2 * MIB
    allocator.malloc(MIB)
    assert allocator.reserved_bytes == 2 * MIB


def test_a_medium_request_takes_twenty_mebibytes_and_a_large_one_its_own_size_rounded_up() -> None:
    allocator = CachingAllocator()
    allocator.malloc(MIB + 1)
    assert allocator.reserved_bytes == 20 * MIB
    allocator.malloc(20 * MIB + 1)
    assert allocator.reserved_bytes == (20 + 22) * MIB


def test_a_freed_large_block_serves_a_smaller_request() -> None:
    allocator = CachingAllocator()
    allocator.release(allocator.malloc(40 * MIB))
    allocator.malloc(24 * MIB)
    allocator.malloc(16 * MIB)
    assert allocator.reserved_bytes == 40 * MIB


def test_a_rest_of_at_most_a_mebibyte_stays_with_a_large_block() -> None:
    allocator = CachingAllocator()
    block = allocator.malloc(39 * MIB)  # in a segment of 40
    assert block.size_bytes == 40 * MIB
    assert allocator.malloc(38 * MIB).size_bytes == 38 * MIB  # nothing to split there


def test_a_large_block_is_split_where_more_than_a_mebibyte_is_left() -> None:
    allocator = CachingAllocator()
    allocator.release(allocator.malloc(40 * MIB))
    assert allocator.malloc(38 * MIB).size_bytes == 38 * MIB


def test_neighbours_that_are_free_become_one_block() -> None:
    allocator = CachingAllocator()
    first, second = allocator.malloc(8 * MIB), allocator.malloc(8 * MIB)
    assert allocator.reserved_bytes == 20 * MIB
    allocator.release(first)
    allocator.release(second)
    allocator.malloc(20 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_reserved_bytes_hold_arena_workspaces_and_the_largest_sum_of_blocks() -> None:
    outside = [(block(30 * MIB, 0, 2), block(10 * MIB, 1, 2)), (block(25 * MIB, 0, 1),)]
    kept = [Kept(name="positions", size_bytes=100), Kept(name="workspace", size_bytes=32 * MIB)]
    found = card_bytes(1024 * MIB, kept, outside, scratch_bytes=40 * MIB)
    assert found.reserved == found.start == (1024 + 2 + 32 + 40) * MIB
    held = 1024 * MIB + 512 + 32 * MIB
    assert found.allocated == [held + 40 * MIB, held + 25 * MIB]


def test_a_step_that_finds_no_room_in_what_was_reserved_at_the_start_shows() -> None:
    # 32 MiB are reserved, of which the third block finds 10 and 2 on either side of the second
    blocks = (block(10 * MIB, 0, 2), block(20 * MIB, 1, 3), block(12 * MIB, 2, 3))
    found = card_bytes(64 * MIB, (), [blocks], scratch_bytes=32 * MIB)
    assert (found.start, found.reserved) == (96 * MIB, 108 * MIB)


def test_where_all_weights_come_first_the_first_step_waits_for_every_resident(kit: Any) -> None:
    checkpoint, workload = kit.tiny(), kit.workload([(336, 252)], new=2)
    counts = PhaseResidency(3, 2, 1)
    choice = kit.choice(order="all_first", depth=2, prefill=counts, decode=counts)
    made = program(choice, checkpoint.shape, workload, unit_sizes(checkpoint.shape, 256))
    residents = {copy.id for copy in made.copies if copy.buffer.startswith("weights/")}
    assert residents <= set(made.steps[0].waits)
    seconds = dict.fromkeys((copy.id for copy in made.copies), 1.0)
    ordered = queue_order(made, [0.0] * len(made.steps), seconds, patient=True)
    found = timeline(replace(made, copies=ordered), [0.0] * len(made.steps), seconds)
    assert found.load_seconds >= len(residents)


# --- queues that share their cores ------------------------------------------------------------------------------------


def ticked(steps: list[int], jobs: list[Job], beside: Beside) -> list[float]:
    """When each step ends, by a clock that ticks and gives both queues their share of each tick."""
    tick, now, done, ended = 1 / 64, 0.0, 0, []
    left, credit = [float(job.seconds) for job in jobs], beside.credit_s
    for index, seconds in enumerate(steps):
        rest, serial = float(seconds), min(float(seconds), beside.serial_s)
        while rest > 1e-9:
            copies = done < len(jobs) and jobs[done].after < index
            computes = not any(job.need == index for job in jobs[done:])
            both = copies and computes
            share = 1.0
            if both and serial <= 1e-9:
                share = beside.favoured if credit > 1e-9 else beside.compute
            if computes:
                rest -= tick * share
                if not (both and serial > 1e-9):
                    credit = min(credit + tick * (share - beside.compute), beside.credit_s)
                serial -= tick
            if copies:
                left[done] -= tick * (beside.copy if both else 1)
                if left[done] <= 1e-9:
                    done += 1
            now += tick
        ended.append(now)
    return ended


@pytest.mark.parametrize("seed", range(30))
def test_queues_that_share_their_cores_give_each_its_part_of_every_moment(seed: int) -> None:
    draw = random.Random(seed)
    steps = [draw.randint(1, 6) for _ in range(8)]
    needs = sorted(draw.randrange(8) for _ in range(6))
    jobs = [
        Job(need, draw.randint(-1, need - 1), draw.randint(1, 6), False, False) for need in needs
    ]
    # halves and quarters, so that every event falls on a tick
    beside = Beside(draw.choice((0.5, 1.0)), draw.choice((0.5, 0.25, 1.0)))
    # with a serial part, and a reader that takes its due after a rest
    rested = Beside(0.5, 1.0, draw.choice((0.0, 0.25, -0.5)), draw.choice((1.0, 2.0)), 0.5)
    for shares in (beside, rested):
        found, _ = line(steps, jobs, shares)
        assert found == pytest.approx(ticked(steps, jobs, shares), abs=0.5)
    alone, _ = line(steps, jobs)
    assert found[-1] >= alone[-1] - 1e-9


@pytest.mark.parametrize("seed", range(60))
def test_no_order_of_the_queues_ends_before_what_they_share_of_each_moment_allows(
    seed: int,
) -> None:
    draw = random.Random(seed)
    steps = [draw.uniform(0, 2) for _ in range(8)]
    scale = draw.choice((0.2, 1.0, 3.0))
    seconds = [draw.uniform(0, 2) * scale for _ in range(8)]
    compute, copy = draw.choice((0.25, 0.5, 0.75)), draw.choice((0.5, 0.75, 1.0))
    beside = Beside(compute, copy, *draw.choice(((1.0, 0.0, 0.0), (-0.25, 0.5, 0.125))))
    least = beside.least(sum(steps), sum(seconds), len(steps))
    # as early as possible, and one after another: what a bound must lie below whatever the waits are
    early = [Job(need, -1, time) for need, time in enumerate(seconds)]
    late = [Job(need, need - 1, time) for need, time in enumerate(seconds)]
    for jobs in early, late:
        assert least <= line(steps, jobs, beside)[0][-1] + 1e-9
    assert least >= max(sum(steps), sum(seconds)) - 1e-9


def test_the_least_of_both_queues_is_reached_where_no_copy_is_waited_for() -> None:
    """10 s of steps at half speed beside 4 s of copies: 2 s come on top."""
    half = Beside(0.5, 1.0)
    assert half.least(10.0, 4.0, 1) == line([10.0, 0.0], [Job(1, -1, 4.0)], half)[0][-1] == 12.0
    # with 30 s of copies every step is done beside them
    assert half.least(10.0, 30.0, 1) == 30.0
    # queues of which each gets half of every moment save nothing
    assert Beside(0.5, 0.5).least(10.0, 4.0, 1) == 14.0
    # nor do those that get less beside one another
    assert Beside(0.25, 0.5).least(10.0, 4.0, 1) == 14.0
    # one second of each of two steps is one thread's and costs the steps nothing
    assert half._replace(favoured=0.0, serial_s=1.0).least(10.0, 4.0, 2) == 11.0


@pytest.mark.parametrize("seed", range(30))
def test_queues_that_do_not_slow_each_other_are_the_plain_ones(seed: int) -> None:
    draw = random.Random(seed)
    steps = [draw.uniform(0, 2) for _ in range(8)]
    jobs = []
    for need in sorted(draw.randrange(8) for _ in range(6)):
        wraps = draw.random() < 0.3
        after = draw.randint(need, 7) if wraps else draw.randint(-1, need - 1)
        jobs.append(Job(need, after, draw.uniform(0, 2), wraps, not wraps and draw.random() < 0.2))
    nearly = Beside(1 - 1e-12, 1.0)
    assert loop(steps, jobs, 30, nearly) == pytest.approx(loop(steps, jobs, 30))
    once = [job for job in jobs if not job.wraps]
    ends, begin = line(steps, once)
    shared_ends, shared_begin = line(steps, once, nearly)
    assert shared_ends == pytest.approx(ends)
    assert shared_begin == pytest.approx(begin)


def test_a_rested_reader_takes_its_due_at_once_and_in_the_long_run_no_more() -> None:
    """A step of 4 s, at half speed beside a copy, and a second of credit that is used up at a loss."""
    due = Beside(0.5, 1.0, -0.5, 1.0)
    short, long = ([Job(1, -1, seconds)] for seconds in (0.5, 100.0))
    # half a second of copy costs three quarters: it stood still, and a quarter more
    assert line([4.0, 0.0], short, due)[0][0] == pytest.approx(4.75)
    # one second until the credit is gone, in which the step falls back by half; 4.5 s at half speed are left
    assert line([4.0, 0.0], long, due)[0][0] == pytest.approx(10.0)
    # the first second of a step is one thread's, and costs nothing
    assert line([4.0, 0.0], long, due._replace(serial_s=1.0))[0][0] == pytest.approx(9.0)
    # credit comes back while nothing is copied: half of each second
    later = [Job(2, 0, 1.0)]
    assert line([1.0, 4.0, 0.0], later, due)[0][1] == pytest.approx(1 + 4 + 1.5)
    # the first copy takes it all; 1.5 s alone give 0.75 back, and the second runs a quarter of a second without
    twice = [Job(1, -1, 1.0), *later]
    assert line([1.0, 4.0, 0.0], twice, due)[0][1] == pytest.approx(2.5 + 1 + 4.25)


def test_a_shared_loop_of_long_copies_is_slowed_by_its_steps() -> None:
    steps, jobs = [1.0, 1.0], [Job(0, 0, 3.0, True, False), Job(1, 1, 3.0, True, False)]
    # copies alone take 6 s a period; for 2 / 0.5 s of it they are at half speed, so 2 s come on top
    assert loop(steps, jobs, 30, Beside(0.5, 0.5)).period == pytest.approx(8.0)
    assert loop(steps, jobs, 30).period == pytest.approx(6.0)
