"""Fresh random checkpoints and pictures in float32: transformers' greedy tokens, whatever the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from executor.prepare import Request
from executor.run import run

NEW_TOKENS = 12
# of logits up to 9; transformers' own are up to 1.6e-4 from the same model in float64, ours 1.0e-4
LOGITS_APART = 3e-4


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("specification", ["tiny", "tiny-tied"])
def test_tokens_are_transformers_own(
    labs: Any,
    pictures: dict[str, Any],
    settings: dict[str, Any],
    specification: str,
    seed: int,
    request_name: str,
) -> None:
    lab, shown = labs(specification, seed), pictures[request_name]
    assert lab.shape.text.tied == (specification == "tiny-tied")
    ids = lab.prompt(shown.images)
    tokens, logits = lab.oracle().generate(ids, shown.batch, NEW_TOKENS)
    assert len(set(tokens)) > 4  # an answer that is one token over and over would prove little
    workload = lab.workload(shown.images, ids, NEW_TOKENS)
    # the search's plan, and three settings in turn: each meets every picture over the checkpoints
    names = list(settings)
    first = 3 * (2 * seed + (specification == "tiny")) + list(pictures).index(request_name)
    for name in (None, *(names[(first + i) % len(names)] for i in range(3))):
        answer = lab.run(lab.plan(workload, name), shown.paths, ids)
        assert answer.tokens == tokens, name
        assert (answer.logits - logits).abs().max() < LOGITS_APART, name
        assert torch.equal(answer.prefill_logits, answer.logits[:1])
        if shown.batch is not None:
            features = lab.oracle().features(shown.batch)
            assert answer.features.shape == features.shape
            assert (answer.features - features).abs().max() < 1e-5, name


def test_a_prompt_as_text_is_the_same_prompt(labs: Any, pictures: dict[str, Any]) -> None:
    lab, shown = labs("tiny"), pictures["two at once"]
    text = "Describe this picture."
    ids = lab.prompt(shown.images, text)
    tokens, _ = lab.oracle().generate(ids, shown.batch, 6)
    plan = lab.plan(lab.workload(shown.images, ids, 6))
    answer = lab.run(plan, shown.paths, ids, prompt=text, tokenizer=lab.folder)
    assert answer.tokens == tokens


def test_saving_outputs_changes_nothing(labs: Any, pictures: dict[str, Any]) -> None:
    lab, shown = labs("tiny"), pictures["square"]
    ids = lab.prompt(shown.images)
    plan = lab.plan(lab.workload(shown.images, ids, 6))
    saved = lab.run(plan, shown.paths, ids)
    request = Request(locations=lab.checkpoint.tensors, images=shown.paths, prompt=ids, stop=())
    # with the checkpoint's own repetition penalty, so that both differ if the penalty touches what is saved
    plain = run(plan, request)
    again = lab.run(plan, shown.paths, ids, sampling=None)
    assert plain.tokens == again.tokens
    assert torch.equal(saved.prefill_logits, again.prefill_logits)


def test_the_penalty_is_transformers_own(labs: Any, pictures: dict[str, Any]) -> None:
    lab, shown = labs("tiny-tied"), pictures["square"]
    ids = lab.prompt(shown.images)
    tokens, _ = lab.oracle().generate(ids, shown.batch, NEW_TOKENS, repetition_penalty=1.5)
    unpenalised, _ = lab.oracle().generate(ids, shown.batch, NEW_TOKENS)
    assert tokens != unpenalised
    plan = lab.plan(lab.workload(shown.images, ids, NEW_TOKENS))
    assert lab.run(plan, shown.paths, ids, penalty=1.5).tokens == tokens
