"""bfloat16 on a small random model: our steps stay as near to float32 as transformers' own bfloat16 does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

CONFIG: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "image_token_id": 500,
    "video_token_id": 501,
    "vision_start_token_id": 502,
    "vision_end_token_id": 503,
    "vision_config": {
        "depth": 3,
        "hidden_size": 160,
        "intermediate_size": 220,
        "num_heads": 2,
        "hidden_act": "silu",
        "in_chans": 3,
        "out_hidden_size": 256,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
    },
}
GRID = (20, 26)


@pytest.fixture(scope="module")
def oracle() -> Any:
    """transformers' model in float32, with weights that bfloat16 holds exactly."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(**copy.deepcopy(CONFIG))
    config._attn_implementation = "sdpa"
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        parameter.data = parameter.data.bfloat16().float()
    return model


def published(name: str) -> str:
    """A parameter's name in the published checkpoint."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


@torch.inference_mode()
def test_bfloat16_is_as_near_to_float32_as_transformers_own(
    oracle: Any, make_model: Any, make_shape: Any
) -> None:
    rows, cols = GRID
    tokens = rows * cols // 4
    ids = [5, 6, 502, *[500] * tokens, 503, 33, 44, 55]
    pixels = torch.randn(rows * cols, 1176, generator=torch.Generator().manual_seed(1))
    inputs = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        "mm_token_type_ids": (torch.tensor([ids]) == 500).int(),
        "image_grid_thw": torch.tensor([[1, rows, cols]]),
    }
    reference = oracle(**inputs, pixel_values=pixels).logits[0, -1]
    theirs = copy.deepcopy(oracle).bfloat16()
    other = theirs(**inputs, pixel_values=pixels.bfloat16()).logits[0, -1].float()

    place = torch.arange(tokens)
    image = torch.stack((0 * place, place // (cols // 2), place % (cols // 2))) + 3
    after = 3 + max(rows, cols) // 2 + torch.arange(4)
    positions = torch.cat((torch.arange(3).expand(3, -1), image, after.expand(3, -1)), 1)
    weights = {published(name): value for name, value in oracle.state_dict().items()}

    def ours(dtype: str, **tiles: int) -> torch.Tensor:
        shape = make_shape(CONFIG, dtype)
        model = make_model(shape, weights, [GRID], [pixels], ids, positions, **tiles)
        model.encode()
        found: torch.Tensor = model.prefill().float()
        return found

    assert (ours("float32", prompt_rows=40) - reference).abs().max() < 1e-4
    noise = (other - reference).norm()
    tiled = ours(
        "bfloat16", prompt_rows=50, prompt_heads=1, query_rows=128, window_rows=200, merger_rows=32
    )
    for found in (ours("bfloat16"), tiled):
        assert 0 < (found - reference).norm() < 1.2 * noise
