"""The same plans on the CPU and on a card: every order, depth, residency and tile, units kept in host memory too.

float32: equal tokens; features and logits within 1e-4 of their largest value (the card's kernels sum in another order).
16 bits: beside a float32 run with the same weights the card may be at most half as far away again as the CPU is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from planner.plan import Plan
from tests.hostile.lab import SETTINGS, Answer

NAMES = ("image_features", "prefill_logits", "logits")
FLOAT32 = 1e-4
HALF = {"bfloat16": 1e-3, "float16": 1e-4}  # beside half as much again, of the norm


def distance(found: Answer, reference: Answer, name: str) -> float:
    """Of the reference's norm."""
    left, right = found.tensors[name].double(), reference.tensors[name].double()
    # after a token that differs the rows have nothing to do with one another
    rows = 1 if name == "logits" else left.shape[0]
    return float((left[:rows] - right[:rows]).norm() / right[:rows].norm())


def test_a_plan_gives_the_cpu_s_answer_in_float32(labs: Any, kind: str, setting: str) -> None:
    found, wanted = labs.lab(kind).expected(setting), labs.lab("cpu").expected(setting)
    assert torch.equal(found.tensors["tokens"], wanted.tensors["tokens"])
    for name in NAMES:
        left, right = found.tensors[name], wanted.tensors[name]
        assert float((left - right).abs().max()) <= FLOAT32 * float(right.abs().max()), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_plan_is_as_near_to_float32_as_the_cpu_is(
    labs: Any, kind: str, dtype: str, setting: str
) -> None:
    if kind == "cpu" and setting not in ("all resident, first", "all streamed, 2 slots"):
        pytest.skip("the CPU beside itself: two settings are enough")
    if kind == "cuda" and dtype == "bfloat16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this card has no bfloat16")
    pair = labs.pair(kind, dtype, setting)
    for name in NAMES:
        far = distance(pair.same, pair.reference, name)
        assert 0 < far < 0.1, name  # 16 bits, and the same model
        assert distance(pair.found, pair.reference, name) <= 1.5 * far + HALF[dtype], name


def test_plans_of_equal_row_tiles_give_equal_tokens(labs: Any, kind: str) -> None:
    dtype = "float32" if kind == "cpu" else "float16"
    by_tiles: dict[Any, list[tuple[str, list[int]]]] = {}
    for name, setting in SETTINGS.items():
        if not setting.tied:
            tokens = labs.lab(kind, dtype).expected(name).tensors["tokens"].tolist()
            key = setting.tiles.model_copy(update={"vocabulary_rows": 1})
            by_tiles.setdefault(key, []).append((name, tokens))
    assert max(len(group) for group in by_tiles.values()) >= 3
    for group in by_tiles.values():
        assert len({tuple(tokens) for _, tokens in group}) == 1, group


def test_the_plans_name_the_kernel_of_their_device(labs: Any, kind: str) -> None:
    plan: Plan = labs.lab(kind).plan("all streamed, 1 slot")
    wanted = "cpu_flash" if kind == "cpu" else "efficient"  # float32
    assert {step.kernel for step in plan.steps if step.kernel} == {wanted}
