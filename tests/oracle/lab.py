"""A checkpoint with plans for it, our runs of them, and transformers' model of the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from executor.generate import Sampling
from executor.image import Pixels
from executor.prepare import Request as RunRequest
from executor.prompt import build_prompt, load_tokenizer
from executor.run import run
from planner import search
from planner.check import check
from planner.checkpoint import spec
from planner.plan import Plan
from planner.plan.shapes import Image, Workload
from planner.plan.tiles import Tiles
from planner.profile import load_profile
from tests.oracle.oracle import Oracle
from tests.oracle.settings import SETTINGS, Setting

PIXELS = {"min_pixels": 3136, "max_pixels": 12845056}


@dataclass(frozen=True)
class Answer:
    """What a run gave: tokens, image features (T, E), logits of each new token (n, V) as float32, last rows of prefill."""

    tokens: tuple[int, ...]
    features: torch.Tensor
    prefill_logits: torch.Tensor
    logits: torch.Tensor


class Lab:
    """One checkpoint on disk; transformers' model of it is loaded when first asked for, per dtype and attention."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = spec.read_checkpoint(folder)
        self.shape = self.checkpoint.shape
        self.profile = load_profile("cpu")
        self._oracles: dict[tuple[torch.dtype, str], Any] = {}
        self._plans: dict[Any, Plan] = {}

    # plans
    def workload(
        self, images: Sequence[Image], prompt: Sequence[int] | int, new_tokens: int
    ) -> Workload:
        rows = prompt if isinstance(prompt, int) else len(prompt)
        return Workload(
            images=tuple(images),
            **PIXELS,
            prompt_tokens=rows,
            prompt_is_bound=False,
            max_new_tokens=new_tokens,
            context_tokens=rows + new_tokens,
        )

    def plan(
        self,
        workload: Workload,
        setting: str | Setting | None = None,
        *,
        budget_bytes: int | None = None,
        tiles: Tiles | None = None,
    ) -> Plan:
        """The plan of a setting, or the search's; whichever it is, the checker finds nothing wrong with it."""
        key = (workload, setting, budget_bytes, tiles)
        if key not in self._plans:
            request = search.Request(self.checkpoint, workload, budget_bytes, tiles=tiles)
            if setting is None:
                plan = search.search(request, self.profile)
            else:
                setting = SETTINGS[setting] if isinstance(setting, str) else setting
                plan = search.build(request, self.profile, setting.choice(self.checkpoint))
            assert check(plan) == []
            self._plans[key] = plan
        return self._plans[key]

    # prompts and images
    def prompt(self, images: Sequence[Image], text: str = "What is in the picture?") -> list[int]:
        """Ids through the chat template."""
        tokenizer = load_tokenizer(self.folder)
        return build_prompt(tokenizer, text, images, self.shape.token_ids)

    # runs
    def run(
        self,
        plan: Plan,
        images: Sequence[Path | Pixels],
        ids: Sequence[int],
        *,
        penalty: float = 1.0,
        **changes: Any,
    ) -> Answer:
        """A greedy run without stop tokens, its outputs saved and read back."""
        if plan.device.budget_bytes is not None:
            # pytest and transformers lie in this process too: a budget is for a process of its own
            device = plan.device.model_copy(update={"budget_bytes": None})
            plan = plan.model_copy(update={"device": device})
        given: dict[str, Any] = {
            "locations": self.checkpoint.tensors,
            "images": tuple(images),
            "prompt": tuple(ids),
            "stop": (),
            "sampling": Sampling(repetition_penalty=penalty),
            "fingerprint": self.shape.fingerprint,
        }
        path = self.folder / "outputs.safetensors"
        result = run(plan, RunRequest(**(given | {"save_outputs": path} | changes)))
        saved = load_file(path)
        assert tuple(saved["tokens"].tolist()) == result.tokens
        none = torch.empty(0, self.shape.text.hidden)
        return Answer(
            result.tokens,
            saved.get("image_features", none).float(),
            saved["prefill_logits"].float(),
            saved["logits"].float(),
        )

    # transformers
    def oracle(self, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Oracle:
        key = (dtype, attention)
        if key not in self._oracles:
            self._oracles[key] = Oracle(self.folder, dtype, attention)
        return self._oracles[key]
