"""Checkpoints made of nothing but headers: the data part of every file is a hole in a sparse file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from planner.checkpoint.config import normalise_config
from planner.checkpoint.headers import STORED_DTYPE_BYTES
from planner.checkpoint.template import template

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]

TINY_VISION = {
    "depth": 3,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_heads": 2,
    "in_chans": 3,
    "out_hidden_size": 64,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [1],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}
TINY_TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
}
TINY_ROOT = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "eos_token_id": 2,
    "image_token_id": 500,
    "video_token_id": 501,
    "vision_start_token_id": 502,
    "vision_end_token_id": 503,
}


def flat_config() -> dict[str, Any]:
    return {
        **TINY_ROOT,
        **TINY_TEXT,
        "tie_word_embeddings": False,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": dict(TINY_VISION),
    }


def nested_config() -> dict[str, Any]:
    text = {
        **TINY_TEXT,
        "model_type": "qwen2_5_vl_text",
        "tie_word_embeddings": False,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]},
    }
    # such saves repeat some text fields at the root
    return {**TINY_ROOT, "hidden_size": 64, "text_config": text, "vision_config": dict(TINY_VISION)}


def v5_config() -> dict[str, Any]:
    text = {
        **TINY_TEXT,
        "model_type": "qwen2_5_vl_text",
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {
            "rope_theta": 1000000.0,
            "rope_type": "default",
            "mrope_section": [2, 3, 3],
        },
    }
    vision = {
        **{k: v for k, v in TINY_VISION.items() if k not in ("in_chans", "spatial_patch_size")},
        "in_channels": 3,
        "model_type": "qwen2_5_vl_vision",
        "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
    }
    return {
        **TINY_ROOT,
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": vision,
    }


CONFIGS = {"flat": flat_config, "nested": nested_config, "v5": v5_config}


def header_of(tensors: Tensors) -> tuple[dict[str, Any], int]:
    """A header in the order given, and the bytes of data it promises."""
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * STORED_DTYPE_BYTES[dtype]
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    return header, offset


def write_file(path: Path, header: object, data_bytes: int) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + data_bytes)
    return path


def write_tensors(path: Path, tensors: Tensors) -> Path:
    return write_file(path, *header_of(tensors))


def tiny_tensors(config: dict[str, Any] | None = None, dtype: str = "BF16") -> dict[str, Any]:
    """Published names of the tiny model with a dtype and a shape each."""
    normal = normalise_config(config or flat_config(), Path("config.json"))
    return {name: (dtype, shape) for name, shape in template(normal.vision, normal.text).items()}


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint folder of headers alone and returns it."""

    def make(
        config: dict[str, Any] | None = None,
        tensors: Tensors | None = None,
        *,
        name: str = "tiny",
        **files: object,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config or flat_config()))
        for file, content in files.items():
            (folder / f"{file}.json").write_text(json.dumps(content))
        write_tensors(folder / "model.safetensors", tiny_tensors() if tensors is None else tensors)
        return folder

    return make


@pytest.fixture
def kit() -> Any:
    """The writers above; test modules cannot import a conftest under importmode importlib."""
    from types import SimpleNamespace

    return SimpleNamespace(
        configs=CONFIGS,
        header_of=header_of,
        write_file=write_file,
        write_tensors=write_tensors,
        tiny_tensors=tiny_tensors,
        flat_config=flat_config,
    )
