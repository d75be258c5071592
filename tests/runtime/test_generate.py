from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from executor.generate import Sampling, generator, next_token, seen_mask
from planner.errors import InputError

VOCABULARY = 500


def oracle(logits: Tensor, ids: list[int], sampling: Sampling) -> Tensor:
    """The scores that transformers draws from."""
    steps = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1.0:
            steps.append(TopPLogitsWarper(sampling.top_p))
    scores: Tensor = steps(torch.tensor([ids]), logits.float().view(1, -1).clone())
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("penalty", [1.0, 1.05, 1.5, 0.7])
def test_the_most_likely_token_is_transformers(dtype: torch.dtype, penalty: float) -> None:
    torch.manual_seed(0)
    sampling = Sampling(repetition_penalty=penalty)
    for _ in range(50):
        logits = (torch.randn(VOCABULARY) * 3).to(dtype)
        # the likeliest ids have been seen, so that the penalty decides
        ids = [*logits.float().topk(5).indices.tolist(), 3, 3, 7]
        kept = logits.clone()
        token = next_token(logits, seen_mask(ids, VOCABULARY), sampling)
        assert token == int(oracle(logits, ids, sampling).argmax())
        assert torch.equal(logits, kept)


@pytest.mark.parametrize("temperature", [0.1, 0.8, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [0.001, 0.5, 0.9, 1.0])
def test_drawn_tokens_are_transformers_with_the_same_generator(
    temperature: float, top_p: float
) -> None:
    torch.manual_seed(1)
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=7, repetition_penalty=1.05)
    ours, theirs = generator(sampling), generator(sampling)
    for _ in range(50):
        logits = torch.randn(VOCABULARY) * 2
        ids = logits.topk(20).indices.tolist()
        token = next_token(logits, seen_mask(ids, VOCABULARY), sampling, ours)
        probabilities = oracle(logits, ids, sampling).softmax(-1)
        assert token == int(torch.multinomial(probabilities, 1, generator=theirs))


def test_the_likeliest_id_stays_however_small_top_p_is() -> None:
    torch.manual_seed(2)
    sampling = Sampling(temperature=1.0, top_p=1e-9)
    for _ in range(100):
        logits = torch.randn(VOCABULARY)
        token = next_token(logits, seen_mask([], VOCABULARY), sampling, generator(sampling))
        assert token == int(logits.argmax())


@pytest.mark.parametrize(
    ("temperature", "top_p", "penalty"),
    [(1e-38, 0.9, 1.0), (1e-40, 1.0, 1.0), (1e-46, 1.0, 1.0), (1.0, 1.0, 1e-39)],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_beyond_float32_choose_the_likeliest_id(
    temperature: float, top_p: float, penalty: float, sign: int
) -> None:
    logits = sign * torch.tensor([1.0, 5.0, 3.0])
    seen = seen_mask([1 if sign > 0 else 0], 3)
    sampling = Sampling(temperature=temperature, top_p=top_p, repetition_penalty=penalty)
    assert next_token(logits, seen, sampling, generator(sampling)) == (1 if sign > 0 else 0)


def test_the_same_seed_draws_the_same_tokens_and_another_one_does_not() -> None:
    logits, seen = torch.zeros(VOCABULARY), seen_mask([], VOCABULARY)

    def draw(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        draws = generator(sampling)
        return [next_token(logits, seen, sampling, draws) for _ in range(8)]

    assert draw(3) == draw(3) != draw(4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("seed", -1),
        ("repetition_penalty", 0.0),
    ],
)
def test_a_setting_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"{name.replace('_', '.')}: wanted .*found"):
        Sampling(**{name: value})  # type: ignore[arg-type]
