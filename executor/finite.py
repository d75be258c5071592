"""What check runs look for in the rows that steps hand on: values that are not numbers."""

from __future__ import annotations

import math

import torch

from executor.arena import Arena
from planner.errors import NotFinite
from planner.plan import Plan
from planner.plan.program import Step


def check_finite(plan: Plan, step: Step, arena: Arena, *, prompt_tokens: int) -> None:
    """Nothing, if the rows that the step hands on are finite; NotFinite names the step if not.

    To be called after a step, but for `sample` before it: its logits are whole only with the last row tile.
    """
    if step.kind in ("merger", "lm_head"):
        return  # their rows are whole with a later step
    views = arena.views(step)
    arena.host_waits()
    for name in ("x", "hidden", "logits"):
        if name not in views:
            continue
        rows = views[name]
        if step.phase == "prefill" and name == "x":
            rows = rows[:prompt_tokens]  # the plan may have room for more
        # both are not a number where any value is; no temporary of the rows' size
        least, most = torch.aminmax(rows)
        if not (math.isfinite(float(least)) and math.isfinite(float(most))):
            owner = step.unit or ("lm_head" if step.kind == "sample" else "the embedding")
            raise NotFinite(
                f"{step.id}: the first step where {name} is not finite: a weight of {owner} is not a number, "
                f"or {plan.model.dtype} is too narrow for the values; fetch the checkpoint anew"
            )
