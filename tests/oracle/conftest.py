"""A checkpoint with plans for it, our runs of them, and transformers' model of the same weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file

from executor.generate import Sampling
from executor.image import ArrayPixels, Pixels
from executor.make_checkpoint import make_random_checkpoint
from executor.prepare import Request as RunRequest
from executor.prompt import build_prompt, load_tokenizer
from executor.run import run
from planner import search
from planner.check import check
from planner.checkpoint import spec
from planner.plan import Plan
from planner.plan.shapes import Image, Workload
from planner.plan.tiles import Tiles
from planner.plan.words import Order
from planner.profile import load_profile
from planner.schedule import Choice, PhaseResidency
from planner.workload import parse_image

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
EXAMPLES = ROOT / "examples"
PIXELS = {"min_pixels": 3136, "max_pixels": 12845056}

# --- settings of the levers ---------------------------------------------------------------------------------------

LARGER = Tiles(
    patch_rows=10**6,
    window_rows=10**6,
    query_rows=10**6,
    query_heads=10**6,
    vision_mlp_rows=10**6,
    merger_rows=10**6,
    prompt_rows=10**6,
    prompt_heads=10**6,
    prompt_mlp_rows=10**6,
    vocabulary_rows=10**6,
)
ONE_WINDOW = Tiles(
    patch_rows=64,
    window_rows=64,
    query_rows=64,
    query_heads=1,
    vision_mlp_rows=64,
    merger_rows=16,
    prompt_rows=1,
    prompt_heads=1,
    prompt_mlp_rows=1,
    vocabulary_rows=128,
)
ODD = Tiles(
    patch_rows=37,
    window_rows=81,
    query_rows=29,
    query_heads=1,
    vision_mlp_rows=53,
    merger_rows=5,
    prompt_rows=7,
    prompt_heads=1,
    prompt_mlp_rows=11,
    vocabulary_rows=100,
)


class Setting(NamedTuple):
    """One setting of every lever; residency as shares of a stack's attention units, MLP units and lm_head tiles."""

    order: Order
    together: bool
    depth: int
    vision: tuple[float, float]
    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    tiles: Tiles

    def choice(self, checkpoint: spec.Checkpoint) -> Choice:
        shape = checkpoint.shape
        blocks, layers = shape.vision.depth, shape.text.layers
        tiles = self.tiles.model_copy(
            update={
                "query_heads": min(self.tiles.query_heads, shape.vision.heads),
                "prompt_heads": min(self.tiles.prompt_heads, shape.text.kv_heads),
                "vocabulary_rows": min(self.tiles.vocabulary_rows, shape.text.vocabulary),
            }
        )
        heads = ceil(shape.text.vocabulary / tiles.vocabulary_rows)

        def text(attn: float, mlp: float, head: float) -> PhaseResidency:
            return PhaseResidency(ceil(attn * layers), ceil(mlp * layers), ceil(head * heads))

        attn, mlp = self.vision
        return Choice(
            order=self.order,
            images_together=self.together,
            depth=self.depth,
            vision=PhaseResidency(ceil(attn * blocks), ceil(mlp * blocks)),
            prefill=text(*self.prefill),
            decode=text(*self.decode),
            tiles=tiles,
        )


def _rows(tiles: Tiles, prompt: int) -> Tiles:
    return tiles.model_copy(update={"prompt_rows": prompt, "prompt_mlp_rows": prompt})


ALL, NONE = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
SETTINGS = {
    "all resident, nothing tiled": Setting("all_first", True, 1, (1, 1), ALL, ALL, LARGER),
    "all streamed, one slot, one window": Setting(
        "vision_then_llm", True, 1, (0, 0), NONE, NONE, ONE_WINDOW
    ),
    "all streamed, two slots, odd tiles": Setting(
        "vision_then_llm", False, 2, (0, 0), NONE, NONE, ODD
    ),
    "all streamed, three slots, nothing tiled": Setting(
        "vision_then_llm", True, 3, (0, 0), NONE, NONE, _rows(LARGER, 7)
    ),
    "vision streamed, LLM prefetched": Setting(
        "prefetch", True, 2, (0, 0), ALL, ALL, _rows(ODD, 10**6)
    ),
    "vision resident, LLM streamed": Setting(
        "vision_then_llm", False, 1, (1, 1), NONE, NONE, _rows(ONE_WINDOW, 7)
    ),
    "half of each, LLM first": Setting(
        "all_first", False, 3, (0.5, 0.5), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), ONE_WINDOW
    ),
    "half prefetched, grows after prefill": Setting(
        "prefetch", False, 2, (0, 0.5), (0.3, 0.3, 0), (0.7, 0.7, 1), _rows(LARGER, 1)
    ),
    "nothing in prefill, everything in decode": Setting(
        "vision_then_llm", True, 3, (1, 0), NONE, ALL, ODD
    ),
    "attention and lm_head stay, MLPs streamed": Setting(
        "all_first", True, 2, (0, 1), (1, 0, 1), (1, 0, 1), _rows(ODD, 10**6)
    ),
}

# --- runs ---------------------------------------------------------------------------------------------------------


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


# --- transformers -------------------------------------------------------------------------------------------------


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


# --- fixtures -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small gain nothing from threads, and these wait for one another where the cores are taken."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Golden:
    """What transformers computed with the stored tiny model in float32, and a Lab of a float32 checkpoint of it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        shutil.copyfile(DATA / "tiny_config.json", folder / "config.json")
        # stored in bfloat16, and exact there
        weights = {n: t.float() for n, t in load_file(DATA / "tiny.safetensors").items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        self.lab = Lab(folder)
        with np.load(DATA / "tiny_expected.npz") as arrays:
            self.expected = {name: torch.from_numpy(arrays[name]) for name in arrays}
        self.ids = self.expected["input_ids"].tolist()
        self.grids = [(int(h), int(w)) for _, h, w in self.expected["grid_thw"]]
        self.images = [parse_image(f"{14 * w}x{14 * h}", **PIXELS) for h, w in self.grids]
        values = self.expected["pixel_values_x40"].float() / 40
        split = values.split([h * w for h, w in self.grids])
        self.pixels = [ArrayPixels(v, i) for v, i in zip(split, self.images, strict=True)]

    def plan(
        self,
        setting: str | Setting | None = None,
        *,
        new_tokens: int = 12,
        spare_rows: int = 0,
        budget_bytes: int | None = None,
    ) -> Plan:
        workload = self.lab.workload(self.images, len(self.ids) + spare_rows, new_tokens)
        return self.lab.plan(workload, setting, budget_bytes=budget_bytes)

    def run(self, plan: Plan, **changes: Any) -> Answer:
        return self.lab.run(plan, self.pixels, self.ids, **changes)


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(tmp_path_factory.mktemp("golden") / "tiny")


@pytest.fixture(scope="session")
def settings() -> dict[str, Setting]:
    return SETTINGS


@pytest.fixture(scope="session", params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> str:
    """Each setting's name in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def labs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Lab of a random checkpoint by specification and seed, made once."""
    made: dict[tuple[str, int], Lab] = {}

    def lab(specification: str, seed: int = 0) -> Lab:
        key = (specification, seed)
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoints") / specification.replace(":", "-")
            make_random_checkpoint(specification, folder, seed=seed)
            made[key] = Lab(folder)
        return made[key]

    return lab


class Pictures:
    """The images of a request: files, as planned, transformers' pixel values."""

    def __init__(self, paths: Sequence[Path], lab: Lab) -> None:
        self.paths = tuple(paths)
        self.images = [parse_image(str(path), **PIXELS) for path in paths]
        self.batch = process(lab.folder, paths)


# name -> crops as (file, left, top, width, height, scaled to)
CROPS: dict[str, tuple[tuple[str, tuple[int, int, int, int], tuple[int, int]], ...]] = {
    "square": (("astronaut.jpg", (100, 20, 380, 300), (280, 280)),),
    "wide strip": (("earth_3840x2160.jpg", (0, 900, 3840, 1200), (590, 46)),),
    "tall": (("astronaut.jpg", (180, 0, 290, 512), (99, 461)),),
    "needs upscaling": (("earth_3840x2160.jpg", (1900, 1000, 1939, 1027), (39, 27)),),
    "two at once": (
        ("astronaut.jpg", (0, 0, 300, 250), (151, 123)),
        ("earth_3840x2160.jpg", (1000, 500, 2500, 1500), (260, 170)),
    ),
}


@pytest.fixture(scope="session")
def crops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, ...]]:
    """Five requests' image files, cut from the examples."""
    folder = tmp_path_factory.mktemp("crops")
    files: dict[str, tuple[Path, ...]] = {"no image": ()}
    for name, parts in CROPS.items():
        paths = []
        for number, (source, box, size) in enumerate(parts):
            path = folder / f"{name.replace(' ', '-')}-{number}.png"
            with Pillow.open(EXAMPLES / source) as picture:
                picture.crop(box).resize(size, Pillow.Resampling.BICUBIC).save(path)
            paths.append(path)
        files[name] = tuple(paths)
    return files


@pytest.fixture(scope="session", params=["no image", *CROPS])
def request_name(request: pytest.FixtureRequest) -> str:
    """Each request's name in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def pictures(crops: dict[str, tuple[Path, ...]], labs: Any) -> dict[str, Pictures]:
    """The five requests and one without an image; every tiny checkpoint has the same preprocessor_config.json."""
    return {name: Pictures(paths, labs("tiny")) for name, paths in crops.items()}
