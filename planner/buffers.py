"""The views of every buffer that steps compute in: names, shapes and sizes (ARCHITECTURE.md's table, in code).

Weights are elsewhere (`planner.checkpoint.spec.units`). P, R, S, C, D, I, E, F, H, G, d, V as in ARCHITECTURE.md's alphabet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from planner.plan.program import View
from planner.plan.shapes import Image, ModelShape, WindowRun
from planner.plan.tiles import Tiles, window_tiles
from planner.plan.words import DTYPE_BYTES, Kind

ALIGNMENT = 512  # of buffers; views inside a buffer start at multiples of VIEW_ALIGNMENT
VIEW_ALIGNMENT = 64
NORM_ROWS = 256  # rows that a norm upcasts at once
ROPE_ROWS = 128  # rows that a rotary embedding rotates at once

VISION_KINDS: tuple[Kind, ...] = ("patch_embed", "window_attn", "full_attn", "vision_mlp", "merger")
SCRATCH_NAME: dict[Kind, str] = {
    "patch_embed": "patch_embed",
    "window_attn": "window_attn",
    "full_attn": "full_attn",
    "vision_mlp": "mlp",
    "merger": "merger",
    "self_attn": "self_attn",
    "text_mlp": "mlp",
}


class Layouted(NamedTuple):
    """Views one behind another, and the size of the buffer that holds them."""

    views: tuple[View, ...]
    size_bytes: int


def pack_views(parts: Iterable[tuple[str, str, tuple[int, ...]]]) -> Layouted:
    """Views of (name, dtype, shape) one behind another; the size is a multiple of ALIGNMENT."""
    views, offset = [], 0
    for name, dtype, shape in parts:
        views.append(View.model_construct(name=name, dtype=dtype, shape=shape, offset_bytes=offset))
        size_bytes = DTYPE_BYTES[dtype]
        for extent in shape:
            size_bytes *= extent
        offset += round_up(size_bytes, VIEW_ALIGNMENT)
    return Layouted(tuple(views), round_up(offset, ALIGNMENT))


def vision_scratch(
    kind: Kind, model: ModelShape, tiles: Tiles, images: Sequence[Image]
) -> Layouted:
    """Scratch of one kind of vision step over `images`."""
    vision, dtype = model.vision, model.dtype
    width, half = vision.hidden, vision.head_dim // 2
    largest = max(image.patches for image in images)
    if kind == "patch_embed":
        rows = min(tiles.patch_rows, largest)
        parts = [("pixels", dtype, (rows, vision.patch_values))]
        if model.residual_dtype != dtype:
            parts.append(("y", dtype, (rows, width)))
        return pack_views(parts)
    if kind == "window_attn":
        rows = window_tile_rows(tiles.window_rows, images)
        rope = min(ROPE_ROWS, rows)
        return pack_views(
            [
                ("y", dtype, (rows, width)),
                ("qkv", dtype, (rows, 3 * width)),
                ("norm32", "float32", (min(NORM_ROWS, rows), width)),
                ("rope32", "float32", (2, rope, 2 * width)),
                ("cos32", "float32", (rows, half)),
                ("sin32", "float32", (rows, half)),
            ]
        )
    if kind == "full_attn":
        rows = min(tiles.query_rows, largest)
        rope = min(ROPE_ROWS, rows)
        return pack_views(
            [
                ("kv", dtype, (largest, 2 * width)),
                ("y", dtype, (rows, width)),
                ("q", dtype, (rows, width)),
                ("norm32", "float32", (min(NORM_ROWS, rows), width)),
                ("rope32", "float32", (2, rope, width)),
                ("cos32", "float32", (rows, half)),
                ("sin32", "float32", (rows, half)),
            ]
        )
    if kind == "vision_mlp":
        rows = min(tiles.vision_mlp_rows, sum(image.patches for image in images))
        return pack_views(
            [
                ("y", dtype, (rows, width)),
                ("gate", dtype, (rows, vision.intermediate)),
                ("up", dtype, (rows, vision.intermediate)),
                ("norm32", "float32", (min(NORM_ROWS, rows), width)),
            ]
        )
    if kind == "merger":
        rows = min(tiles.merger_rows, max(image.tokens for image in images))
        unit = vision.merge**2
        parts = [
            ("y", dtype, (unit * rows, width)),
            ("hidden", dtype, (rows, unit * width)),
            ("merged", dtype, (rows, vision.out_hidden)),
            ("norm32", "float32", (min(NORM_ROWS, unit * rows), width)),
        ]
        if model.residual_dtype != dtype:
            parts.append(("merged32", "float32", (min(NORM_ROWS, rows), vision.out_hidden)))
        return pack_views(parts)
    raise AssertionError(kind)


def text_scratch(kind: Kind, model: ModelShape, tile_rows: int, rows: int) -> Layouted:
    """Scratch of one kind of language-model step over `rows` rows in tiles of `tile_rows`."""
    text, dtype = model.text, model.dtype
    tile = min(tile_rows, rows)
    norm = ("norm32", "float32", (min(NORM_ROWS, tile), text.hidden))
    if kind == "self_attn":
        rope = min(ROPE_ROWS, tile)
        return pack_views(
            [
                ("y", dtype, (tile, text.hidden)),
                ("q", dtype, (tile, text.heads * text.head_dim)),
                norm,
                ("rope", dtype, (2, rope, text.heads * text.head_dim)),
                ("cos", dtype, (tile, text.head_dim)),
                ("sin", dtype, (tile, text.head_dim)),
            ]
        )
    if kind == "text_mlp":
        return pack_views(
            [
                ("y", dtype, (tile, text.hidden)),
                ("gate", dtype, (tile, text.intermediate)),
                ("up", dtype, (tile, text.intermediate)),
                norm,
            ]
        )
    raise AssertionError(kind)


def residual(model: ModelShape, rows: int, width: int) -> Layouted:
    """The residual stream `x` (rows, width)."""
    return pack_views([("x", model.residual_dtype, (rows, width))])


def kv_cache(model: ModelShape, capacity: int) -> Layouted:
    """Keys and values of one layer, each (C, G, d)."""
    shape = (capacity, model.text.kv_heads, model.text.head_dim)
    return pack_views([("k", model.dtype, shape), ("v", model.dtype, shape)])


def hidden(model: ModelShape) -> Layouted:
    """The last row after the final norm (1, E)."""
    return pack_views([("hidden", model.dtype, (1, model.text.hidden))])


def logits(model: ModelShape) -> Layouted:
    """Logits of one row (V,)."""
    return pack_views([("logits", model.dtype, (model.text.vocabulary,))])


def window_tile_rows(tile_rows: int, images: Sequence[Image]) -> int:
    """Rows of the largest tile of whole windows over these images."""
    return max(_largest_tile(image.windows, tile_rows) for image in images)


@lru_cache(maxsize=256)
def _largest_tile(windows: tuple[WindowRun, ...], tile_rows: int) -> int:
    return max(tile.stop - tile.start for tile in window_tiles(windows, tile_rows))


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple
