"""What of a plan is still there for a further request, in the same arena."""

from __future__ import annotations

from planner.plan import Plan
from planner.plan.program import Buffer


def first_of_prefill(plan: Plan) -> int:
    """The number of prefill's first step."""
    return next(i for i, step in enumerate(plan.steps) if step.phase == "prefill")


def still_there(plan: Plan, first: int) -> frozenset[str]:
    """Copies whose buffer is alive from step `first` to the plan's end, and holds no other unit meanwhile."""
    end = len(plan.steps)
    units: dict[str, set[str]] = {}
    for copy in plan.copies:
        units.setdefault(copy.buffer, set()).add(copy.unit)
    whole_time = {
        buffer.name
        for buffer in plan.buffers
        if any(birth <= first and death >= end for birth, death in buffer.lifetimes)
        and len(units.get(buffer.name, ())) == 1
    }
    # what arrives once the loop runs is not there when prefill begins
    return frozenset(
        copy.id for copy in plan.copies if copy.buffer in whole_time and copy.phase != "decode"
    )


def keeps_cache(plan: Plan, first: int) -> bool:
    """Whether no buffer that is alive from step `first` on shares bytes with keys and values."""
    later = [b for b in plan.buffers if any(death > first for _, death in b.lifetimes)]
    return not any(
        other is not cache and _overlap(cache, other)
        for cache in plan.buffers
        if cache.kind == "kv_cache"
        for other in later
    )


def _overlap(one: Buffer, other: Buffer) -> bool:
    start = max(one.offset_bytes, other.offset_bytes)
    return start < min(one.offset_bytes + one.size_bytes, other.offset_bytes + other.size_bytes)
