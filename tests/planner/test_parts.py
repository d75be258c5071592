"""Seconds and live bytes by index, against the program, its graph and its timeline."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from planner.graph import build, lifetimes, live_bytes
from planner.parts import Bare, Frame, Parts
from planner.problem import Problem, Request
from planner.profile import load_profile
from planner.schedule import Choice, PhaseResidency
from planner.space import Space
from planner.variants import evaluate_ordered
from planner.worked import early_starts, worked

LAYERS = DEPTH = 4
HEADS = 3


def drawn_residency(draw: random.Random, attn: int, mlp: int, head: int = 0) -> PhaseResidency:
    counts = draw.randint(0, attn), draw.randint(0, mlp), draw.randint(0, head)
    return PhaseResidency(*counts, draw.choice(["late", "early", "middle"]))


def drawn_choice(kit: Any, draw: random.Random) -> Choice:
    """Every lever at random; half of the residencies by counts, half by name."""
    decode = drawn_residency(draw, LAYERS, LAYERS, HEADS)
    prefill = drawn_residency(draw, decode.attn, decode.mlp, decode.head)
    vision = drawn_residency(draw, DEPTH, DEPTH)
    if draw.random() < 0.5:
        inner = decode.positions((LAYERS, LAYERS, HEADS))
        decode = PhaseResidency.of(
            *(
                draw.sample(range(t), len(p))
                for t, p in zip((LAYERS, LAYERS, HEADS), inner, strict=True)
            )
        )
        assert decode.sets is not None
        counts = (prefill.attn, prefill.mlp, prefill.head)
        prefill = PhaseResidency.of(
            *(draw.sample(sorted(p), n) for p, n in zip(decode.sets, counts, strict=True))
        )
    return kit.choice(
        order=draw.choice(["all_first", "vision_then_llm", "prefetch"]),
        images_together=draw.random() < 0.5,
        depth=draw.randint(1, 3),
        vision=vision,
        prefill=prefill,
        decode=decode,
    )  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", range(120))
def test_seconds_and_live_bytes_are_those_of_the_program(kit: Any, seed: int) -> None:
    draw = random.Random(seed)
    images = [(336, 252), (420, 168)][: draw.randint(0, 2)]
    workload = kit.workload(images, new=draw.choice([1, 2, 9]))
    profile = kit.toy(draw)
    problem = Problem(Request(kit.tiny(), workload, None), profile)
    if not problem.on_cpu:
        problem.pinned_bytes = int(draw.choice([0.0, 0.2, 0.5, 1.0]) * problem.total_bytes)
    choice = drawn_choice(kit, draw)
    if choice.order == "prefetch" and not images:
        return
    found = worked(Parts(problem), choice)
    slow = evaluate_ordered(problem, choice)
    assert found.seconds == pytest.approx(slow.seconds, rel=1e-9)
    program = slow.program
    sizes = {name: buffer.size_bytes for name, buffer in program.buffers.items()}
    live = live_bytes(lifetimes(build(program), program), sizes, len(program.steps))
    assert found.live == max(live)


def random_tiles(draw: random.Random, space: Space, together: bool) -> dict[str, int]:
    tiles: dict[str, int] = {}
    for options in (space.vision[together], space.prefill):
        for found in options.values():
            tiles.update(draw.choice(found).tiles)
    return tiles


@pytest.mark.parametrize("seed", range(40))
def test_bytes_on_the_cpu_are_never_less_than_the_closed_form_says_and_rarely_more(
    kit: Any, seed: int
) -> None:
    draw = random.Random(seed)
    images = [(336, 252), (420, 168)][: draw.randint(0, 2)]
    workload = kit.workload(images, new=draw.choice([1, 2, 9]), prompt=draw.choice([8, 500]))
    problem = Problem(Request(kit.tiny(), workload, None), load_profile("cpu"))
    space = Space(problem)
    choice = drawn_choice(kit, draw)
    drawn = random_tiles(draw, space, choice.images_together or len(images) < 2)
    choice = replace(
        choice,
        order=choice.order if images else "vision_then_llm",
        tiles=choice.tiles.model_copy(update=drawn),
    )
    found = worked(space.parts, choice)
    exact = evaluate_ordered(problem, choice)
    least = space.footprint.bound(choice, found.live, found.held)
    assert least <= exact.bound_bytes
    gap = exact.layout.height_bytes - exact.layout.lower_bound_bytes
    if exact.bound_bytes > exact.load_bytes + exact.error_bytes:
        assert exact.bound_bytes <= least + gap + 2**17


def test_scratch_stays_beside_the_slot_that_later_weights_fill() -> None:
    # one slot of 100 bytes: attention's weights fill 40 of them, those of the MLP all
    bare = Bare(
        kinds=["self_attn", "text_mlp", "norm"],
        images=[()] * 3,
        units=[40, 100, 0],
        live=[7, 8, 9],
        unwritten=[0, 0, 0],
        host=[0, 0, 0],
        passing=[0, 0, 0],
    )
    frame = Frame(bare, [], [], [], live=[107, 108, 9], held=[47, 108, 9])
    assert frame.still["self_attn", "self_attn", ()] == 47
    assert frame.still["self_attn", "text_mlp", ()] == 107
    assert frame.still["text_mlp", "norm", ()] == 108


def test_what_arrives_early_fits_until_it_is_used() -> None:
    free = [9, 3, 8, 8, 10]
    assert early_starts(free, [3, 4, 2, 5]) == [0, 2, 4, 5]
