"""bfloat16: as near to float32 as transformers' own bfloat16, and the same bits under plans with equal row tiles.

Noise of so few numbers scatters: over one request of 12 tokens ours is 0.8 to 1.25 times transformers' sdpa, their eager
attention 0.9 to 1.5 times. So 1.2 is asked over all requests of a checkpoint together, 1.5 of each; transformers' noise is that over all of them too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

NEW_TOKENS = 12
CHECKPOINTS = [(name, seed) for name in ("tiny:bfloat16", "tiny-tied:bfloat16") for seed in (0, 1)]


def differences(rows: torch.Tensor, reference: torch.Tensor) -> float:
    """Sum of squares."""
    return float((rows - reference).square().sum())


Rows = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor
]  # ours, transformers' in bfloat16, in float32


def assert_near(found: list[Rows]) -> None:
    """Distance at most 1.2 times transformers' own, and another argmax only where the two best are nearer than its noise."""
    ours, theirs, reference = (torch.cat(rows) for rows in zip(*found, strict=True))
    assert 0 < differences(ours, reference) < 1.2**2 * differences(theirs, reference)
    if not torch.cpu._is_avx512_supported():
        # 16-bit products go through other kernels there: one case in 16 lies 4 % beyond this noise
        pytest.skip("the distance holds; which is largest is compared on CPUs with AVX-512 alone")
    best = reference.topk(2).values
    other = ours.argmax(dim=1) != reference.argmax(dim=1)
    noise = (theirs - reference).abs().max()
    assert bool(((best[:, 0] - best[:, 1])[other] < noise).all())


@pytest.mark.parametrize(("specification", "seed"), CHECKPOINTS)
def test_an_answer_is_as_near_to_float32_as_transformers_own(
    labs: Any, pictures: dict[str, Any], settings: dict[str, Any], specification: str, seed: int
) -> None:
    lab = labs(specification, seed)
    reference, theirs = lab.oracle(torch.float32), lab.oracle(torch.bfloat16)
    found: list[Rows] = []
    for number, shown in enumerate(pictures.values()):
        ids = lab.prompt(shown.images)
        workload = lab.workload(shown.images, ids, NEW_TOKENS)
        name = [None, *settings][(number + 5 * seed) % (len(settings) + 1)]
        answer = lab.run(lab.plan(workload, name), shown.paths, ids)
        # teacher-forced: all three are given the tokens that we chose
        exact = reference.forced(ids, shown.batch, answer.tokens)
        other = theirs.forced(ids, shown.batch, answer.tokens)
        assert differences(answer.logits, exact) < 1.5**2 * differences(other, exact)
        found.append((answer.logits, other, exact))
    assert_near(found)


@pytest.mark.parametrize(("specification", "seed"), CHECKPOINTS)
def test_prefill_is_as_near_to_float32_as_transformers_own(
    labs: Any, pictures: dict[str, Any], settings: dict[str, Any], specification: str, seed: int
) -> None:
    lab = labs(specification, seed)
    reference, theirs = lab.oracle(torch.float32), lab.oracle(torch.bfloat16)
    found: list[Rows] = []
    prefixes = (0, 4, 8, 11)
    for number, shown in enumerate(pictures.values()):
        ids = lab.prompt(shown.images)
        tokens, exact = reference.generate(ids, shown.batch, NEW_TOKENS)
        other = torch.cat(
            [theirs.forced([*ids, *tokens[:n]], shown.batch, tokens[n : n + 1]) for n in prefixes]
        )
        name = [*settings, None][(number + 5 * seed) % (len(settings) + 1)]
        plan = lab.plan(lab.workload(shown.images, len(ids) + max(prefixes), 1), name)
        rows = torch.cat(
            [lab.run(plan, shown.paths, [*ids, *tokens[:n]]).prefill_logits for n in prefixes]
        )
        found.append((rows, other, exact[list(prefixes)]))
    assert_near(found)


@pytest.mark.parametrize("request_index", range(6))
def test_plans_with_equal_row_tiles_give_equal_bits(
    labs: Any, pictures: dict[str, Any], settings: dict[str, Any], request_index: int
) -> None:
    lab, shown = labs("tiny:bfloat16"), list(pictures.values())[request_index]
    ids = lab.prompt(shown.images)
    workload = lab.workload(shown.images, ids, NEW_TOKENS)
    tiles = settings["all streamed, two slots, odd tiles"].tiles
    answers = [
        # images that stand together share tiles of the MLP: that is a matter of rows too
        lab.run(lab.plan(workload, s._replace(tiles=tiles, together=True)), shown.paths, ids)
        for s in settings.values()
    ]
    for answer in answers[1:]:
        assert answer.tokens == answers[0].tokens
        assert torch.equal(answer.logits, answers[0].logits)
        assert torch.equal(answer.features, answers[0].features)


def test_other_row_tiles_change_low_bits(
    labs: Any, pictures: dict[str, Any], settings: dict[str, Any]
) -> None:
    lab, shown = labs("tiny:bfloat16"), pictures["square"]
    ids = lab.prompt(shown.images)
    workload = lab.workload(shown.images, ids, 1)
    odd, whole = (
        lab.run(lab.plan(workload, name), shown.paths, ids).logits
        for name in ("all streamed, two slots, odd tiles", "all resident, nothing tiled")
    )
    assert not torch.equal(odd, whole)
