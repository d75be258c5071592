"""What is true of one setting of the levers, whether the canonical space has it or not: its bytes, its seconds, its residents."""

from __future__ import annotations

from dataclasses import replace

from planner.evaluate import Evaluated
from planner.fronts import Options
from planner.parts import Frame
from planner.plan.words import Phase
from planner.schedule import Choice
from planner.space import Space
from planner.worked import Worked, plain_bytes, worked


def residents(space: Space, choice: Choice) -> tuple[object, ...]:
    """Equal for settings whose residents are the same units, whatever names them."""
    blocks = space.problem.model.vision.depth
    totals = space.parts.totals(choice.tiles.vocabulary_rows)
    return (
        choice.order,
        choice.images_together,
        choice.depth,
        *choice.vision.positions((blocks, blocks)),
        *choice.prefill.positions(totals, choice.decode),
        *choice.decode.positions(totals),
    )


def phases(space: Space, choice: Choice) -> list[tuple[Phase, Frame, Options]]:
    """The parts of a setting, with what tiles they may have."""
    frames = space.parts.frames(choice, first=choice.order == "all_first")
    return [
        (phase, frame, space.options(phase, choice.images_together))
        for phase, frame in frames.items()
    ]


def plain_bound(space: Space, choice: Choice) -> int:
    """Device bytes by the closed form, with vision before the language model."""
    return space.footprint.bound(choice, *plain_bytes(space.parts, choice))


def weighed_seconds(space: Space, found: Evaluated) -> float:
    """Seconds by which plans are compared: with what their tiles add to the start."""
    return found.seconds + space.start(found.choice.tiles)


def spared(space: Space, choice: Choice) -> tuple[Choice, Worked, int]:
    """The setting, worked out, and bytes beyond the budget by the closed form.

    Under `prefetch`, where it would fit in the plain order, with so much less arriving early that it fits.
    """
    budget = space.problem.request.budget_bytes
    more, before = 0, None
    while True:
        found = worked(space.parts, choice)
        if budget is None:
            return choice, found, 0
        excess = space.footprint.bound(choice, found.live, found.held) - budget
        early = choice.order == "prefetch" and excess > 0
        if not early or plain_bound(space, choice) > budget:
            return choice, found, excess
        # too much beside the steps of the vision tower: let so much less arrive early, or twice what changed nothing
        more = 2 * more if found == before else excess
        choice, before = replace(choice, spare_bytes=choice.spare_bytes + more), found
