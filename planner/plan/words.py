"""The words that a plan is written in: dtypes, phases, kinds of step, kernels, orders; and what all its parts are."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

DType = Literal["bfloat16", "float16", "float32"]
DTYPE_BYTES: dict[str, int] = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
}

Phase = Literal["vision", "prefill", "decode"]
Kind = Literal[
    "patch_embed",
    "window_attn",
    "full_attn",
    "vision_mlp",
    "merger",
    "embed_tokens",
    "self_attn",
    "text_mlp",
    "norm",
    "lm_head",
    "sample",
]
Kernel = Literal["flash", "efficient", "cpu_flash"]
Order = Literal["all_first", "vision_then_llm", "prefetch"]


class Frozen(BaseModel):
    """Immutable, and refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")
