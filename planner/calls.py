"""Seconds of the executor's steps, call by call, from a profile's tables of measured kernels.

Each step is the list of calls that executor/vision.py and executor/text.py make for it, tile by tile and sub-tile by
sub-tile. A call's table was taken with the same function in the same sub-tiles, so dispatch, weights repacked in every
call, caches, and blocks that malloc maps and gives back each time are in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

from planner.buffers import text_scratch, vision_scratch
from planner.kept_code import DESCRIPTOR_BYTES, kept_bytes
from planner.plan.shapes import Image, ModelShape
from planner.plan.tiles import Tiles, spans, window_tiles
from planner.plan.words import DTYPE_BYTES, Kind
from planner.queues import Beside
from planner.rates import CACHE_BYTES, Kernels, Measured, seconds_at

# the executor's own sub-tiles
NORM_ROWS = 256  # planner.buffers: rows of norm32
ROPE_ROWS = 128  # planner.buffers: rows of a rope sub-tile
WINDOWS_PER_CALL = 16  # executor.vision
# of which a new token runs as many as there are layers
LOOPED: tuple[Kind, ...] = ("self_attn", "text_mlp")
# what a rested reader may take of the steps' share at once: between 6 and 10 ms for bursts of 10 to 200 MB after rests of
# 10 to 30 ms (Linux 6.18, 2 cores)
CREDIT_S = 0.01
DECODED = 64  # iterations over which decode's few new pages are spread


def _beside(measured: Measured, serial_s: float) -> Beside:
    """How queues share the cores. What a step takes beyond its kernels is the work of one thread."""
    compute, copy = measured.beside
    if measured.favoured is None or measured.favoured >= compute:
        return Beside(compute, copy)
    return Beside(compute, copy, measured.favoured, CREDIT_S, serial_s)


class Calls:
    """Seconds of one model's steps by one dtype's tables."""

    def __init__(self, measured: Measured, model: ModelShape, token_bytes: int) -> None:
        """`token_bytes`: weights that one new token uses, all of them once."""
        self.model, self.measured = model, measured
        half = DTYPE_BYTES[model.dtype] == 2
        self.kernels: Kernels = measured.bits16 if half else measured.float32
        self.token_bytes = token_bytes
        self.steps_s = {
            kind: pair[token_bytes > CACHE_BYTES] for kind, pair in measured.step_s.items()
        }
        self.beside = _beside(measured, min(self.steps_s[kind] for kind in LOOPED))
        rate = measured.first_touch_bytes_per_s
        self.touch_s = 1 / rate if rate else 0.0  # of one byte
        self.product = lru_cache(maxsize=4096)(self._product)
        self.elements = lru_cache(maxsize=4096)(self._elements)
        self.window_tile = lru_cache(maxsize=4096)(self._window_tile)
        self.mlp_tile = lru_cache(maxsize=4096)(self._mlp_tile)

    # --- calls ----------------------------------------------------------------------------------------------------

    def _product(self, rows: int, fan_in: int, fan_out: int, bias: bool) -> float:
        weights = fan_in * fan_out
        if rows == 1:
            vector = self.kernels.vector
            # beyond the largest measured distance between two uses all comes from memory, and stays as fast
            distance = min(self.token_bytes, vector.first[-1])
            return vector.at(distance, weights)
        seconds = self.kernels.product.at(rows, weights)
        return seconds + (seconds_at(self.kernels.passes["bias"], rows * fan_out) if bias else 0.0)

    def _elements(self, name: str, elements: int) -> float:
        """One call of an elementwise pass over so many elements."""
        return seconds_at(self.kernels.passes[name], elements)

    def rows(self, name: str, rows: int, width: int, most: int) -> float:
        """A pass over (rows, width) in sub-tiles of `most` rows."""
        whole, rest = divmod(rows, most)
        curve = self.kernels.passes[name]
        seconds = whole * seconds_at(curve, most * width) if whole else 0.0
        return seconds + (seconds_at(curve, rest * width) if rest else 0.0)

    def add(self, elements: int) -> float:
        """A sum into the residual stream; where that is wider, by way of float32 scratch, which takes twice the bytes."""
        if self.model.residual_dtype == self.model.dtype:
            return self.elements("add", elements)
        return self.elements("copy", elements) + 2 * self.elements("add", elements)

    def gate(self, elements: int) -> float:
        """A gated product; where the residual stream is wider, scaled: bounds of both factors, and a pass over each."""
        seconds = self.elements("gate", elements)
        if self.model.residual_dtype == self.model.dtype:
            return seconds
        return seconds + 3 * self.elements("add", elements)

    def norm(self, rows: int, width: int) -> float:
        return self.rows("norm", rows, width, NORM_ROWS)

    def _attend(self, kind: str, head_dim: int, *sizes: int) -> float:
        """Seconds for one head."""
        seconds = 0.0
        for table, share in self.kernels.heads(head_dim):
            if kind == "full":
                found = table.full.at(*sizes)
            elif kind == "causal":
                # a square's scores grow with its rows twice
                found = seconds_at(table.causal, sizes[0]) * max(
                    1.0, sizes[0] / table.causal[-1][0]
                )
            elif kind == "window":
                found = seconds_at(table.window, sizes[0])
            else:
                found = seconds_at(table.decode, sizes[0])
            seconds += share * found
        return seconds

    def _call(self, head_dim: int) -> float:
        """One more call of attention of one row."""
        return sum(share * table.call_s for table, share in self.kernels.turned(head_dim))

    def _divided(self, head_dim: int, heads: int, per_call: int, rows: int, keys: int) -> float:
        """What attention of so many heads takes in several calls beyond one over them all."""
        if per_call >= heads:
            return 0.0
        seconds = 0.0
        for table, share in self.kernels.turned(head_dim):
            call = partial(table.beyond, rows=rows, keys=keys)
            seconds += share * (_tiled(heads, per_call, call) - call(heads))
        return seconds

    def _angles(self, where: str, rows: int, head_dim: int) -> float:
        name, elements = f"angles_{where}", rows * head_dim // 2
        return sum(
            share * seconds_at(getattr(table, name), elements)
            for table, share in self.kernels.turned(head_dim)
        )

    def _rope(self, where: str, rows: int, width: int, head_dim: int) -> float:
        """A rotation of (rows, width) in sub-tiles."""
        name = f"rope_{where}"
        whole, rest = divmod(rows, ROPE_ROWS)
        seconds = 0.0
        for table, share in self.kernels.turned(head_dim):
            curve = getattr(table, name)
            seconds += share * whole * seconds_at(curve, ROPE_ROWS * width)
            seconds += share * seconds_at(curve, rest * width) if rest else 0.0
        return seconds

    def _new_pages(self, size_bytes: int, steps: int) -> float:
        """A step's share of clearing the pages that the steps of its kind write first."""
        return size_bytes * self.touch_s / max(1, steps)

    # --- vision -----------------------------------------------------------------------------------------------------

    def vision(self, kind: Kind, tiles: Tiles, images: Sequence[Image]) -> float:
        """Seconds of one vision step over `images`."""
        shape = self.model.vision
        width, depth = shape.hidden, shape.depth
        rows = sum(image.patches for image in images)
        element = DTYPE_BYTES[self.model.residual_dtype]
        full = len(shape.full_attention_blocks)
        steps = {"window_attn": depth - full, "full_attn": full, "vision_mlp": depth}.get(kind, 1)
        pages = vision_scratch(kind, self.model, tiles, tuple(images)).size_bytes
        if kind == "patch_embed":
            pages += rows * width * element  # the residual stream
        if kind == "merger":
            pages += rows // shape.merge**2 * shape.out_hidden * element
        step_s = self.steps_s[kind] + self._new_pages(pages, steps)
        if kind == "patch_embed":
            seconds = rows * shape.patch_values / self.measured.pixel_values_per_s
            for image in images:
                seconds += _tiled(
                    image.patches,
                    tiles.patch_rows,
                    lambda tile: self.product(tile, shape.patch_values, width, False),
                )
            return seconds + step_s
        if kind == "window_attn":
            return step_s + sum(
                self.window_tile(piece.stop - piece.start, piece.runs)
                for image in images
                for piece in window_tiles(image.windows, tiles.window_rows)
            )
        if kind == "full_attn":
            return step_s + sum(self._full_image(image.patches, tiles) for image in images)
        if kind == "vision_mlp":
            return step_s + _tiled(
                rows,
                tiles.vision_mlp_rows,
                lambda tile: self.mlp_tile(tile, width, shape.intermediate, True),
            )
        if kind == "merger":
            return step_s + sum(
                _tiled(image.tokens, tiles.merger_rows, self._merger_tile) for image in images
            )
        raise AssertionError(kind)

    def _window_tile(self, rows: int, runs: tuple[tuple[int, int], ...]) -> float:
        shape = self.model.vision
        width = shape.hidden
        seconds = self.norm(rows, width) + self.product(rows, width, 3 * width, True)
        seconds += self._angles("vision", rows, shape.head_dim)
        seconds += self._rope("vision", rows, 2 * width, shape.head_dim)
        for count, size in runs:
            seconds += count * shape.heads * self._attend("window", shape.head_dim, size)
            seconds += self.rows("copy", count, size * width, WINDOWS_PER_CALL)
        seconds += self.product(rows, width, width, True)
        return seconds + self.add(rows * width)

    def _full_image(self, patches: int, tiles: Tiles) -> float:
        return _tiled(
            patches,
            tiles.query_rows,
            lambda tile: self._full_tile(tile, patches, tiles.query_heads),
        )

    def _full_tile(self, tile: int, keys: int, query_heads: int) -> float:
        """Keys and values of a tile's rows, and the same rows as queries."""
        shape = self.model.vision
        width, heads, size = shape.hidden, shape.heads, shape.head_dim
        seconds = self.norm(tile, width) + self.product(tile, width, 2 * width, True)
        seconds += self.norm(tile, width) + 2 * self.product(tile, width, width, True)
        seconds += 2 * self._angles("vision", tile, size)
        seconds += 2 * self._rope("vision", tile, width, size)
        seconds += heads * self._attend("full", size, tile, keys)
        seconds += self._divided(size, heads, query_heads, tile, keys)
        seconds += _tiled(heads, query_heads, lambda n: self.elements("copy", tile * n * size))
        return seconds + self.add(tile * width)

    def _mlp_tile(self, rows: int, width: int, inner: int, bias: bool) -> float:
        seconds = self.norm(rows, width) + 2 * self.product(rows, width, inner, bias)
        seconds += self.gate(rows * inner) + self.product(rows, inner, width, bias)
        return seconds + self.add(rows * width)

    def _merger_tile(self, tokens: int) -> float:
        shape = self.model.vision
        unit = shape.merge**2
        wide = unit * shape.hidden
        seconds = self.norm(tokens * unit, shape.hidden) + self.product(tokens, wide, wide, True)
        seconds += self.elements("gelu", tokens * wide)
        seconds += self.product(tokens, wide, shape.out_hidden, True)
        return seconds + self.elements("copy", tokens * shape.out_hidden)

    # --- language model -----------------------------------------------------------------------------------------------

    def text(
        self, kind: Kind, tile: int, rows: int, context: int, groups_per_call: int | None = None
    ) -> float:
        """Seconds of one language-model step over `rows` rows; one row sees `context` keys.

        `groups_per_call`: key heads that a call of attention takes; None: all.
        """
        text, step_s = self.model.text, self.steps_s[kind]
        pages = text_scratch(kind, self.model, tile, rows).size_bytes
        step_s += self._new_pages(pages, text.layers * (1 if rows > 1 else DECODED))
        if kind == "text_mlp":
            return step_s + _tiled(
                rows, tile, lambda n: self.mlp_tile(n, text.hidden, text.intermediate, False)
            )
        if kind != "self_attn":
            raise AssertionError(kind)
        groups = groups_per_call or text.kv_heads
        if rows == 1:
            return (
                step_s
                + (-(-text.kv_heads // groups) - 1) * self._call(text.head_dim)
                + self._project(1)
                + text.kv_heads * self._attend("decode", text.head_dim, context)
            )
        seconds = step_s
        width, per_call = text.heads * text.head_dim, text.heads // text.kv_heads * groups
        for start, stop in spans(rows, tile):
            count = stop - start
            seconds += self._project(count)
            seconds += text.heads * self._attend("causal", text.head_dim, count)
            seconds += self._divided(text.head_dim, text.heads, per_call, count, count)
            if start:
                seconds += self._divided(text.head_dim, text.heads, per_call, count, start)
                seconds += text.heads * self._attend("full", text.head_dim, count, start)
                seconds += self.elements("merge", count * width)
        return seconds

    def _project(self, rows: int) -> float:
        """All of a tile of self-attention but the attention itself."""
        text = self.model.text
        width, size = text.hidden, text.head_dim
        heads, groups = text.heads * size, text.kv_heads * size
        seconds = self.norm(rows, width) + self.product(rows, width, heads, True)
        seconds += 2 * self.product(rows, width, groups, True)
        seconds += self._angles("text", rows, size)
        seconds += self._rope("text", rows, heads, size) + self._rope("text", rows, groups, size)
        seconds += self.elements("copy", rows * heads)
        return seconds + self.product(rows, heads, width, False) + self.add(rows * width)

    def small(self, kind: Kind, head_rows: int) -> float:
        """Seconds of a step on one row."""
        text, step_s = self.model.text, self.steps_s[kind]
        if kind == "lm_head":
            return step_s + self.product(1, text.hidden, head_rows, False)
        if kind == "sample":
            return step_s + seconds_at(self.measured.sample, text.vocabulary)
        return step_s + (self.norm(1, text.hidden) if kind == "norm" else 0.0)

    # --- before the first step --------------------------------------------------------------------------------------

    def create(self, products: int, code_bytes: int) -> float:
        """Seconds in which the library makes so many bytes of code for so many products that it has not seen."""
        little, much = self.measured.create_s, self.measured.create_wide_s
        return products * little + code_bytes * max(much - little, 0.0) / WIDE_CODE_BYTES

    def blank(self, size_bytes: int) -> float:
        """Seconds of reading weights that are not there yet: every page is the system's page of zeros."""
        return size_bytes * self.touch_s * BLANK

    def prime(self, tiles: Tiles, images: Sequence[Image], rows: int) -> float:
        """Seconds of opening the images and of priming: one tile of each distinct size on new pages, over few keys."""
        model, shape, text = self.model, self.model.vision, self.model.text
        pixels = sum(image.source_width_px * image.source_height_px for image in images)
        seconds = pixels / self.measured.image_pixels_per_s
        for image in images[:1]:
            patches = image.patches
            for kind in VISION:
                scratch = vision_scratch(kind, model, tiles, (image,)).size_bytes
                seconds += scratch * self.touch_s
            for tile in _sizes(patches, tiles.query_rows):
                seconds += self._full_tile(tile, min(patches, PRIMING_KEYS), tiles.query_heads)
            for tile in _sizes(patches, tiles.vision_mlp_rows):
                seconds += self.mlp_tile(tile, shape.hidden, shape.intermediate, True)
            for tile in _sizes(patches, tiles.patch_rows):
                seconds += tile * shape.patch_values / self.measured.pixel_values_per_s
                seconds += self.product(tile, shape.patch_values, shape.hidden, False)
            for tile in _sizes(image.tokens, tiles.merger_rows):
                seconds += self._merger_tile(tile)
            pieces = {
                (p.stop - p.start, p.runs) for p in window_tiles(image.windows, tiles.window_rows)
            }
            seconds += sum(self.window_tile(*piece) for piece in sorted(pieces))
        for tile in _sizes(rows, tiles.prompt_rows):
            seconds += self.text("self_attn", tile, tile, 0)
        for tile in _sizes(rows, tiles.prompt_mlp_rows):
            seconds += self.mlp_tile(tile, text.hidden, text.intermediate, False)
        for kind in ("self_attn", "text_mlp"):
            tile = tiles.prompt_rows if kind == "self_attn" else tiles.prompt_mlp_rows
            seconds += text_scratch(kind, model, tile, rows).size_bytes * self.touch_s
        return seconds + self.small("lm_head", min(tiles.vocabulary_rows, text.vocabulary))


VISION: tuple[Kind, ...] = ("patch_embed", "window_attn", "full_attn", "vision_mlp", "merger")
WIDE_CODE_BYTES = kept_bytes(540, 5120, 5120, bias=False) - DESCRIPTOR_BYTES
BLANK = 0.7  # of the time of a new page
PRIMING_KEYS = 1024  # executor.ops.priming_keys: at most so many


def _sizes(rows: int, tile: int) -> list[int]:
    """Distinct rows of the tiles."""
    whole, rest = divmod(rows, tile)
    return [size for size in (tile if whole else 0, rest) if size]


def _tiled(rows: int, tile: int, seconds: Callable[[int], float]) -> float:
    """Seconds of `rows` rows by tiles; the last may be short."""
    whole, rest = divmod(rows, tile)
    return (whole * seconds(tile) if whole else 0.0) + (seconds(rest) if rest else 0.0)
