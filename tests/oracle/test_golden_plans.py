"""The whole executor under plans that differ in every lever, against what transformers computed with the stored model."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from planner.check import check
from planner.errors import PlanFileError
from planner.plan import Plan


def differences(golden: Any, answer: Any) -> tuple[float, float]:
    """Largest difference of the image features, and of the last row of prefill's logits."""
    features = (answer.features - golden.expected["vision_features"]).abs().max()
    logits = (answer.prefill_logits[0] - golden.expected["last_logits"]).abs().max()
    return float(features), float(logits)


def test_the_settings_differ_in_every_lever(golden: Any, settings: dict[str, Any]) -> None:
    plans = [golden.plan(name) for name in settings]
    levers = [plan.levers for plan in plans]
    # the ends of a stage are always resident
    counted = [
        [r for r in found.residency if r.unit_class.endswith((".attn", ".mlp", ".lm_head"))]
        for found in levers
    ]
    assert len(plans) >= 8
    assert len({plan.dumps() for plan in plans}) == len(plans)
    assert {found.order for found in levers} == {"all_first", "vision_then_llm", "prefetch"}
    assert {found.images_together for found in levers} == {True, False}
    assert {found.staging_depth for found in levers} == {1, 2, 3}
    streamed = [not any(r.resident for r in residency) for residency in counted]
    assert {found.staging_depth for found, yes in zip(levers, streamed, strict=True) if yes} == {
        *(1, 2, 3)
    }
    assert any(all(r.resident == r.total for r in residency) for residency in counted)
    rows = len(golden.ids)
    assert {1, 7, rows} <= {min(found.tiles.prompt_rows, rows) for found in levers}
    patches = sum(image.patches for image in golden.images)
    windows = {found.tiles.window_rows for found in levers}
    assert {64, 81} <= windows
    assert max(windows) > patches
    assert any(found.tiles.query_rows % 2 and found.tiles.query_rows < patches for found in levers)


def test_features_logits_and_tokens_are_the_stored_ones_under_every_setting(
    golden: Any, setting: str
) -> None:
    answer = golden.run(golden.plan(setting))
    features, logits = differences(golden, answer)
    assert features < 1e-5
    assert logits < 1e-4
    assert list(answer.tokens) == golden.expected["greedy"].tolist()


def test_no_setting_reads_what_is_dead(golden: Any, setting: str) -> None:
    plain, poisoned = (
        golden.run(golden.plan(setting), poison=poison, max_new_tokens=4)
        for poison in (False, True)
    )
    assert torch.equal(plain.features, poisoned.features)
    assert torch.equal(plain.logits, poisoned.logits)


def test_the_searched_plans_give_the_stored_answer(golden: Any) -> None:
    free = golden.plan()
    smallest = free.prediction.smallest_budget_bytes
    least = golden.plan(budget_bytes=smallest)
    # opening the images takes more than this model's tower, so both peaks may be that of the load
    assert least.prediction.bound_peak_bytes <= smallest <= free.prediction.bound_peak_bytes
    for plan in (free, least):
        answer = golden.run(plan)
        assert max(differences(golden, answer)) < 1e-4
        assert list(answer.tokens) == golden.expected["greedy"].tolist()


def test_images_one_after_another_give_what_they_give_together(
    golden: Any, settings: dict[str, Any]
) -> None:
    base = settings["all streamed, two slots, odd tiles"]
    together, apart = (golden.run(golden.plan(base._replace(together=t))) for t in (True, False))
    # tiles of the MLP run across images where these stand together
    assert (together.features - apart.features).abs().max() < 1e-5
    assert together.tokens == apart.tokens


@pytest.mark.parametrize("spare_rows", [1, 9, 300])
def test_a_prompt_may_be_shorter_than_the_plan_s(
    golden: Any, setting: str, spare_rows: int
) -> None:
    answer = golden.run(golden.plan(setting, spare_rows=spare_rows), max_new_tokens=3)
    assert differences(golden, answer)[1] < 1e-4
    assert list(answer.tokens) == golden.expected["greedy"].tolist()[:3]


@pytest.mark.parametrize("new_tokens", [1, 2, 11])
def test_a_run_may_ask_for_fewer_tokens_than_the_plan(
    golden: Any, setting: str, new_tokens: int
) -> None:
    answer = golden.run(golden.plan(setting), max_new_tokens=new_tokens)
    assert list(answer.tokens) == golden.expected["greedy"].tolist()[:new_tokens]
    assert len(answer.logits) == new_tokens


def test_a_plan_for_one_new_token_has_no_decode(golden: Any, setting: str) -> None:
    plan = golden.plan(setting, new_tokens=1)
    assert not any(step.phase == "decode" for step in plan.steps)
    assert list(golden.run(plan).tokens) == golden.expected["greedy"].tolist()[:1]


def test_a_stop_token_ends_the_answer_and_the_reader(golden: Any, setting: str) -> None:
    expected = golden.expected["greedy"].tolist()
    end = expected.index(expected[1]) + 1
    answer = golden.run(golden.plan(setting), stop=(expected[1],))
    assert list(answer.tokens) == expected[:end]
    assert len(expected) > end
    first = golden.run(golden.plan(setting), stop=(expected[0],))
    assert list(first.tokens) == expected[:1]
    assert not [t for t in threading.enumerate() if t.name == "stowplan-reader"]


# --- what these tests can see -------------------------------------------------------------------------------------


def swapped(plan: Plan, phase: str) -> Plan:
    """The plan with the weight buffers of two MLPs of the phase exchanged."""
    steps = list(plan.steps)
    where = [i for i, s in enumerate(steps) if s.phase == phase and s.kind.endswith("mlp")]
    first, second = where[:2]
    steps[first], steps[second] = (
        steps[first].model_copy(update={"weights": steps[second].weights}),
        steps[second].model_copy(update={"weights": steps[first].weights}),
    )
    return plan.model_copy(update={"steps": tuple(steps)})


@pytest.mark.parametrize("phase", ["vision", "prefill", "decode"])
def test_weights_from_another_block_s_place_are_noticed(
    golden: Any, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = golden.plan("all resident, nothing tiled")
    plan = swapped(good, phase)
    assert any("wants" in problem for problem in check(plan))
    with pytest.raises(PlanFileError, match=r"wants .* which holds"):
        golden.run(plan)
    monkeypatch.setattr("executor.prepare.check_order", lambda plan: None)
    expected, answer = golden.run(good), golden.run(plan)
    assert (answer.features - expected.features).abs().max() > 1e-3 or phase != "vision"
    rows = answer.prefill_logits if phase != "decode" else answer.logits[1]
    wanted = expected.prefill_logits if phase != "decode" else expected.logits[1]
    assert (rows - wanted).abs().max() > 1e-2


def test_a_slot_refilled_too_early_is_noticed(golden: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    good = golden.plan("all streamed, one slot, one window")
    copies = tuple(
        copy.model_copy(update={"after": None}) if copy.phase == "prefill" else copy
        for copy in good.copies
    )
    plan = good.model_copy(update={"copies": copies})
    assert any("before its last use" in problem for problem in check(plan))
    with pytest.raises(PlanFileError, match="may begin before staging"):
        golden.run(plan)
    monkeypatch.setattr("executor.prepare.check_order", lambda plan: None)

    def dawdle(step: str) -> None:
        if step == "prefill/layers.0.mlp":
            time.sleep(
                0.2
            )  # meanwhile all copies of prefill land, so that the slot holds the last unit

    assert max(differences(golden, golden.run(plan, on_step=dawdle))) > 1e-2
