"""What of a plan one request of a session runs: all of it, or what a further question about the same images needs.

A session runs its plan again and again in one arena. What a request may find there is read off the plan's lifetimes:
weights whose buffer is alive from the first step of the next request to the end need not come again, and keys and values
stay where no other buffer of prefill or decode shares their bytes. All else is as good as lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from executor.device import Range
from planner.plan import Plan
from planner.plan.sessions import first_of_prefill, keeps_cache, still_there
from planner.plan.tiles import question_tile
from planner.plan.words import DTYPE_BYTES


class Round(NamedTuple):
    """Steps from number `first` on; of the prompt the rows from `start` on, `rows` of them with the padding behind them.

    tile: rows at once, None for the plan's tiles. landed: copies that do not run, since what they bring lies there or
    is not needed. kept: ranges that stay as they are, though no step of the plan needs them yet.
    """

    first: int
    start: int
    rows: int
    tile: int | None
    landed: frozenset[str]
    kept: tuple[Range, ...] = ()


def whole(rows: int) -> Round:
    """Everything, with nothing there yet."""
    return Round(0, 0, rows, None, frozenset())


def anew(plan: Plan) -> Round:
    """Everything, in an arena that the plan has run in before. The prompt is filled up to the plan's rows.

    So every request multiplies the same shapes, and libraries keep nothing more from one to the next.
    """
    return whole(plan.workload.prompt_tokens)._replace(landed=still_there(plan, 0))


def question(
    plan: Plan,
    before: Sequence[int],
    ids: Sequence[int],
    image_spans: Sequence[tuple[int, int]],
) -> Round | None:
    """The rows after the last image alone, if the prompts `before` and `ids` are the same up to there; else None.

    They run in tiles of one size, the last one filled up with rows that nobody reads: always the same shapes too.
    """
    further = plan.prediction.further
    if further is None or further.question_rows is None or not image_spans:
        return None
    start = max(first + rows for first, rows in image_spans)
    if start >= len(ids) or tuple(ids[:start]) != tuple(before[:start]):
        return None
    first = first_of_prefill(plan)
    landed = still_there(plan, first) | {c.id for c in plan.copies if c.phase == "vision"}
    waited = {name for step in plan.steps[first:] for name in step.waits}
    # a copy that no step of this round waits for must be there
    if not keeps_cache(plan, first) or not {c.id for c in plan.copies} <= landed | waited:
        return None
    most = plan.workload.prompt_tokens
    tile = question_tile(further.question_rows, start, most, plan.decode_repeats)
    return Round(
        first,
        start,
        -(-(len(ids) - start) // tile) * tile,
        tile,
        landed,
        tuple(_rows_of_cache(plan, start)),
    )


def _rows_of_cache(plan: Plan, rows: int) -> list[Range]:
    """Where the first rows of all keys and values lie."""
    found = []
    for buffer in plan.buffers:
        if buffer.kind == "kv_cache":
            for view in buffer.views:
                row_bytes = view.shape[1] * view.shape[2] * DTYPE_BYTES[view.dtype]
                at = buffer.offset_bytes + view.offset_bytes
                found.append((at, at + rows * row_bytes))
    return found
