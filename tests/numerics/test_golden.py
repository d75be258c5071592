"""Our steps against what transformers computed with the tiny model in float32, under many tilings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

TILINGS: dict[str, dict[str, int]] = {
    "larger than the input": {},
    "one window, one row": {
        "patch_rows": 1,
        "window_rows": 1,
        "query_rows": 1,
        "query_heads": 1,
        "vision_mlp_rows": 1,
        "merger_rows": 1,
        "prompt_rows": 1,
        "prompt_heads": 1,
        "prompt_mlp_rows": 1,
        "vocabulary_rows": 1,
    },
    "odd": {
        "patch_rows": 37,
        "window_rows": 81,
        "query_rows": 29,
        "query_heads": 1,
        "vision_mlp_rows": 53,
        "merger_rows": 5,
        "prompt_rows": 7,
        "prompt_heads": 1,
        "prompt_mlp_rows": 11,
        "vocabulary_rows": 100,
    },
    "a plan for a longer prompt": {"prompt_rows": 16, "spare_rows": 9},
}


@pytest.mark.parametrize("tiling", TILINGS)
def test_features_logits_and_tokens_equal_transformers_under_every_tiling(
    tiny: Any, tiling: str
) -> None:
    model = tiny.model(**TILINGS[tiling])
    features = model.encode()
    assert (features - tiny.expected["vision_features"]).abs().max() < 1e-5
    tokens = model.greedy(12)
    assert tokens == tiny.expected["greedy"].tolist()


@pytest.mark.parametrize("tiling", TILINGS)
def test_the_last_row_of_logits_is_within_1e_4(tiny: Any, tiling: str) -> None:
    model = tiny.model(**TILINGS[tiling])
    model.encode()
    assert (model.prefill() - tiny.expected["last_logits"]).abs().max() < 1e-4


def test_images_one_after_another_give_what_they_give_together(tiny: Any) -> None:
    together, apart = tiny.model(), tiny.model()
    # tiles of the MLP run across images where these stand together
    assert (together.encode() - apart.encode(together=False)).abs().max() < 1e-6


def test_an_image_does_not_attend_to_another(tiny: Any) -> None:
    changed = tiny.model()
    changed.vision_run.pixels[1].values.neg_()
    first = tiny.grids[0][0] * tiny.grids[0][1] // 4
    features, others = tiny.model().encode(), changed.encode()
    assert torch.equal(features[:first], others[:first])
    assert not torch.allclose(features[first:], others[first:])


def test_a_decoded_row_equals_the_same_row_of_a_longer_prompt(tiny: Any) -> None:
    model, longer = tiny.model(), tiny.model()
    model.encode()
    token = int(model.prefill().argmax())
    decoded = model.decode(token, len(model.ids))
    longer.ids = [*longer.ids, token]
    longer.x = torch.cat((longer.x, longer.x[-1:]))
    longer.encode()
    assert (longer.prefill() - decoded).abs().max() < 1e-5
