"""What is asked (Image, Workload) and what is run (ModelShape, Unit, and where its tensors lie in files)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from planner.plan.words import DType, Frozen

# --- what is asked ------------------------------------------------------------------------------------------------


class WindowRun(Frozen):
    """`count` windows of `rows` patches each, next to one another in window order."""

    count: int
    rows: int


class Image(Frozen):
    """One still image after resizing. `rows` and `cols` count patches; both are even.

    Window order of the patches (the order of the residual stream `x`): all full windows first, then those cut at the
    right edge, then at the bottom, then the corner; each group row-major. `windows` lists these groups, so that
    tiles of equal windows have few distinct row counts. Inside a window merge units are row-major, and inside a
    merge unit the 2x2 patches.
    """

    name: str
    source_width_px: int
    source_height_px: int
    width_px: int
    height_px: int
    rows: int
    cols: int
    windows: tuple[WindowRun, ...]

    @property
    def patches(self) -> int:
        return self.rows * self.cols

    @property
    def tokens(self) -> int:
        return self.patches // 4


class Workload(Frozen):
    """What the plan is for. A run may ask for less (a shorter prompt, fewer new tokens), never for more."""

    images: tuple[Image, ...]
    min_pixels: int
    max_pixels: int
    prompt_tokens: int  # every row of the prompt: template, text, image tokens
    prompt_is_bound: bool  # the text was not tokenised: prompt_tokens is an upper bound
    max_new_tokens: int
    context_tokens: int  # capacity of the KV cache


# --- what is run --------------------------------------------------------------------------------------------------


class VisionShape(Frozen):
    """The vision tower, in config.json's terms."""

    depth: int
    hidden: int  # D
    heads: int
    intermediate: int  # I
    out_hidden: int
    in_channels: int
    patch_px: int
    temporal_patch: int
    merge: int
    window_px: int
    full_attention_blocks: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def patch_values(self) -> int:
        return self.in_channels * self.temporal_patch * self.patch_px**2


class TextShape(Frozen):
    """The language model, in config.json's terms."""

    layers: int
    hidden: int  # E
    heads: int  # H
    kv_heads: int  # G
    head_dim: int
    intermediate: int  # F
    vocabulary: int  # V
    rope_theta: float
    mrope_section: tuple[int, int, int]
    rms_norm_eps: float
    tied: bool


class TokenIds(Frozen):
    """Special ids; `stop` are those that end the answer."""

    image: int
    video: int
    vision_start: int
    vision_end: int
    stop: tuple[int, ...]


class ModelShape(Frozen):
    """Everything about the model that is not weights. `fingerprint`: sha256 over the normalised config and the names, shapes and dtypes of all tensors.

    `dtype`: of weights and activations in the run. `stored`: of the weights in their files, where that is another one
    of the same size; they are converted as they are read.
    """

    name: str
    dtype: DType
    vision: VisionShape
    text: TextShape
    token_ids: TokenIds
    repetition_penalty: float
    fingerprint: str
    stored: DType | None = None

    @property
    def residual_dtype(self) -> DType:
        """Of the residual streams: float32 where the model computes in float16, whose range they leave."""
        return "float32" if self.dtype == "float16" else self.dtype

    @property
    def stored_dtype(self) -> DType:
        """Of the weights in their files."""
        return self.stored or self.dtype


class UnitTensor(Frozen):
    """One tensor, or rows `[row_start, row_stop)` of one, inside a unit.

    `name` is the published checkpoint name without its module prefix's variations (`visual.*`, `model.*`,
    `lm_head.weight`); `local` is what the executor's step calls it (`attn.qkv.weight`).
    """

    name: str
    local: str
    shape: tuple[int, ...]
    row_start: int
    row_stop: int
    offset_bytes: int
    size_bytes: int


class Unit(Frozen):
    """What is resident, streamed or absent as one: a block's attention or MLP half, the merger, a row tile of lm_head."""

    id: str  # "visual/blocks.7.attn", "text/layers.3.mlp", "text/lm_head[0]"
    tensors: tuple[UnitTensor, ...]
    size_bytes: int


class TensorLocation(NamedTuple):
    """Where a tensor's bytes lie: absolute file offset, row-major, `shape` as stored."""

    path: Path
    offset_bytes: int
    size_bytes: int
    shape: tuple[int, ...]
    dtype: DType
