"""A model run step by step on plain tensors: the views of ARCHITECTURE.md's table, without plan, arena or runtime."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from executor import text, vision
from planner import buffers
from planner.plan.program import Step, View
from planner.plan.shapes import Image, ModelShape, TextShape, TokenIds, VisionShape, WindowRun
from planner.plan.tiles import Tiles

DATA = Path(__file__).parent.parent / "data"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WIDE_TILES = {
    "patch_rows": 10**6,
    "window_rows": 10**6,
    "query_rows": 10**6,
    "query_heads": 10**6,
    "vision_mlp_rows": 10**6,
    "merger_rows": 10**6,
    "prompt_rows": 10**6,
    "prompt_heads": 10**6,
    "prompt_mlp_rows": 10**6,
    "vocabulary_rows": 10**6,
}


def shape_of(config: Mapping[str, Any], dtype: str) -> ModelShape:
    """A ModelShape from config.json's terms."""
    tower = config["vision_config"]
    size = config["hidden_size"] // config["num_attention_heads"]
    return ModelShape(
        name="test",
        dtype=dtype,  # type: ignore[arg-type]
        vision=VisionShape(
            depth=tower["depth"],
            hidden=tower["hidden_size"],
            heads=tower["num_heads"],
            intermediate=tower["intermediate_size"],
            out_hidden=config["hidden_size"],
            in_channels=3,
            patch_px=14,
            temporal_patch=2,
            merge=2,
            window_px=112,
            full_attention_blocks=tuple(tower["fullatt_block_indexes"]),
        ),
        text=TextShape(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=size,
            intermediate=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            rope_theta=config["rope_theta"],
            mrope_section=tuple(config["rope_scaling"]["mrope_section"]),
            rms_norm_eps=config["rms_norm_eps"],
            tied=config["tie_word_embeddings"],
        ),
        token_ids=TokenIds(image=500, video=501, vision_start=502, vision_end=503, stop=(2,)),
        repetition_penalty=1.0,
        fingerprint="",
    )


def make_image(rows: int, cols: int) -> tuple[Image, Tensor]:
    """An image of rows x cols patches, and the row-major merge unit of each unit in window order."""
    high, wide = rows // 2, cols // 2
    groups: dict[tuple[bool, bool], list[list[int]]] = {}
    for top in range(0, high, 4):
        for left in range(0, wide, 4):
            units = [
                y * wide + x
                for y in range(top, min(top + 4, high))
                for x in range(left, min(left + 4, wide))
            ]
            groups.setdefault((top + 4 > high, left + 4 > wide), []).append(units)
    ordered = [groups[key] for key in sorted(groups)]
    windows = tuple(WindowRun(count=len(group), rows=4 * len(group[0])) for group in ordered)
    image = Image(
        name="image",
        source_width_px=14 * cols,
        source_height_px=14 * rows,
        width_px=14 * cols,
        height_px=14 * rows,
        rows=rows,
        cols=cols,
        windows=windows,
    )
    return image, torch.tensor([unit for group in ordered for window in group for unit in window])


def step_of(id: str, kind: str, images: Sequence[int] = ()) -> Step:
    return Step.model_construct(id=id, kind=kind, images=tuple(images), kernel="cpu_flash")


class Pixels:
    def __init__(self, values: Tensor) -> None:
        self.values = values

    def rows(self, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self.values[start:stop])


class Model:
    """One request on one model, every view a fresh tensor full of NaN, so that a row read before it is written shows."""

    def __init__(
        self,
        shape: ModelShape,
        weights: Mapping[str, Tensor],
        grids: Sequence[tuple[int, int]],
        pixels: Sequence[Tensor],
        ids: Sequence[int] = (),
        positions: Tensor | None = None,
        *,
        spare_rows: int = 0,
        kernel: str = "cpu_flash",
        priming: bool = False,
        **tiles: int,
    ) -> None:
        self.shape, self.ids, self.spare = shape, list(ids), spare_rows
        self.dtype = DTYPES[shape.dtype]
        self.weights = {name: tensor.to(self.dtype) for name, tensor in weights.items()}
        self.tiles = Tiles(**{**WIDE_TILES, **tiles})
        made = [make_image(*grid) for grid in grids]
        self.images = tuple(image for image, _ in made)
        self.orders = tuple(order for _, order in made)
        rows_first = [
            torch.stack(
                torch.meshgrid(torch.arange(r), torch.arange(c), indexing="ij"), -1
            )  # (rows, cols, 2) -> merge units row-major, 2x2 inside
            .view(r // 2, 2, c // 2, 2, 2)
            .permute(0, 2, 1, 3, 4)
            .reshape(-1, 2)
            for r, c in grids
        ]
        patches = [(order[:, None] * 4 + torch.arange(4)).view(-1) for order in self.orders]
        self.spans = []
        start = 0
        for image in self.images:
            start = self.ids.index(shape.token_ids.image, start) if ids else start
            self.spans.append((start, image.tokens))
            start += image.tokens
        self.positions = positions
        self.vision_run = vision.VisionRun(
            shape=shape,
            tiles=self.tiles,
            images=self.images,
            pixels=tuple(Pixels(p[o]) for p, o in zip(pixels, patches, strict=True)),
            positions=tuple((p[o, 0], p[o, 1]) for p, o in zip(rows_first, patches, strict=True)),
            unit_order=self.orders,
            image_token_rows=tuple(first for first, _ in self.spans),
            kernel=kernel,  # type: ignore[arg-type]
            frequencies=vision.vision_frequencies(shape.vision),
            priming=priming,
        )
        self.prompt_rows = len(self.ids) or sum(image.tokens for image in self.images)
        self.x = self.empty((self.prompt_rows + spare_rows, shape.text.hidden))
        capacity = self.prompt_rows + spare_rows + 32
        width = (capacity, shape.text.kv_heads, shape.text.head_dim)
        self.cache = [(self.empty(width), self.empty(width)) for _ in range(shape.text.layers)]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype or self.dtype)

    def views(self, made: buffers.Layouted) -> dict[str, Tensor]:
        def tensor(view: View) -> Tensor:
            return self.empty(view.shape, DTYPES[view.dtype])

        return {view.name: tensor(view) for view in made.views}

    def unit(self, prefix: str) -> dict[str, Tensor]:
        prefix += "."
        return {n[len(prefix) :]: t for n, t in self.weights.items() if n.startswith(prefix)}

    def vision_steps(
        self, together: bool = True
    ) -> Iterator[tuple[Callable[..., None], Step, dict[str, Tensor], dict[str, Tensor]]]:
        """(function, step, weights, views) of every vision step in order."""
        everything = tuple(range(len(self.images)))
        for group in [everything] if together else [(i,) for i in everything]:
            images = [self.images[i] for i in group]
            patches = sum(image.patches for image in images)
            x = self.empty((patches + self.spare, self.shape.vision.hidden))
            prefix = "vision/" if together else f"vision[{group[0]}]/"

            def views(
                kind: str, x: Tensor = x, images: Sequence[Image] = images
            ) -> dict[str, Tensor]:
                made = buffers.vision_scratch(kind, self.shape, self.tiles, images)  # type: ignore[arg-type]
                return {"x": x, "prefill/x": self.x, **self.views(made)}

            for module in ("patch_embed", *(f"blocks.{i}" for i in range(self.shape.vision.depth))):
                w = self.unit(f"visual.{module}")
                if module == "patch_embed":
                    yield (
                        vision.patch_embed,
                        step_of(prefix + module, module, group),
                        w,
                        views(module),
                    )
                    continue
                full = int(module.split(".")[1]) in self.shape.vision.full_attention_blocks
                attention = vision.full_attn if full else vision.window_attn
                kind = "full_attn" if full else "window_attn"
                yield attention, step_of(f"{prefix}{module}.attn", kind, group), w, views(kind)
                mlp = step_of(f"{prefix}{module}.mlp", "vision_mlp", group)
                yield vision.vision_mlp, mlp, w, views("vision_mlp")
            w = self.unit("visual.merger")
            yield vision.merger, step_of(f"{prefix}merger", "merger", group), w, views("merger")

    def text_steps(
        self, phase: str, x: Tensor, rows: int
    ) -> Iterator[tuple[Callable[..., None], Step, dict[str, Tensor], dict[str, Tensor]]]:
        """(function, step, weights, views) of every language-model step but `sample`, in order."""
        made = buffers.text_scratch("self_attn", self.shape, self.tiles.prompt_rows, rows)
        yield text.embed_tokens, step_of(f"{phase}/embed_tokens", "embed_tokens"), {}, {"x": x}
        for layer, (k, v) in enumerate(self.cache):
            w = self.unit(f"model.layers.{layer}")
            step = step_of(f"{phase}/layers.{layer}.self_attn", "self_attn")
            yield text.self_attn, step, w, {"x": x, "k": k, "v": v, **self.views(made)}
            step = step_of(f"{phase}/layers.{layer}.mlp", "text_mlp")
            mlp = buffers.text_scratch("text_mlp", self.shape, self.tiles.prompt_mlp_rows, rows)
            yield text.text_mlp, step, w, {"x": x, **self.views(mlp)}
        hidden = self.empty((1, self.shape.text.hidden))
        self.logits = self.empty((self.shape.text.vocabulary,))
        w = self.unit("model.norm")
        yield text.norm, step_of(f"{phase}/norm", "norm"), w, {"x": x, "hidden": hidden}
        head = self.weights["lm_head.weight"]
        for i, start in enumerate(range(0, head.shape[0], self.tiles.vocabulary_rows)):
            part = head[start : start + self.tiles.vocabulary_rows]
            views = {"hidden": hidden, "logits": self.logits}
            yield text.lm_head, step_of(f"{phase}/lm_head[{i}]", "lm_head"), {"weight": part}, views

    def text_run(
        self, ids: Sequence[int], start: int, spans: Sequence[tuple[int, int]]
    ) -> text.TextRun:
        def read(wanted: Sequence[int], out: Tensor) -> None:
            out.copy_(self.weights["model.embed_tokens.weight"][torch.tensor(wanted)])

        assert self.positions is not None
        return text.TextRun(
            shape=self.shape,
            tiles=self.tiles,
            ids=ids,
            start=start,
            positions=self.positions,
            image_spans=tuple(spans),
            read_embeddings=read,
            kernel=self.vision_run.kernel,
            frequencies=text.text_frequencies(self.shape.text),
            priming=self.vision_run.priming,
        )

    @torch.inference_mode()
    def encode(self, together: bool = True) -> Tensor:
        """Image tokens (T, E), row-major, images one behind another."""
        for function, step, w, v in self.vision_steps(together):
            function(self.vision_run, step, w, v)
        return torch.cat([self.x[first : first + rows] for first, rows in self.spans])

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        run = self.text_run(self.ids, 0, self.spans)
        for function, step, w, v in self.text_steps("prefill", self.x, len(self.ids) + self.spare):
            function(run, step, w, v)
        return self.logits

    @torch.inference_mode()
    def decode(self, token: int, start: int) -> Tensor:
        x = self.empty((1, self.shape.text.hidden))
        run = self.text_run([token], start, ())
        for function, step, w, v in self.text_steps("decode", x, 1):
            function(run, step, w, v)
        return self.logits

    def greedy(self, count: int) -> list[int]:
        logits = self.prefill()
        tokens: list[int] = []
        while True:
            tokens.append(int(logits.argmax()))
            if len(tokens) == count:
                return tokens
            logits = self.decode(tokens[-1], len(self.ids) + len(tokens) - 1)


class Tiny:
    """The golden fixture: what transformers computed, and the same request on our steps."""

    def __init__(self) -> None:
        self.config = json.loads((DATA / "tiny_config.json").read_text())
        self.weights = {n: t.float() for n, t in load_file(DATA / "tiny.safetensors").items()}
        with np.load(DATA / "tiny_expected.npz") as arrays:
            self.expected = {name: torch.from_numpy(arrays[name]) for name in arrays}
        self.grids = [(int(h), int(w)) for _, h, w in self.expected["grid_thw"]]
        values = self.expected["pixel_values_x40"].float() / 40
        self.pixels = list(values.split([h * w for h, w in self.grids]))
        length = len(self.expected["input_ids"])
        later = torch.arange(length, length + 64) + self.expected["rope_delta"]
        self.positions = torch.cat((self.expected["position_ids"], later.expand(3, -1)), dim=1)

    def model(self, dtype: str = "float32", **options: Any) -> Model:
        ids = self.expected["input_ids"].tolist()
        shape = shape_of(self.config, dtype)
        return Model(shape, self.weights, self.grids, self.pixels, ids, self.positions, **options)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Model]:
    return Model


@pytest.fixture(scope="session")
def make_shape() -> Callable[[Mapping[str, Any], str], ModelShape]:
    return shape_of
