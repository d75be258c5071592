"""A bfloat16 checkpoint, plain or with massive activations, run in float16 and by transformers in any dtype."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from executor.device import Device
from executor.generate import Sampling
from executor.image import ArrayPixels
from executor.make_checkpoint import make_random_checkpoint
from executor.prepare import Request
from executor.record import Record
from executor.run import run
from planner import search
from planner.check import check
from planner.checkpoint import spec
from planner.dtype import in_dtype
from planner.plan import Plan
from planner.plan.tiles import Tiles
from planner.profile import load_profile
from planner.workload import make_workload, parse_image
from tests.tiles import ODD

PIXELS = {"min_pixels": 3136, "max_pixels": 12845056}
NEW_TOKENS = 8
# of checkpoints whose answers are decided by more than rounding
SEEDS = {None: 10, "text": 7, "vision": 0}
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Said(NamedTuple):
    """Tokens, image features and logits of each new token as float32, and the record of a run."""

    tokens: tuple[int, ...]
    features: torch.Tensor
    logits: torch.Tensor
    record: Record | None = None


@dataclass(frozen=True)
class Lab:
    """One checkpoint in bfloat16, the same with weights as float16 holds them in float32, and requests with two images."""

    folder: Path

    def __post_init__(self) -> None:
        self.rounded.mkdir()
        for path in self.folder.glob("*.json"):
            shutil.copyfile(path, self.rounded / path.name)
        weights = {name: t.half().float() for name, t in load_file(self.file).items()}
        save_file(weights, self.rounded / self.file.name, metadata={"format": "pt"})

    @property
    def file(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def rounded(self) -> Path:
        return self.folder / "rounded"

    def checkpoint(self, dtype: str = "float16") -> spec.Checkpoint:
        return in_dtype(spec.read_checkpoint(self.folder), load_profile("cpu"), dtype)

    def pixels(self, name: str = "140x84 84x112") -> tuple[ArrayPixels, ...]:
        draws = torch.Generator().manual_seed(1)
        images = [parse_image(part, **PIXELS) for part in name.split()]
        return tuple(ArrayPixels(torch.randn(i.patches, 1176, generator=draws), i) for i in images)

    def ids(self, pixels: Sequence[ArrayPixels]) -> list[int]:
        tokens = self.checkpoint().shape.token_ids
        found = [11, 12]
        for each in pixels:
            found += [tokens.vision_start, *[tokens.image] * each.image.tokens, tokens.vision_end]
        return [*found, *range(30, 45)]

    def plan(
        self,
        dtype: str = "float16",
        *,
        tiles: Tiles | None = None,
        images: str = "140x84 84x112",
    ) -> Plan:
        """The search's plan for the two images on the CPU; the checker finds nothing wrong with it."""
        pixels = self.pixels(images)
        workload = make_workload(
            [each.image for each in pixels],
            **PIXELS,
            n_text_tokens=1,
            max_new_tokens=NEW_TOKENS,
        )
        rows = len(self.ids(pixels))
        sizes = {"prompt_tokens": rows, "context_tokens": rows + NEW_TOKENS}
        workload = workload.model_copy(update=sizes)
        checkpoint = self.checkpoint(dtype)
        request = search.Request(checkpoint, workload, None, tiles=tiles)
        plan = search.search(request, load_profile("cpu"))
        assert check(plan) == []
        return plan

    def run(
        self, plan: Plan, device: Device | None = None, images: str = "140x84 84x112", **given: Any
    ) -> Said:
        """A greedy run without stop tokens."""
        pixels = self.pixels(images)
        path = self.folder / "outputs.safetensors"
        request = Request(
            locations=self.checkpoint().tensors,
            images=pixels,
            prompt=self.ids(pixels),
            stop=(),
            sampling=Sampling(),
            fingerprint=self.checkpoint().shape.fingerprint,
            save_outputs=path,
        )
        found = run(plan, replace(request, **given), device)
        saved = load_file(path)
        features, logits = saved["image_features"].float(), saved["logits"].float()
        return Said(found.tokens, features, logits, found.record)

    @torch.inference_mode()
    def transformers(self, dtype: torch.dtype = torch.float32) -> Said:
        """transformers' greedy answer, in float32 on the weights as float16 holds them, else on the files' own."""
        from transformers import Qwen2_5_VLForConditionalGeneration
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder = self.rounded if dtype == torch.float32 else self.folder
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        pixels = self.pixels()
        row = torch.tensor([self.ids(pixels)])
        values = torch.cat([each._values for each in pixels]).to(dtype)
        grid = torch.tensor([[1, each.image.rows, each.image.cols] for each in pixels])
        features = model.get_image_features(values, grid)
        found = model.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            mm_token_type_ids=(row == model.config.image_token_id).int(),
            pixel_values=values,
            image_grid_thw=grid,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = tuple(found.sequences[0, row.shape[1] :].tolist())
        parts = torch.cat(list(getattr(features, "pooler_output", features)))
        return Said(tokens, parts.float(), torch.cat(found.logits).float())


def massive(part: str) -> Callable[[Weights], None]:
    """Makes one value of a gated product, and what down_proj makes of it, larger than float16 holds."""

    def change(weights: Weights) -> None:
        block = {"text": "model.layers.1.mlp.", "vision": "visual.blocks.1.mlp."}[part]
        for name in ("gate_proj.weight", "up_proj.weight"):
            row = weights[block + name][7].float()
            weights[block + name][7] = row / row.norm() * 1500

    return change


@pytest.fixture(scope="session")
def labs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Lab]:
    """A lab by the part of the model that has massive activations (None: none), made once."""
    made: dict[str | None, Lab] = {}

    def lab(part: str | None = None) -> Lab:
        if part not in made:
            folder = tmp_path_factory.mktemp("float16") / "checkpoint"
            make_random_checkpoint("tiny:bfloat16", folder, seed=SEEDS[part])
            if part:
                path = folder / "model.safetensors"
                weights = load_file(path)
                massive(part)(weights)
                save_file(weights, path, metadata={"format": "pt"})
            made[part] = Lab(folder)
        return made[part]

    return lab


@pytest.fixture(scope="session")
def odd_tiles() -> Tiles:
    return ODD
