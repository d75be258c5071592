"""Answers in float16 beside transformers in float32 on the same weights, with and without massive activations."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from executor import ops
from planner.errors import NotFinite, RunFailed
from planner.plan import Plan
from tests.hostile.device import HostileDevice
from tests.hostile.scheduler import EXTREMES, Scheduler, by_rank

# of features up to 1.2 and logits up to 10, seen 8e-4 and 0.19 (one in 40,000; transformers' bfloat16 is 0.01 and 1.0 off)
FEATURES_APART, LOGITS_APART = 2e-3, 0.4
DECIDED = 0.2  # more than two logits of the tokens that matter are off


def decided(reference: Any) -> int:
    """How many tokens come before the first that rounding might have decided."""
    best = reference.logits.topk(2).values
    gaps = (best[:, 0] - best[:, 1]).tolist()
    return next((i for i, gap in enumerate(gaps) if gap < DECIDED), len(gaps))


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("part", [None, "text", "vision"])
def test_tokens_features_and_logits_are_those_of_float32(
    labs: Any, odd_tiles: Any, part: str | None, tiled: bool
) -> None:
    lab = labs(part)
    reference = lab.transformers()
    plan = lab.plan(tiles=odd_tiles if tiled else None)
    assert (plan.model.dtype, plan.model.stored) == ("float16", "bfloat16")
    found = lab.run(plan)
    assert (found.features - reference.features).abs().max() < FEATURES_APART
    count = decided(reference)
    assert count >= 4
    assert found.tokens[:count] == reference.tokens[:count]
    # a row of logits follows from the tokens before it
    assert (found.logits - reference.logits)[:count].abs().max() < LOGITS_APART
    if part is None:
        assert count == len(reference.tokens)


@pytest.mark.parametrize("part", ["text", "vision"])
def test_where_plain_float16_leaves_its_range_this_stays_nearer_to_float32_than_bfloat16(
    labs: Any, part: str
) -> None:
    lab = labs(part)
    reference, bfloat16 = lab.transformers(), lab.transformers(torch.bfloat16)
    plain = lab.transformers(torch.float16)
    assert not plain.logits.isfinite().all()
    assert set(plain.tokens) == {0}  # "!!!!"
    found = lab.run(lab.plan(), check=True)
    assert found.logits.isfinite().all()
    apart = (found.logits[0] - reference.logits[0]).abs().max()
    assert apart < (bfloat16.logits[0] - reference.logits[0]).abs().max() / 2


@pytest.mark.parametrize("part", ["text", "vision"])
def test_a_product_that_is_not_scaled_is_noticed(labs: Any, part: str) -> None:
    """The same run with the limit on gated products out of reach: what the two tests above would see without it."""
    lab = labs(part)
    step = {"text": "prefill/layers.1.mlp", "vision": "vision.*blocks.1.mlp"}[part]
    with (
        mock.patch.object(ops, "GATED_EXPONENT", 60),
        pytest.raises(
            NotFinite, match=f"^{step}: the first step where x is not finite.*too narrow"
        ),
    ):
        lab.run(lab.plan(), check=True)


def narrow(plan: Plan) -> Plan:
    """The plan with its residual streams in float16, as plans for float16 checkpoints had them before."""
    buffers = []
    for buffer in plan.buffers:
        views = [
            view.model_copy(update={"dtype": "float16"}) if view.name == "x" else view
            for view in buffer.views
        ]
        buffers.append(buffer.model_copy(update={"views": tuple(views)}))
    return plan.model_copy(update={"buffers": tuple(buffers)})


def test_an_older_plan_with_residual_streams_in_float16_runs_as_it_did(labs: Any) -> None:
    lab, massive = labs(), labs("text")
    reference = lab.transformers()
    found = lab.run(narrow(lab.plan()))
    assert found.tokens == reference.tokens
    with pytest.raises((NotFinite, RunFailed), match=r"not finite|no finite|not a number"):
        massive.run(narrow(massive.plan()))


@pytest.mark.parametrize("extreme", EXTREMES)
def test_weights_are_converted_before_they_leave_the_ring_of_pinned_pieces(
    labs: Any, extreme: str
) -> None:
    lab = labs()
    plan, scheduler = lab.plan(), Scheduler(by_rank(*EXTREMES[extreme]))
    with scheduler.threads():
        found = lab.run(plan, HostileDevice(scheduler), poison=True)
    plain = lab.run(plan)
    assert found.tokens == plain.tokens
    assert torch.equal(found.logits, plain.logits)


def test_rows_that_need_no_scaling_are_multiplied_as_they_are() -> None:
    gate, up = torch.randn(40, 90).half(), torch.randn(40, 90).half()
    weight, x = torch.randn(16, 90).half() / 9, torch.zeros(40, 16)
    wanted = torch.mm(torch.nn.functional.silu(gate) * up, weight.t()).float()
    out, scratch = torch.empty(40, 16, dtype=torch.float16), torch.empty(7, 16)
    ops.add_gated(x, gate, up, weight, None, out=out, scratch=scratch)
    assert torch.equal(x, wanted)


@pytest.mark.parametrize("size", [1.0, 60.0, 3e3, 6e4])
@pytest.mark.parametrize("rows", [1, 40])
def test_gated_products_of_any_size_are_near_to_float64(rows: int, size: float) -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(rows, 90).half(), torch.randn(rows, 90).half()
    gate[:, 3], up[:, 3] = size, -size
    weight, bias = torch.randn(16, 90).half() / 9, torch.randn(16).half()
    x = torch.randn(rows, 16)
    product = torch.nn.functional.silu(gate.double()) * up.double()
    wanted = x.double() + product @ weight.double().t() + bias.double()
    out, scratch = torch.empty(rows, 16, dtype=torch.float16), torch.empty(min(rows, 7), 16)
    ops.add_gated(x, gate, up, weight, bias, out=out, scratch=scratch)
    largest = wanted.abs().amax(dim=-1, keepdim=True)
    assert ((x.double() - wanted).abs() / largest).max() < 2e-3


def test_values_that_are_not_numbers_stay_so() -> None:
    gate, up = torch.ones(3, 8).half(), torch.ones(3, 8).half()
    gate[0, 1], up[1, 2], gate[2, 0] = torch.nan, torch.inf, 0
    up[2] = 0
    x = torch.zeros(3, 4)
    out, scratch = torch.empty(3, 4, dtype=torch.float16), torch.empty(3, 4)
    ops.add_gated(x, gate, up, torch.ones(4, 8).half(), None, out=out, scratch=scratch)
    assert x[:2].isnan().all()
    assert torch.equal(x[2], torch.zeros(4))
