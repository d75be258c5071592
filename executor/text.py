"""The language model's steps, for prefill and for one decode token alike. Each writes only into the views of its step.

Small to large: embed_tokens, self_attn, text_mlp, norm, lm_head. In prefill `x` has a row per prompt token; in decode
one row, at position `start` of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from executor.attention import attend_rows, merge
from executor.ops import (
    add_gated,
    add_rows,
    first_of_each,
    inverse_frequencies,
    linear,
    priming_keys,
    rms_norm,
    rotate,
)
from planner.plan.program import Step
from planner.plan.shapes import ModelShape, TextShape
from planner.plan.tiles import Tiles, spans
from planner.plan.words import Kernel

Weights = Mapping[str, Tensor]
Views = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class TextRun:
    """What the language model's steps need besides weights and views; one value per prefill and per decode token.

    ids: token ids of this call's rows, the whole prompt or one token. start: tokens in the cache before them (0
    where the whole prompt runs). positions: int64 (3, >= start + rows), time, height and width of every token. image_spans: (first row,
    rows) of each image's tokens, which the merger has written. read_embeddings: writes the rows of the embedding
    table for some ids into a tensor (ids, E). frequencies: `text_frequencies`. Tensors lie on the device of the views.
    priming: run one tile of each distinct row count, over few keys; the values left mean nothing. last: the row that the
    next token follows; None: the last one.
    """

    shape: ModelShape
    tiles: Tiles
    ids: Sequence[int]
    start: int
    positions: Tensor
    image_spans: tuple[tuple[int, int], ...]
    read_embeddings: Callable[[Sequence[int], Tensor], object]
    kernel: Kernel
    frequencies: Tensor
    priming: bool = False
    last: int | None = None

    @property
    def rows(self) -> int:
        return len(self.ids)


def text_frequencies(shape: TextShape, device: torch.device | str = "cpu") -> Tensor:
    """Inverse frequencies (d/2,) float32; which position axis turns which is `mrope_section`'s business."""
    return inverse_frequencies(shape.rope_theta, shape.head_dim, device=device)


def embed_tokens(run: TextRun, step: Step, w: Weights, v: Views) -> None:
    """Rows of the embedding table into x, between the rows of images."""
    start = 0
    for first, rows in (*sorted(run.image_spans), (run.rows, 0)):
        if first > start:
            run.read_embeddings(run.ids[start:first], v["x"][start:first])
        start = first + rows


def self_attn(run: TextRun, step: Step, w: Weights, v: Views) -> None:
    """x += o_proj(causal attention of norm(x)), tile by tile over the rows of this call; K and V go to the cache."""
    tiles = list(spans(run.rows, run.tiles.prompt_rows))
    if run.priming and run.kernel == "cpu_flash":
        tiles = first_of_each(tiles, _shape_of)
    elif run.priming:
        # of each the one with the longest past, on which it depends whether a card's kernel splits keys
        tiles = first_of_each(tiles[::-1], _shape_of)[::-1]
    for start, stop in tiles:
        _attention_tile(run, start, stop, w, v)


def _shape_of(tile: tuple[int, int]) -> tuple[int, bool]:
    """Rows of a tile of the prompt, and whether there are tokens before it."""
    start, stop = tile
    return stop - start, start > 0


def _attention_tile(run: TextRun, start: int, stop: int, w: Weights, v: Views) -> None:
    shape = run.shape.text
    rows, heads, size = stop - start, shape.heads, shape.head_dim
    x = v["x"][start:stop]
    past, end = run.start + start, run.start + stop
    y = rms_norm(
        x, w["input_layernorm.weight"], v["y"], scratch=v["norm32"], eps=shape.rms_norm_eps
    )
    keys, values = v["k"][past:end], v["v"][past:end]  # (R, G, d)
    _project(y, w, "k_proj", keys.view(rows, -1))
    _project(y, w, "v_proj", values.view(rows, -1))
    q = _project(y, w, "q_proj", v["q"][:rows]).view(rows, heads, size)
    cos, sin = _angles(run, past, end, v)
    rotate(q, cos, sin, scratch=v["rope"])
    rotate(keys, cos, sin, scratch=v["rope"])
    _attend(run, past, q, v)
    add_rows(
        x, linear(v["q"][:rows], w["self_attn.o_proj.weight"], None, out=y), scratch=v["norm32"]
    )


def _project(y: Tensor, w: Weights, name: str, out: Tensor) -> Tensor:
    return linear(y, w[f"self_attn.{name}.weight"], w[f"self_attn.{name}.bias"], out=out)


def _attend(run: TextRun, past: int, q: Tensor, v: Views) -> None:
    """Replace q (R, H, d) by what it attends to: the `past` keys without a mask, its own square with a causal one.

    One row sees every key, so it needs neither mask nor merging.
    """
    shape = run.shape.text
    rows, heads, size = q.shape
    shared = heads // shape.kv_heads
    end = past + rows
    scale, kernel = size**-0.5, run.kernel
    seen = priming_keys(past, kernel) if run.priming else past
    for low, high in spans(shape.kv_heads, run.tiles.prompt_heads):
        queries = q[:, low * shared : high * shared]
        target = queries.view(rows, high - low, shared, size)
        k, value = v["k"][:, low:high], v["v"][:, low:high]
        if rows == 1:
            lead = end - seen - 1 if run.priming else 0
            out, _ = attend_rows(queries, k[lead:end], value[lead:end], kernel=kernel, scale=scale)
            target.copy_(out.permute(2, 0, 1, 3))
            del out, _
            continue
        before = None
        if past:
            before = attend_rows(queries, k[:seen], value[:seen], kernel=kernel, scale=scale)
        here = attend_rows(
            queries, k[past:end], value[past:end], kernel=kernel, scale=scale, causal=True
        )
        if before is None:
            target.copy_(here[0].permute(2, 0, 1, 3))
        else:
            merge(before, here, out=target, scratch=v["norm32"])
        del before, here  # before the next heads take their own


def text_mlp(run: TextRun, step: Step, w: Weights, v: Views) -> None:
    """x += down(silu(gate(norm(x))) * up(norm(x))), tile by tile."""
    tiles = list(spans(run.rows, run.tiles.prompt_mlp_rows))
    if run.priming:
        tiles = first_of_each(tiles, lambda tile: tile[1] - tile[0])
    eps = run.shape.text.rms_norm_eps
    for start, stop in tiles:
        x, rows = v["x"][start:stop], stop - start
        y = rms_norm(x, w["post_attention_layernorm.weight"], v["y"], scratch=v["norm32"], eps=eps)
        gate = linear(y, w["mlp.gate_proj.weight"], None, out=v["gate"][:rows])
        up = linear(y, w["mlp.up_proj.weight"], None, out=v["up"][:rows])
        down = w["mlp.down_proj.weight"]
        add_gated(x, gate, up, down, None, out=y, scratch=v["norm32"])


def norm(run: TextRun, step: Step, w: Weights, v: Views) -> None:
    """The prompt's last row after the final norm, in `hidden`; one float32 row lies outside the arena meanwhile."""
    last = run.rows - 1 if run.last is None else run.last
    x, hidden = v["x"][last : last + 1], v["hidden"]
    wide = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    rms_norm(x, w["weight"], hidden, scratch=wide, eps=run.shape.text.rms_norm_eps)


def lm_head(run: TextRun, step: Step, w: Weights, v: Views) -> None:
    """One row tile's part of the logits; the step's number in brackets says which."""
    weight = w["weight"]
    first = int(step.id.rpartition("[")[2].rstrip("]")) * run.tiles.vocabulary_rows
    torch.mv(weight, v["hidden"][0], out=v["logits"][first : first + weight.shape[0]])


def _angles(run: TextRun, start: int, stop: int, v: Views) -> tuple[Tensor, Tensor]:
    """cos and sin (R, d) in the activations' dtype for cache rows [start, stop), computed in float32 in `norm32`.

    Frequency j turns with the axis (time, height, width) whose section of `mrope_section` holds it.
    """
    half = run.shape.text.head_dim // 2
    flat = v["norm32"].view(-1)
    step = flat.numel() // (2 * half)
    cos, sin = v["cos"][: stop - start], v["sin"][: stop - start]
    for low, high in spans(stop - start, step):
        count = (high - low) * half
        angle = flat[:count].view(-1, half)
        wave = flat[count : 2 * count].view(-1, half)
        column = 0
        for axis, width in enumerate(run.shape.text.mrope_section):
            place = run.positions[axis, start + low : start + high, None]
            angle[:, column : column + width].copy_(place)
            column += width
        angle.mul_(run.frequencies)
        torch.cos(angle, out=wave)
        cos[low:high].view(-1, 2, half).copy_(wave[:, None])
        torch.sin(angle, out=wave)
        sin[low:high].view(-1, 2, half).copy_(wave[:, None])
    return cos, sin
