"""Seconds of steps and copies on a device: from tables of measured kernels where its profile has them, else by the roofline.

Roofline: max(FLOPs / rate(rows), bytes / bandwidth) + launches. A multiply-add counts 2 FLOPs. `rate(rows)` comes from
the profile: small tiles run slower. Tables: planner.calls.
FLOP counts: model-card arithmetic of Qwen2.5-VL's modules; attention in windows is 4 D len^2 per window, full
4 D P^2, causal prefill 2 S^2 H d.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from planner.calls import Calls
from planner.checkpoint.template import unit_sizes
from planner.plan.shapes import Image, ModelShape
from planner.plan.tiles import Tiles, spans, window_tiles
from planner.plan.words import DTYPE_BYTES, Kind
from planner.profile import DeviceProfile
from planner.queues import APART, Beside

# passes over a tile's rows that elementwise kernels make, in elements read or written (norm: upcast, square, scale,
# downcast, weight; rope: upcast, multiply, two halves, downcast; residual adds and copies)
NORM_PASSES = 10
ROPE_PASSES = 14
RESIDUAL_PASSES = 6
GATE_PASSES = 5
# more of them where the residual stream is float32 beside 16-bit steps: a norm's wider rows; a sum's, by way of float32
# scratch; bounds of both factors of a gated product, and their scaling; patches, by way of scratch
WIDE_NORM_PASSES, WIDE_RESIDUAL_PASSES, WIDE_GATE_PASSES, WIDE_PATCH_PASSES = 1, 6, 6, 3
# weights that the reader's thread converts, bfloat16 to float16 (one core, 2026-11)
CONVERTED_BYTES_PER_S = 2.5e9
# patch values that the host cuts out and normalises, where nobody measured: a third of what two cores of a server do
PIXEL_VALUES_PER_S = 70e6


class Costs:
    """Seconds of one model's steps on one device; remembers what it computed."""

    def __init__(self, model: ModelShape, profile: DeviceProfile) -> None:
        self.model, self.profile = model, profile
        self.element = DTYPE_BYTES[model.dtype]
        wide = model.residual_dtype != model.dtype
        self.norm_passes = NORM_PASSES + wide * WIDE_NORM_PASSES
        self.more_residual = wide * WIDE_RESIDUAL_PASSES
        self.residual_passes = RESIDUAL_PASSES + self.more_residual
        self.gate_passes = GATE_PASSES + wide * WIDE_GATE_PASSES
        self.patch_passes = wide * WIDE_PATCH_PASSES
        self.converts = model.stored_dtype != model.dtype
        self._matmul = lru_cache(maxsize=4096)(self._matmul_tile)
        sizes = unit_sizes(model, model.text.vocabulary)
        # on the CPU files stay in the page cache, also from one run to the next, where they fit in memory beside the arena
        self.warm = profile.kind == "cpu" and 2 * sum(sizes.values()) <= profile.usable_bytes
        self.beside = APART
        if profile.kind == "cpu":
            # the reader takes the place of one thread
            threads = max(2, profile.threads or 2)
            self.beside = Beside((threads - 1) / threads)
        self._calls = None
        if profile.measured:
            token = sum(size for unit, size in sizes.items() if unit.startswith("text/"))
            self._calls = Calls(profile.measured, model, token)
            self.beside = self._calls.beside

    def _matmul_tile(self, rows: int, fan_in: int, fan_out: int) -> float:
        flops = 2 * rows * fan_in * fan_out
        moved = (fan_in * fan_out + rows * (fan_in + fan_out)) * self.element
        return (
            max(
                flops / self.profile.matmul_rate(self.model.dtype, rows),
                moved / self.profile.bandwidth_bytes_per_s,
            )
            + self.profile.launch_s
        )

    def matmul(self, rows: int, tile: int, fan_in: int, fan_out: int) -> float:
        """Seconds of (rows, in) @ (in, out) by tiles of `tile` rows."""
        whole, rest = divmod(rows, tile)
        seconds = whole * self._matmul(tile, fan_in, fan_out) if whole else 0.0
        return seconds + (self._matmul(rest, fan_in, fan_out) if rest else 0.0)

    def elementwise(self, elements: int, passes: int, tiles: int) -> float:
        """Seconds of `passes` passes over `elements` elements in `tiles` tiles."""
        moved = elements * passes * self.element
        launches = passes * tiles * self.profile.launch_s
        return moved / self.profile.bandwidth_bytes_per_s + launches

    def attention(self, flops: int, rows: int, calls: int) -> float:
        """Seconds of attention with `rows` query rows a call."""
        return (
            flops / self.profile.attention_rate(self.model.dtype, rows)
            + calls * self.profile.launch_s
        )

    def vision(self, kind: Kind, tiles: Tiles, images: Sequence[Image]) -> float:
        """Seconds of one vision step over `images`."""
        if self._calls:
            return self._calls.vision(kind, tiles, images)
        shape = self.model.vision
        width = shape.hidden
        rows = sum(image.patches for image in images)
        if kind == "patch_embed":
            seconds = self.matmul(rows, tiles.patch_rows, shape.patch_values, width)
            if self.patch_passes:
                pieces = sum(-(-image.patches // tiles.patch_rows) for image in images)
                seconds += self.elementwise(rows * width, self.patch_passes, pieces)
            # the host cuts and normalises the pixels
            return seconds + rows * shape.patch_values / PIXEL_VALUES_PER_S
        if kind == "window_attn":
            seconds, pieces = 0.0, 0
            flops = 0
            for image in images:
                for piece in window_tiles(image.windows, tiles.window_rows):
                    size = piece.stop - piece.start
                    seconds += self._matmul(size, width, 3 * width)
                    seconds += self._matmul(size, width, width)
                    flops += sum(4 * width * count * run * run for count, run in piece.runs)
                    pieces += 1
            seconds += self.attention(flops, 64, pieces)
            passes = self.norm_passes + ROPE_PASSES + self.residual_passes
            return seconds + self.elementwise(rows * width, passes, pieces)
        if kind == "full_attn":
            tile = tiles.query_rows
            pieces = sum(-(-image.patches // tile) for image in images)
            seconds = self.matmul(rows, tile, width, 2 * width)
            seconds += 2 * self.matmul(rows, tile, width, width)
            flops = sum(4 * width * image.patches**2 for image in images)
            calls = pieces * -(-shape.heads // tiles.query_heads)
            seconds += self.attention(flops, min(tile, rows), calls)
            passes = 2 * self.norm_passes + ROPE_PASSES + self.residual_passes
            return seconds + self.elementwise(rows * width, passes, pieces)
        if kind == "vision_mlp":
            return self._mlp(rows, tiles.vision_mlp_rows, width, shape.intermediate)
        if kind == "merger":
            wide, tokens = shape.merge**2 * width, rows // shape.merge**2
            tile = tiles.merger_rows
            seconds = self.matmul(tokens, tile, wide, wide)
            seconds += self.matmul(tokens, tile, wide, shape.out_hidden)
            return seconds + self.elementwise(
                rows * width, self.norm_passes + self.residual_passes, -(-tokens // tile)
            )
        raise AssertionError(kind)

    def _mlp(self, rows: int, tile: int, width: int, inner: int) -> float:
        seconds = 2 * self.matmul(rows, tile, width, inner) + self.matmul(rows, tile, inner, width)
        pieces = -(-rows // tile)
        seconds += self.elementwise(
            rows * width, self.norm_passes + RESIDUAL_PASSES // 2 + self.more_residual, pieces
        )
        return seconds + self.elementwise(rows * inner, self.gate_passes, pieces)

    def text(
        self, kind: Kind, tile: int, rows: int, context: int, groups_per_call: int | None = None
    ) -> float:
        """Seconds of one language-model step over `rows` rows that see `context` keys at their end.

        `groups_per_call`: key heads that a call of attention takes; None: all.
        """
        if self._calls:
            return self._calls.text(kind, tile, rows, context, groups_per_call)
        text = self.model.text
        width = text.hidden
        heads, groups = text.heads * text.head_dim, text.kv_heads * text.head_dim
        if kind == "self_attn":
            seconds = self.matmul(rows, tile, width, heads + 2 * groups)
            seconds += self.matmul(rows, tile, heads, width)
            if rows == 1:
                cache = 2 * context * groups * self.element
                seconds += cache / self.profile.bandwidth_bytes_per_s + self.profile.launch_s
            else:
                flops = sum(4 * heads * (stop - start) * stop for start, stop in spans(rows, tile))
                seconds += self.attention(flops, min(tile, rows), 2 * -(-rows // tile))
            passes = self.norm_passes + ROPE_PASSES + self.residual_passes
            return seconds + self.elementwise(rows * width, passes, -(-rows // tile))
        if kind == "text_mlp":
            return self._mlp(rows, tile, width, text.intermediate)
        raise AssertionError(kind)

    def small(self, kind: Kind, head_rows: int) -> float:
        """Seconds of a step on one row: embedding rows, final norm, a row tile of lm_head, sampling."""
        if self._calls:
            return self._calls.small(kind, head_rows)
        text = self.model.text
        if kind == "lm_head":
            return self._matmul(1, text.hidden, head_rows)
        if kind == "sample":
            return self.elementwise(text.vocabulary, GATE_PASSES, 1) + 2 * self.profile.launch_s
        return self.elementwise(text.hidden, NORM_PASSES, 1)

    def prime(
        self,
        tiles: Tiles,
        images: Sequence[Image],
        rows: int,
        products: int,
        code_bytes: int,
        weight_bytes: int,
    ) -> float:
        """Seconds of one tile of every distinct shape, and of opening the images, before the first step. `products`: distinct shapes of them, for which so many bytes of code are made."""
        if not self._calls:
            return 0.0
        seconds = self._calls.prime(tiles, images, rows)
        return seconds + self._calls.create(products, code_bytes) + self._calls.blank(weight_bytes)

    def copy(self, size_bytes: int, *, first: bool, cached: bool, fresh: bool = False) -> float:
        """Seconds of bringing `size_bytes` of weights: `first` from disk; again from host memory where the file stays `cached`.

        `fresh`: into pages of the arena that nothing has touched yet, which the system must clear first.
        """
        profile, measured = self.profile, self.profile.measured
        kept = self.warm or (cached and not first)
        source = profile.page_cache_bytes_per_s if kept else profile.disk_bytes_per_s
        seconds = size_bytes / min(source, profile.host_to_device_bytes_per_s)
        if self.converts:
            seconds += size_bytes / CONVERTED_BYTES_PER_S
        if measured:
            seconds += measured.copy_s + (self.touch(size_bytes) if fresh else 0.0)
        return seconds

    def from_host(self, size_bytes: int) -> float:
        """Seconds of bringing weights that stay in pinned host memory."""
        return size_bytes / self.profile.host_to_device_bytes_per_s

    def pin(self, size_bytes: int) -> float:
        """Seconds of taking pinned memory for a unit, in which its first copy comes by."""
        return size_bytes / self.profile.pin_bytes_per_s

    def touch(self, size_bytes: int) -> float:
        """Seconds that the system takes to clear new pages; nothing on a card."""
        measured = self.profile.measured
        rate = measured.first_touch_bytes_per_s if measured else 0
        return size_bytes / rate if rate else 0.0
