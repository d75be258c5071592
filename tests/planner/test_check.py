"""The checker must find what it is there for: a good plan is broken in every way we can think of, one at a time."""

from __future__ import annotations

from typing import Any

import pytest

from planner.check import check
from planner.plan import Plan
from planner.plan.program import Buffer, Copy, Step


def with_step(plan: Plan, index: int, **changes: Any) -> Plan:
    steps = list(plan.steps)
    steps[index] = steps[index].model_copy(update=changes)
    return plan.model_copy(update={"steps": tuple(steps)})


def with_copy(plan: Plan, index: int, **changes: Any) -> Plan:
    copies = list(plan.copies)
    copies[index] = copies[index].model_copy(update=changes)
    return plan.model_copy(update={"copies": tuple(copies)})


def with_buffer(plan: Plan, name: str, **changes: Any) -> Plan:
    buffers = [b.model_copy(update=changes) if b.name == name else b for b in plan.buffers]
    return plan.model_copy(update={"buffers": tuple(buffers)})


def alive_together(first: Buffer, second: Buffer) -> bool:
    return any(a < d and c < b for a, b in first.lifetimes for c, d in second.lifetimes)


def test_a_good_plan_has_no_problems(streamed: Plan) -> None:
    assert check(streamed) == []
    assert sum(1 for copy in streamed.copies if copy.wraps) == 2
    assert any(copy.once for copy in streamed.copies)


def test_every_missing_wait_is_found(streamed: Plan) -> None:
    waits = [(i, w) for i, step in enumerate(streamed.steps) for w in step.waits]
    assert len(waits) == len(streamed.copies) > 20
    for index, wait in waits:
        left = tuple(w for w in streamed.steps[index].waits if w != wait)
        assert check(with_step(streamed, index, waits=left)), wait


def test_every_wait_moved_to_the_next_step_is_found(streamed: Plan) -> None:
    for index, step in enumerate(streamed.steps[:-1]):
        for wait in step.waits:
            broken = with_step(streamed, index, waits=())
            late = (*streamed.steps[index + 1].waits, wait)
            assert check(with_step(broken, index + 1, waits=late)), wait


def test_a_refill_that_may_begin_one_step_early_is_found(streamed: Plan) -> None:
    place = {step.id: index for index, step in enumerate(streamed.steps)}
    seen: set[str] = set()
    tried = 0
    for index, copy in enumerate(streamed.copies):
        refill = copy.buffer in seen or copy.wraps
        seen.add(copy.buffer)
        if not copy.buffer.startswith("staging/") or not refill or copy.after is None:
            continue
        early = streamed.steps[place[copy.after] - 1].id
        assert check(with_copy(streamed, index, after=early)), copy.id
        tried += 1
    assert tried > 10


def test_a_resident_that_arrives_while_its_bytes_are_in_use_is_found(streamed: Plan) -> None:
    buffers = {buffer.name: buffer for buffer in streamed.buffers}
    tried = 0
    for index, copy in enumerate(streamed.copies):
        own = buffers[copy.buffer]
        if copy.after is None or own.kind != "weights":
            continue
        earlier = Buffer(**(dict(own) | {"lifetimes": ((0, own.lifetimes[0][0]),)}))
        in_use = [
            other.name
            for other in streamed.buffers
            if other.offset_bytes < own.offset_bytes + own.size_bytes
            and own.offset_bytes < other.offset_bytes + other.size_bytes
            and alive_together(earlier, other)
        ]
        assert bool(check(with_copy(streamed, index, after=None))) == bool(in_use), copy.id
        tried += bool(in_use)
    assert tried


def test_a_copy_after_the_step_that_waits_for_it_is_found(streamed: Plan) -> None:
    for index, copy in enumerate(streamed.copies):
        assert check(with_copy(streamed, index, after=waiting(streamed, copy).id, wraps=False))


def waiting(plan: Plan, copy: Copy) -> Step:
    return next(step for step in plan.steps if copy.id in step.waits)


def test_a_copy_queue_that_cannot_be_walked_is_found(streamed: Plan) -> None:
    backwards = streamed.model_copy(update={"copies": streamed.copies[::-1]})
    assert any("deadlock" in problem for problem in check(backwards))


def test_copies_that_change_buffers_or_units_are_found(streamed: Plan) -> None:
    for first in range(len(streamed.copies) - 1):
        a, b = streamed.copies[first], streamed.copies[first + 1]
        if a.unit == b.unit:
            continue
        broken = with_copy(streamed, first, unit=b.unit)
        assert check(with_copy(broken, first + 1, unit=a.unit)), a.id


def test_a_buffer_moved_onto_one_alive_at_the_same_time_is_found(streamed: Plan) -> None:
    tried = 0
    for first in streamed.buffers:
        for second in streamed.buffers:
            if first.name < second.name and alive_together(first, second):
                moved = with_buffer(streamed, first.name, offset_bytes=second.offset_bytes)
                assert check(moved), (first.name, second.name)
                tried += 1
    assert tried > 50


@pytest.mark.parametrize("shift", [1, -512, 10**9])
def test_a_buffer_off_the_grid_or_outside_the_arena_is_found(streamed: Plan, shift: int) -> None:
    lowest = min(streamed.buffers, key=lambda buffer: buffer.offset_bytes)
    assert check(with_buffer(streamed, lowest.name, offset_bytes=lowest.offset_bytes + shift))


def test_a_kv_cache_too_small_for_prompt_and_answer_is_found(streamed: Plan) -> None:
    small = streamed.workload.model_copy(update={"context_tokens": 10})
    assert check(streamed.model_copy(update={"workload": small}))
    for buffer in streamed.buffers:
        if buffer.kind == "kv_cache":
            assert check(with_buffer(streamed, buffer.name, size_bytes=buffer.size_bytes - 512))


def test_a_loop_of_another_length_is_found(streamed: Plan) -> None:
    repeats = streamed.decode_repeats + 1
    assert check(streamed.model_copy(update={"decode_repeats": repeats}))


def test_a_read_of_what_was_never_written_is_found(streamed: Plan) -> None:
    assert check(with_step(streamed, 0, reads=("prefill/hidden",)))
    assert check(with_step(streamed, 0, writes=("nowhere",)))


def test_weights_found_in_another_buffer_are_found(streamed: Plan) -> None:
    index = next(i for i, s in enumerate(streamed.steps) if s.weights == "staging/vision/0")
    assert check(with_step(streamed, index, weights="staging/vision/1"))
    assert check(with_step(streamed, index, weights=None))


@pytest.mark.parametrize("field", ["live_bytes", "expected_bytes"])
def test_a_step_that_claims_other_bytes_is_found(streamed: Plan, field: str) -> None:
    step = streamed.steps[5]
    assert check(with_step(streamed, 5, **{field: getattr(step, field) + 512}))


def test_a_bound_above_the_budget_or_below_its_errors_is_found(streamed: Plan) -> None:
    prediction = streamed.prediction
    tight = streamed.device.model_copy(update={"budget_bytes": prediction.bound_peak_bytes - 1})
    assert check(streamed.model_copy(update={"device": tight})) == ["the bound is above the budget"]
    low = prediction.model_copy(update={"bound_peak_bytes": prediction.expected_peak_bytes})
    assert check(streamed.model_copy(update={"prediction": low}))


def test_blocks_outside_the_arena_that_do_not_add_up_are_found(streamed: Plan) -> None:
    index = next(i for i, s in enumerate(streamed.steps) if len(s.outside) > 1)
    blocks = streamed.steps[index].outside
    assert check(with_step(streamed, index, outside=blocks[1:]))
    assert check(with_step(streamed, index, outside=blocks[::-1]))


@pytest.mark.parametrize("allocator", ["native", "expandable"])
def test_a_cards_phases_that_leave_something_out_are_found(kit: Any, allocator: str) -> None:
    plan = kit.plan("tiny", None, "rtx-5080-16gb", allocator=allocator)
    assert check(plan) == []
    prediction = plan.prediction
    for name in ("allocated_peak_bytes", "reserved_peak_bytes", "expected_peak_bytes"):
        phases = list(prediction.phases)
        phases[1] = phases[1].model_copy(update={name: getattr(phases[1], name) // 2})
        broken = prediction.model_copy(update={"phases": tuple(phases)})
        assert check(plan.model_copy(update={"prediction": broken})), name
    terms = prediction.model_copy(update={"terms": prediction.terms[1:]})
    assert check(plan.model_copy(update={"prediction": terms}))
