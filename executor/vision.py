"""The vision tower's steps, from patches to image tokens. Each writes only into the views that its step names.

Small to large: patch_embed, window_attn, full_attn, vision_mlp, merger. Rows are in window order (planner.plan.Image);
with several images in a step, `x` holds them one behind another in the order of `step.images`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from executor.attention import attend
from executor.ops import (
    add_gated,
    add_rows,
    first_of_each,
    inverse_frequencies,
    linear,
    priming_keys,
    rms_norm,
    rotate_float32,
)
from planner.plan.program import Step
from planner.plan.shapes import Image, ModelShape, VisionShape
from planner.plan.tiles import Tiles, WindowTile, spans, window_tiles
from planner.plan.words import Kernel

EPS = 1e-6  # transformers: Qwen2_5_VLVisionBlock, fixed there
WINDOWS_PER_CALL = 16  # 4 to 16 windows a call took 21 ms where 42 and more took 31 (CPU, bf16)

Weights = Mapping[str, Tensor]
Views = Mapping[str, Tensor]


class PixelRows(Protocol):
    """Patches of one image, as rows of pixel values in window order."""

    def rows(self, start: int, stop: int, out: Tensor) -> object:
        """Write rows [start, stop) into out (stop - start, patch_values)."""
        ...


@dataclass(frozen=True, slots=True)
class VisionRun:
    """What the vision steps need besides weights and views; tuples have one entry per image of the workload.

    positions: int64 patch row and patch column of every row of `x`, (P,) each. unit_order: int64 (tokens,), the
    row-major index of each merge unit in window order. image_token_rows: the prompt row of the image's first token.
    frequencies: `vision_frequencies`. All on the device of the views. priming: run one tile of each distinct row
    count, over as few keys as `priming_keys` says; the values left in the views mean nothing.
    """

    shape: ModelShape
    tiles: Tiles
    images: tuple[Image, ...]
    pixels: tuple[PixelRows, ...]
    positions: tuple[tuple[Tensor, Tensor], ...]
    unit_order: tuple[Tensor, ...]
    image_token_rows: tuple[int, ...]
    kernel: Kernel
    frequencies: Tensor
    priming: bool = False


class _Part(NamedTuple):
    """One image's share of a step: its number and its rows of `x`."""

    number: int
    image: Image
    x: Tensor  # (patches, D)


def vision_frequencies(shape: VisionShape, device: torch.device | str = "cpu") -> Tensor:
    """Inverse frequencies for half a head (d/2,): the first half turns with the patch's row, the second with its column."""
    quarter = inverse_frequencies(10000.0, shape.head_dim // 2)
    return torch.cat((quarter, quarter)).to(device)


def patch_embed(run: VisionRun, step: Step, w: Weights, v: Views) -> None:
    """x = pixels W^T: the convolution over whole patches is one product. Pixel rows are made tile by tile."""
    weight = w["proj.weight"]
    weight = weight.view(weight.shape[0], -1)
    for part in _parts(run, step, v["x"]):
        for start, stop in _spans(run, part.image.patches, run.tiles.patch_rows):
            pixels = v["pixels"][: stop - start]
            run.pixels[part.number].rows(start, stop, pixels)
            x = part.x[start:stop]
            y = x if x.dtype == pixels.dtype else v["y"][: stop - start]
            linear(pixels, weight, None, out=y)
            if y is not x:
                x.copy_(y)


def window_attn(run: VisionRun, step: Step, w: Weights, v: Views) -> None:
    """x += proj(attention within windows of norm(x)), tile by tile of whole windows.

    The projection lands in the memory of qkv, whose values are used up by then.
    """
    for part in _parts(run, step, v["x"]):
        tiles: tuple[WindowTile, ...] = window_tiles(part.image.windows, run.tiles.window_rows)
        if run.priming:
            tiles = tuple(first_of_each(tiles, lambda tile: (tile.stop - tile.start, tile.runs)))
        for tile in tiles:
            _window_tile(run, part, tile, w, v)


def _window_tile(run: VisionRun, part: _Part, tile: WindowTile, w: Weights, v: Views) -> None:
    shape = run.shape.vision
    rows, width = tile.stop - tile.start, shape.hidden
    x = part.x[tile.start : tile.stop]
    y = rms_norm(x, w["norm1.weight"], v["y"], scratch=v["norm32"], eps=EPS)
    qkv = linear(y, w["attn.qkv.weight"], w["attn.qkv.bias"], out=v["qkv"][:rows])
    split = qkv.view(rows, 3, shape.heads, shape.head_dim)
    cos, sin = _angles(run, part.number, tile.start, tile.stop, v)
    both = qkv[:, : 2 * width].view(rows, 2 * shape.heads, shape.head_dim)
    rotate_float32(both, cos, sin, scratch=v["rope32"])
    first = 0
    for count, size in tile.runs:
        for lead in range(0, count, WINDOWS_PER_CALL):
            windows = min(WINDOWS_PER_CALL, count - lead)
            last = first + windows * size
            batch = split[first:last].view(windows, size, 3, shape.heads, shape.head_dim)
            q, k, value = batch.permute(2, 0, 3, 1, 4).unbind(0)  # (windows, H, size, d)
            out, _ = attend(q, k, value, kernel=run.kernel, scale=shape.head_dim**-0.5)
            y[first:last].view(windows, size, shape.heads, shape.head_dim).copy_(
                out.transpose(1, 2)
            )
            del out, _  # before the next call takes its own
            first = last
    projected = v["qkv"].view(-1)[: rows * width].view(rows, width)
    linear(y, w["attn.proj.weight"], w["attn.proj.bias"], out=projected)
    add_rows(x, projected, scratch=v["norm32"])


def full_attn(run: VisionRun, step: Step, w: Weights, v: Views) -> None:
    """x += proj(attention of every patch over its whole image).

    First K and V of all rows, then each tile of query rows is attended, projected and added into x in place: what
    later tiles need of the old x is in K and V already. Never across images.
    """
    for part in _parts(run, step, v["x"]):
        _keys_and_values(run, part, w, v)
        for start, stop in _spans(run, part.image.patches, run.tiles.query_rows):
            _query_tile(run, part, start, stop, w, v)


def _keys_and_values(run: VisionRun, part: _Part, w: Weights, v: Views) -> None:
    shape = run.shape.vision
    width = shape.hidden
    weight, bias = w["attn.qkv.weight"][width:], w["attn.qkv.bias"][width:]
    for start, stop in _spans(run, part.image.patches, run.tiles.query_rows):
        x, kv = part.x[start:stop], v["kv"][start:stop]
        y = rms_norm(x, w["norm1.weight"], v["y"], scratch=v["norm32"], eps=EPS)
        linear(y, weight, bias, out=kv)
        cos, sin = _angles(run, part.number, start, stop, v)
        keys = kv[:, :width].view(-1, shape.heads, shape.head_dim)
        rotate_float32(keys, cos, sin, scratch=v["rope32"])


def _query_tile(run: VisionRun, part: _Part, start: int, stop: int, w: Weights, v: Views) -> None:
    shape = run.shape.vision
    rows, width, heads, size = stop - start, shape.hidden, shape.heads, shape.head_dim
    x = part.x[start:stop]
    y = rms_norm(x, w["norm1.weight"], v["y"], scratch=v["norm32"], eps=EPS)
    weight, bias = w["attn.qkv.weight"][:width], w["attn.qkv.bias"][:width]
    q = linear(y, weight, bias, out=v["q"][:rows]).view(rows, heads, size)
    cos, sin = _angles(run, part.number, start, stop, v)
    rotate_float32(q, cos, sin, scratch=v["rope32"])
    patches = part.image.patches
    seen = priming_keys(patches, run.kernel) if run.priming else patches
    kv = v["kv"][:seen].view(seen, 2, heads, size)
    keys, values = kv.permute(1, 2, 0, 3)[:, None].unbind(0)  # (1, H, P, d)
    queries = q.transpose(0, 1)[None]  # (1, H, tile, d)
    for low, high in spans(heads, run.tiles.query_heads):
        out, _ = attend(
            queries[:, low:high],
            keys[:, low:high],
            values[:, low:high],
            kernel=run.kernel,
            scale=size**-0.5,
        )
        y.view(rows, heads, size)[:, low:high].copy_(out[0].transpose(0, 1))
        del out, _
    projected = linear(y, w["attn.proj.weight"], w["attn.proj.bias"], out=v["q"][:rows])
    add_rows(x, projected, scratch=v["norm32"])


def vision_mlp(run: VisionRun, step: Step, w: Weights, v: Views) -> None:
    """x += down(silu(gate(norm(x))) * up(norm(x))), tile by tile over the rows of all images at once."""
    patches = sum(run.images[index].patches for index in step.images)
    for start, stop in _spans(run, patches, run.tiles.vision_mlp_rows):
        x, rows = v["x"][start:stop], stop - start
        y = rms_norm(x, w["norm2.weight"], v["y"], scratch=v["norm32"], eps=EPS)
        gate = linear(y, w["mlp.gate_proj.weight"], w["mlp.gate_proj.bias"], out=v["gate"][:rows])
        up = linear(y, w["mlp.up_proj.weight"], w["mlp.up_proj.bias"], out=v["up"][:rows])
        weight, bias = w["mlp.down_proj.weight"], w["mlp.down_proj.bias"]
        add_gated(x, gate, up, weight, bias, out=y, scratch=v["norm32"])


def merger(run: VisionRun, step: Step, w: Weights, v: Views) -> None:
    """Image tokens into their rows of the prompt, row-major: every 2x2 patches through norm and two linears.

    Reads `x` (the tower's) and writes `prefill/x`. A merge unit's patches are neighbours in window order too.
    """
    shape = run.shape.vision
    unit = shape.merge**2
    for part in _parts(run, step, v["x"]):
        first = run.image_token_rows[part.number]
        tokens = v["prefill/x"][first : first + part.image.tokens]  # (tokens, E)
        for start, stop in _spans(run, part.image.tokens, run.tiles.merger_rows):
            rows = stop - start
            x = part.x[unit * start : unit * stop]
            y = rms_norm(x, w["ln_q.weight"], v["y"], scratch=v["norm32"], eps=EPS)
            wide = y.view(rows, unit * shape.hidden)
            hidden = linear(wide, w["mlp.0.weight"], w["mlp.0.bias"], out=v["hidden"][:rows])
            torch.ops.aten.gelu_(hidden)  # exact: by erf
            merged = linear(hidden, w["mlp.2.weight"], w["mlp.2.bias"], out=v["merged"][:rows])
            order = run.unit_order[part.number][start:stop]
            _put(tokens, order, merged, v)


def _put(tokens: Tensor, order: Tensor, merged: Tensor, v: Views) -> None:
    """Rows of `merged` into the rows of `tokens` that `order` names, which are of one dtype for that."""
    if tokens.dtype == merged.dtype:
        tokens.index_copy_(0, order, merged)
        return
    for start, stop in spans(merged.shape[0], v["merged32"].shape[0]):
        wide = v["merged32"][: stop - start]
        wide.copy_(merged[start:stop])
        tokens.index_copy_(0, order[start:stop], wide)


def _parts(run: VisionRun, step: Step, x: Tensor) -> Iterator[_Part]:
    """The images of a step, each with its rows of x."""
    start = 0
    for index in step.images:
        image = run.images[index]
        yield _Part(index, image, x[start : start + image.patches])
        start += image.patches


def _spans(run: VisionRun, rows: int, tile: int) -> list[tuple[int, int]]:
    every = list(spans(rows, tile))
    return first_of_each(every, lambda span: span[1] - span[0]) if run.priming else every


def _angles(run: VisionRun, index: int, start: int, stop: int, v: Views) -> tuple[Tensor, Tensor]:
    """cos and sin (R, d/2) float32 of a tile's rows, in the views made for them."""
    rows, cols = run.positions[index]
    cos, sin = v["cos32"][: stop - start], v["sin32"][: stop - start]
    quarter = cos.shape[1] // 2
    cos[:, :quarter].copy_(rows[start:stop, None])
    cos[:, quarter:].copy_(cols[start:stop, None])
    cos.mul_(run.frequencies)
    torch.sin(cos, out=sin)
    cos.cos_()
    return cos, sin
