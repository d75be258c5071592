"""Weights, the JSON files beside them, and device profiles."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

from fuzz.mutate import as_json, spoil_bytes, spoil_value
from fuzz.target import Place, Target

ROOT = Path(__file__).parents[1]


def safetensors(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


HEADER = {
    "__metadata__": {"format": "pt"},
    "model.norm.weight": {"dtype": "BF16", "shape": [8], "data_offsets": [0, 16]},
    "visual.blocks.0.attn.qkv.weight": {"dtype": "F32", "shape": [2, 4], "data_offsets": [16, 48]},
    "lm_head.weight": {"dtype": "F16", "shape": [4, 2, 1], "data_offsets": [48, 64]},
    "other": {"dtype": "I64", "shape": [], "data_offsets": [64, 72]},
}


def header_target(place: Place) -> Target:
    from planner.checkpoint.headers import read_entries, read_header

    seed = safetensors(HEADER, bytes(72))

    def make(chance: Random) -> bytes:
        if chance.random() < 0.5:
            return spoil_bytes(seed, chance)
        header = spoil_value(json.loads(json.dumps(HEADER)), chance)
        text = as_json(header, chance)
        length = len(text) if chance.random() < 0.95 else chance.choice((0, 2**63, len(text) + 1))
        return struct.pack("<Q", length) + text + bytes(chance.choice((72, 72, 72, 71, 73, 0)))

    def read(data: bytes) -> None:
        path = place.file("model.safetensors", data)
        read_header(path)
        for entry in read_entries(path).values():
            assert 8 <= entry.start <= entry.stop <= len(data)

    return Target(make, read)


def index_target(place: Place) -> Target:
    from planner.checkpoint.headers import read_checkpoint_tensors

    index = {"metadata": {"total_size": 72}, "weight_map": dict.fromkeys(HEADER, "a.safetensors")}
    index["weight_map"].pop("__metadata__")
    place.file("a.safetensors", safetensors(HEADER, bytes(72)))
    seed = json.dumps(index).encode()

    def make(chance: Random) -> bytes:
        if chance.random() < 0.4:
            return spoil_bytes(seed, chance)
        return as_json(spoil_value(json.loads(seed), chance), chance)

    def read(data: bytes) -> None:
        place.file("model.safetensors.index.json", data)
        read_checkpoint_tensors(place.path)

    return Target(make, read)


def config_target(place: Place) -> Target:
    from planner.checkpoint.config import (
        normalise_config,
        normalise_generation,
        normalise_pixel_bounds,
    )
    from planner.checkpoint.headers import load_json

    flat = json.loads((ROOT / "tests/data/tiny_config.json").read_text())
    text_keys = [
        k for k in flat if k.startswith(("hidden", "num_", "rope", "rms", "vocab", "inter"))
    ]
    nested = {k: v for k, v in flat.items() if k not in text_keys}
    nested["text_config"] = {k: flat[k] for k in text_keys}
    others = [
        {"repetition_penalty": 1.05, "eos_token_id": [1, 2], "pad_token_id": 3, "temperature": 0.1},
        {
            **{"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2},
            **{"temporal_patch_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073]},
            **{"image_std": [0.26862954, 0.26130258, 0.27577711], "size": {"shortest_edge": 3136}},
        },
    ]
    seeds = [json.dumps(data).encode() for data in (flat, nested, *others)]
    name = place.path / "config.json"
    vision = normalise_config(flat, name).vision

    def make(chance: Random) -> bytes:
        seed = chance.choice(seeds)
        if chance.random() < 0.4:
            return spoil_bytes(seed, chance, seeds)
        return as_json(spoil_value(json.loads(seed), chance), chance)

    def read(data: bytes) -> None:
        from planner.errors import StowplanError

        value = load_json(data, name)
        failed = None
        for one in (
            lambda: normalise_config(value, name),
            lambda: normalise_generation(value, name),
            lambda: normalise_pixel_bounds(value, vision, name),
        ):
            try:
                one()
            except StowplanError as error:
                failed = error
        if failed is not None:
            raise failed

    return Target(make, read)


def profile_target(place: Place) -> Target:
    from planner.profile import load_profile

    seeds = [
        json.dumps(json.loads((ROOT / "profiles/devices" / name).read_text())).encode()
        for name in ("cpu.json", "rtx-5080-16gb.json")
    ]

    def make(chance: Random) -> bytes:
        seed = chance.choice(seeds)
        if chance.random() < 0.3:
            return spoil_bytes(seed, chance, seeds)
        return as_json(spoil_value(json.loads(seed), chance), chance)

    return Target(make, lambda data: load_profile(str(place.file("mine.json", data))))
