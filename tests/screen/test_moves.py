from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.evaluate import Evaluated, evaluate
from planner.fronts import START
from planner.moves import USUAL, moves, usual, usual_choice
from planner.problem import Problem
from planner.profile import load_profile
from planner.schedule import Choice, PhaseResidency
from planner.search import usual_way


@pytest.fixture(scope="module")
def problem(kit: Any) -> Problem:
    return Problem(kit.request(), load_profile("rtx-5080-16gb"))


def choice(**changes: Any) -> Choice:
    """Everything differs from the usual way, unless changed."""
    nothing = PhaseResidency(0, 0)
    fields: dict[str, Any] = {
        "order": "vision_then_llm",
        "images_together": True,
        "depth": 1,
        "vision": nothing,
        "prefill": PhaseResidency(0, 2),
        "decode": PhaseResidency(0, 4, 1),
        "tiles": START.model_copy(update={"vocabulary_rows": 65536}),
    }
    return Choice(**(fields | changes))


def test_each_move_is_priced_against_the_same_plan_with_that_one_undone(problem: Problem) -> None:
    start = choice()
    best = evaluate(problem, start)
    every, text = 2**30, PhaseResidency(28, 28, 3)

    def tiles(**changes: int) -> Choice:
        return replace(start, tiles=start.tiles.model_copy(update=changes))

    undone = {
        "LLM after the vision tower (MAX)": replace(start, order="all_first"),
        "vision streamed, 64 of 64 block halves": replace(start, vision=PhaseResidency(32, 32)),
        "vision attention in tiles": tiles(window_rows=every, query_rows=every, query_heads=16),
        "vision MLP, patches and merger in tiles": tiles(
            patch_rows=every, vision_mlp_rows=every, merger_rows=every
        ),
        "LLM streamed in prefill, 57 of 59 units": replace(start, prefill=start.decode),
        "LLM streamed in decode, 54 of 59 units": replace(start, decode=text),
        "prompt in tiles": tiles(prompt_rows=every, prompt_heads=4, prompt_mlp_rows=every),
        "vocabulary in tiles": replace(
            tiles(vocabulary_rows=152064), decode=PhaseResidency(0, 4, 0)
        ),
        "one staging slot instead of two": replace(start, depth=2),
    }
    wanted = {}
    for name, setting in undone.items():
        other = evaluate(problem, setting)
        start = [problem.start_s(c.tiles) for c in (best.choice, setting)]
        paid = best.seconds - other.seconds + (start[0] - start[1])
        wanted[name] = (other.bound_bytes - best.bound_bytes, paid)
    found = {m.name: (m.saved_bytes, m.paid_seconds) for m in moves(problem, best)}
    assert found == {name: price for name, price in wanted.items() if price != (0, 0.0)}
    assert len(found) >= 8
    assert found["LLM streamed in decode, 54 of 59 units"][0] > 10 * 2**30


def test_the_usual_way_makes_no_move_and_is_what_it_is_called(problem: Problem, kit: Any) -> None:
    found: Evaluated = evaluate(problem, usual_choice(problem))
    assert moves(problem, found) == ()
    row = usual(problem)
    whole = usual_way(kit.request(), load_profile("rtx-5080-16gb")).prediction
    assert row.name == USUAL
    assert (row.bound_bytes, row.seconds) == (whole.bound_peak_bytes, whole.seconds)


def test_streaming_that_is_the_same_in_prefill_and_decode_is_one_move(problem: Problem) -> None:
    same = PhaseResidency(0, 4, 1)
    names = [m.name for m in moves(problem, evaluate(problem, choice(prefill=same, decode=same)))]
    assert [name for name in names if name.startswith("LLM streamed")] == [
        "LLM streamed in prefill and decode, 54 of 59 units"
    ]


def test_a_vocabulary_too_large_for_one_product_is_no_move_of_the_plan(kit: Any) -> None:
    large = Problem(kit.request("72b"), load_profile("rtx-5080-16gb"))
    assert not any(m.name.startswith("vocabulary") for m in moves(large, evaluate(large, choice())))


@pytest.mark.parametrize("vram", ["16GB", "8GB", "3GB"])
def test_a_plan_carries_its_moves_and_the_usual_way(kit: Any, vram: str) -> None:
    plan = kit.plan("7b", vram)
    names = [move.name for move in plan.prediction.moves]
    assert len(set(names)) == len(names) >= 3
    assert "vision attention in tiles" in names
    assert plan.prediction.variants[-1].name == USUAL
    assert not plan.prediction.variants[-1].fits
    streams = any(r.resident < r.total for r in plan.levers.residency if r.phase == "decode")
    assert streams == any("streamed in" in name for name in names)


def test_text_alone_has_no_moves_of_the_vision_tower(kit: Any) -> None:
    plan = kit.plan("7b", "8GB", images=())
    assert plan.prediction.moves
    assert not any("vision" in move.name for move in plan.prediction.moves)
    assert [v.name for v in plan.prediction.variants] == [USUAL]
