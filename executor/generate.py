"""From logits to the next token: repetition penalty, then the most likely one, or temperature, top-p and a draw."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from planner.errors import InputError, NotFinite


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Temperature 0 takes the most likely one, and then top_p and seed mean nothing."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise InputError(f"temperature: wanted 0 to 100, found {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top-p: wanted above 0 and at most 1, found {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed: wanted a whole number from 0 to 2^63 - 1, found {self.seed}")
        if not 0.0 < self.repetition_penalty <= 100.0:
            raise InputError(
                f"repetition penalty: wanted above 0 and at most 100, found {self.repetition_penalty}"
            )


def seen_mask(ids: Iterable[int], vocabulary: int) -> Tensor:
    """True (V,) at every id of the prompt, image tokens included."""
    mask = torch.zeros(vocabulary, dtype=torch.bool)
    mask[torch.tensor(sorted(set(ids)), dtype=torch.int64)] = True
    return mask


def generator(sampling: Sampling) -> torch.Generator:
    """A generator on the CPU, so that the same seed draws the same tokens on every device."""
    return torch.Generator(device="cpu").manual_seed(sampling.seed)


def next_token(
    logits: Tensor, seen: Tensor, sampling: Sampling, draws: torch.Generator | None = None
) -> int:
    """The next token's id from logits (V,) of any float type on the CPU; `seen` (V,) marks ids of prompt and answer so far.

    The order is transformers': penalty, temperature, top-p, all in float32. NotFinite for logits that are not finite.
    """
    # copied, since the penalty is applied in place and the logits may still be saved
    # (in two moves: the change of type must not take memory on the device)
    scores = logits.detach().to("cpu").to(torch.float32, copy=True).view(-1)
    # not a number is what the maximum of anything with one is, and nothing can be chosen or drawn from such scores
    highest = float(scores.max())
    if not math.isfinite(highest):
        raise NotFinite(
            f"the logits are not finite ({highest}), so no token can be chosen: a weight or an intermediate value is not "
            "a number; run with --check to find the first step with one, or fetch the checkpoint anew"
        )
    if sampling.repetition_penalty != 1.0:
        penalised = scores[seen]
        scores[seen] = torch.where(
            penalised < 0,
            penalised * sampling.repetition_penalty,
            penalised / sampling.repetition_penalty,
        )
    likeliest = int(scores.argmax())
    if sampling.temperature == 0.0:
        return likeliest
    scores /= sampling.temperature
    # so cold (or a penalty so small) that float32 ends: what is left of the draw is its limit
    if not math.isfinite(float(scores.max())):
        return likeliest
    if sampling.top_p < 1.0:
        ordered, order = torch.sort(scores, descending=False)
        # the least likely ids whose probabilities together stay within 1 - top_p go; the last one always stays
        drop = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - sampling.top_p
        drop[-1] = False
        scores[order[drop]] = float("-inf")
    return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=draws))
