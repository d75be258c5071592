"""transformers' model of a checkpoint, and images as its own processor gives them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image as Pillow


class Batch(NamedTuple):
    """Images as transformers' own processor gives them."""

    pixel_values: torch.Tensor
    grid: torch.Tensor  # (images, 3)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar, no advice."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


class Oracle:
    """transformers' Qwen2_5_VLForConditionalGeneration on a checkpoint's weights."""

    def __init__(self, folder: Path, dtype: torch.dtype, attention: str) -> None:
        from transformers import Qwen2_5_VLForConditionalGeneration

        with _quiet():
            self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                folder, dtype=dtype, attn_implementation=attention
            ).eval()
        self.dtype = dtype
        assert self.model.model.visual.config._attn_implementation == attention

    def _inputs(self, ids: Sequence[int], batch: Batch | None) -> dict[str, Any]:
        row = torch.tensor([list(ids)])
        inputs = {
            "input_ids": row,
            "attention_mask": torch.ones_like(row),
            "mm_token_type_ids": (row == self.model.config.image_token_id).int(),
        }
        if batch is not None:
            pixels = batch.pixel_values.to(self.dtype)
            inputs |= {"pixel_values": pixels, "image_grid_thw": batch.grid}
        return inputs

    @torch.inference_mode()
    def features(self, batch: Batch) -> torch.Tensor:
        pixels = batch.pixel_values.to(self.dtype)
        found = self.model.get_image_features(pixels, batch.grid)
        return torch.cat(list(getattr(found, "pooler_output", found))).float()

    def generate(
        self,
        ids: Sequence[int],
        batch: Batch | None,
        count: int,
        *,
        repetition_penalty: float = 1.0,
    ) -> tuple[tuple[int, ...], torch.Tensor]:
        """`count` greedy tokens and the logits (count, V) that they were chosen by, before any penalty."""
        return self._generate(ids, batch, count, [], repetition_penalty)

    def forced(
        self, ids: Sequence[int], batch: Batch | None, tokens: Sequence[int]
    ) -> torch.Tensor:
        """Logits (n, V) by which each of `tokens` would be chosen, given the prompt and those before it."""

        def choose(seen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            wanted = torch.full_like(scores, float("-inf"))
            wanted[:, tokens[seen.shape[1] - len(ids)]] = 0.0
            return wanted

        chosen, logits = self._generate(ids, batch, len(tokens), [choose], 1.0)
        assert chosen == tuple(tokens)
        return logits

    @torch.inference_mode()
    def _generate(
        self,
        ids: Sequence[int],
        batch: Batch | None,
        count: int,
        processors: list[Any],
        repetition_penalty: float,
    ) -> tuple[tuple[int, ...], torch.Tensor]:
        with _quiet():
            found = self.model.generate(
                **self._inputs(ids, batch),
                max_new_tokens=count,
                do_sample=False,
                temperature=None,
                repetition_penalty=repetition_penalty,
                eos_token_id=None,
                pad_token_id=0,
                logits_processor=processors,
                output_logits=True,
                return_dict_in_generate=True,
            )
        # `logits` are those before processors
        return tuple(found.sequences[0, len(ids) :].tolist()), torch.cat(found.logits).float()


def process(folder: Path, paths: Sequence[Path]) -> Batch | None:
    """Pixel values and grids of the files; None of none."""
    if not paths:
        return None
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    made = processor(images=[Pillow.open(path) for path in paths], return_tensors="pt")
    return Batch(made["pixel_values"], made["image_grid_thw"])
