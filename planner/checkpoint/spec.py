"""A model without its weights: shapes, tensor locations and settings of a checkpoint folder or of a built-in model.

`resolve_model` is what the command line calls. A checkpoint is its config.json and its safetensors headers; a built-in
model is one JSON file of `profiles/models`, and has shapes but no tensors. Where the config left a field out, tensor
shapes decide; where it holds one, every tensor must agree with it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path

from pydantic import ValidationError

from planner.checkpoint.config import (
    CONFIG_FILE,
    Config,
    check_config,
    normalise_config,
    normalise_generation,
    normalise_pixel_bounds,
    read_config,
    read_generation,
    read_pixel_bounds,
)
from planner.checkpoint.headers import CheckpointTensors, read_checkpoint_tensors
from planner.checkpoint.hub import cached_snapshot, download, is_hub_id
from planner.checkpoint.template import EMBEDDING, LM_HEAD, template, unit_sizes, units
from planner.errors import CheckpointError
from planner.plan.shapes import ModelShape, TensorLocation
from planner.plan.words import DTYPE_BYTES, DType, Frozen

__all__ = [
    "BUILTIN",
    "Checkpoint",
    "builtin",
    "download",
    "read_checkpoint",
    "read_config",
    "resolve_model",
    "unit_sizes",
    "units",
]

BUILTIN = ("3b", "7b", "32b", "72b")
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything a plan needs of a model. A built-in one has no directory, no tensors and no tokenizer file."""

    directory: Path | None
    shape: ModelShape
    tensors: dict[str, TensorLocation]
    tensor_shapes: dict[str, tuple[int, ...]]
    min_pixels: int
    max_pixels: int
    tokenizer_json: Path | None
    tokenizer_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors that a run needs, the embedding table included."""
        return DTYPE_BYTES[self.shape.dtype] * self.parameters

    @property
    def parameters(self) -> int:
        """Elements of all tensors that a run needs."""
        return sum(_elements(shape) for shape in self.tensor_shapes.values())


class BuiltinModel(Frozen):
    """One file of profiles/models: the published JSON files and where they were read."""

    name: str
    hub_id: str
    licence: str
    source: str
    verified: str
    dtype: DType
    tensors: int
    parameters: int
    weight_bytes: int
    tokenizer_bytes: int
    tokenizer_source: str
    config: dict[str, object]
    generation_config: dict[str, object]
    preprocessor_config: dict[str, object]


def resolve_model(text: str) -> Checkpoint:
    """The model that `text` names: `7b`, a checkpoint folder, or a hub id found in the local cache."""
    if text.strip().lower() in BUILTIN:
        return builtin(text.strip().lower())
    path = Path(text).expanduser()
    try:
        if text and path.is_dir():
            return read_checkpoint(path)
        is_file = bool(text) and path.exists()
    except (OSError, ValueError):
        is_file = False
    if is_hub_id(text) and not is_file:
        return read_checkpoint(cached_snapshot(text), name=text.partition("/")[2])
    found = "a file of that name" if is_file else f"{text!r}, which is none of these"
    raise CheckpointError(
        f"model: wanted {', '.join(BUILTIN)}, the folder of a checkpoint, or a hub id such as "
        f"Qwen/Qwen2.5-VL-3B-Instruct, found {found}"
    )


@lru_cache(maxsize=len(BUILTIN))
def builtin(name: str) -> Checkpoint:
    """The published model of that size in bfloat16, from profiles/models."""
    if name not in BUILTIN:
        raise CheckpointError(f"model: wanted one of {', '.join(BUILTIN)}, found {name!r}")
    model = builtin_model(name)
    where = Path(f"profiles/models/{name}.json")
    config = normalise_config(model.config, where)
    check_config(config, where)
    generation = normalise_generation(model.generation_config, where)
    shapes = template(config.vision, config.text)
    low, high = normalise_pixel_bounds(model.preprocessor_config, config.vision, where)
    return Checkpoint(
        directory=None,
        shape=_model_shape(
            model.name, config, model.dtype, shapes, generation.repetition_penalty, generation.stop
        ),
        tensors={},
        tensor_shapes=shapes,
        min_pixels=low,
        max_pixels=high,
        tokenizer_json=None,
        tokenizer_bytes=model.tokenizer_bytes,
    )


def builtin_model(name: str) -> BuiltinModel:
    """The file of a built-in model as it stands."""
    text = (resources.files("profiles") / "models" / f"{name}.json").read_text(encoding="utf-8")
    try:
        return BuiltinModel.model_validate_json(text)
    except ValidationError as error:
        raise AssertionError(f"profiles/models/{name}.json: {error}") from error


def read_checkpoint(directory: Path, *, name: str | None = None) -> Checkpoint:
    """The checkpoint in a folder, every needed tensor checked against its config; no tensor data is read."""
    where = directory / CONFIG_FILE
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: wanted the folder of a checkpoint, found no folder of that name"
        )
    read = read_config(directory)
    stored = read_checkpoint_tensors(directory)
    config = _trust_shapes(read, {name: tensor.shape for name, tensor in stored.tensors.items()})
    check_config(config, where)
    wanted = template(config.vision, config.text)
    tensors = _needed(directory, wanted, stored, config)
    dtype = _one_dtype(directory, tensors)
    generation = read_generation(directory)
    low, high = read_pixel_bounds(directory, config.vision)
    tokenizer = directory / TOKENIZER_FILE
    has_tokenizer = tokenizer.is_file()
    return Checkpoint(
        directory=directory,
        shape=_model_shape(
            name or directory.resolve().name,
            config,
            dtype,
            wanted,
            generation.repetition_penalty,
            generation.stop,
        ),
        tensors=tensors,
        tensor_shapes=wanted,
        min_pixels=low,
        max_pixels=high,
        tokenizer_json=tokenizer if has_tokenizer else None,
        tokenizer_bytes=tokenizer.stat().st_size if has_tokenizer else 0,
    )


def _trust_shapes(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> Config:
    """The config with each defaulted field that tensor shapes show taken from them."""
    shown: dict[str, int | bool] = {"text.tied": LM_HEAD not in shapes}
    head_dim = config.text.head_dim
    patch_embed = shapes.get("visual.patch_embed.proj.weight", ())
    if len(patch_embed) == 5:
        names = ("hidden", "in_channels", "temporal_patch", "patch_px")
        shown |= {f"vision.{name}": size for name, size in zip(names, patch_embed, strict=False)}
    for field, name, axis, divisor in (
        ("vision.intermediate", "visual.blocks.0.mlp.gate_proj.weight", 0, 1),
        ("vision.out_hidden", "visual.merger.mlp.2.weight", 0, 1),
        ("text.vocabulary", EMBEDDING, 0, 1),
        ("text.hidden", EMBEDDING, 1, 1),
        ("text.intermediate", "model.layers.0.mlp.gate_proj.weight", 0, 1),
        ("text.heads", "model.layers.0.self_attn.q_proj.weight", 0, head_dim),
        ("text.kv_heads", "model.layers.0.self_attn.k_proj.weight", 0, head_dim),
    ):
        shape = shapes.get(name, ())
        if len(shape) == 2 and shape[axis] // divisor:
            shown[field] = shape[axis] // divisor
    for field, prefix in (("vision.depth", "visual.blocks."), ("text.layers", "model.layers.")):
        if blocks := _blocks(shapes, prefix):
            shown[field] = len(blocks)
    fixes = {field: value for field, value in shown.items() if field in config.defaulted}
    vision = config.vision.model_copy(update=_part(fixes, "vision."))
    # blocks beyond the depth do not exist, in transformers as here
    full = tuple(block for block in vision.full_attention_blocks if block < vision.depth)
    return replace(
        config,
        vision=vision.model_copy(update={"full_attention_blocks": full}),
        text=config.text.model_copy(update=_part(fixes, "text.")),
    )


def _part(fixes: Mapping[str, int | bool], prefix: str) -> dict[str, int | bool]:
    return {
        name.removeprefix(prefix): value for name, value in fixes.items() if name.startswith(prefix)
    }


def _blocks(names: Iterable[str], prefix: str) -> set[str]:
    """The numbers of the blocks that have any tensor, as text."""
    pattern = re.compile(re.escape(prefix) + r"([0-9]{1,6})\.")
    return {match[1] for name in names if (match := pattern.match(name))}


def _needed(
    directory: Path,
    wanted: Mapping[str, tuple[int, ...]],
    stored: CheckpointTensors,
    config: Config,
) -> dict[str, TensorLocation]:
    """Locations of the wanted tensors; a missing one, or one of another shape or dtype, is a CheckpointError."""
    for name, shape in wanted.items():
        found = stored.tensors.get(name)
        if name in stored.other_dtypes:
            raise CheckpointError(
                f"{directory}: tensor {name}: wanted BF16, F16 or F32, found {stored.other_dtypes[name]}; "
                "convert the checkpoint to BF16"
            )
        if found is None:
            missing = sum(other not in stored.tensors for other in wanted)
            raise CheckpointError(
                f"{directory}: tensor {name}: wanted {list(shape)}, found none of that name "
                f"({missing} of {len(wanted)} tensors missing); fetch the checkpoint again, or merge the adapter into it"
            )
        if found.shape != shape:
            raise CheckpointError(
                f"{found.path}: tensor {name}: wanted {list(shape)} as {CONFIG_FILE} says, found {list(found.shape)}; "
                "the two files are not of one checkpoint"
            )
    for prefix, count in (
        ("visual.blocks.", config.vision.depth),
        ("model.layers.", config.text.layers),
    ):
        found_blocks = len(_blocks(stored.tensors, prefix))
        if found_blocks > count:
            raise CheckpointError(
                f"{directory}: wanted {count} blocks {prefix}N as {CONFIG_FILE} says, found {found_blocks}; "
                "the two files are not of one checkpoint"
            )
    return {name: stored.tensors[name] for name in wanted}


def _one_dtype(directory: Path, tensors: Mapping[str, TensorLocation]) -> DType:
    """The dtype all tensors share, which is the model's whatever config.json calls it."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dtype != first.dtype:
            raise CheckpointError(
                f"{directory}: tensor {name}: wanted {first.dtype} as {first_name} has, found {tensor.dtype}; "
                "convert the checkpoint to one dtype"
            )
    return first.dtype


def _model_shape(
    name: str,
    config: Config,
    dtype: DType,
    shapes: Mapping[str, tuple[int, ...]],
    penalty: float,
    stop: tuple[int, ...] | None,
) -> ModelShape:
    ids = config.token_ids if stop is None else config.token_ids.model_copy(update={"stop": stop})
    return ModelShape(
        name=name,
        dtype=dtype,
        vision=config.vision,
        text=config.text,
        token_ids=ids,
        repetition_penalty=penalty,
        fingerprint=_fingerprint(config, dtype, shapes),
    )


def _fingerprint(config: Config, dtype: DType, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """sha256 of what a plan depends on: normalised config, and name, shape and dtype of every needed tensor.

    Folder names, layouts of the files and generation settings do not enter, so that the plan made for the built-in
    model runs on the downloaded checkpoint.
    """
    content = {
        "vision": config.vision.model_dump(mode="json"),
        "text": config.text.model_dump(mode="json"),
        "token_ids": config.token_ids.model_dump(mode="json", exclude={"stop"}),
        "tensors": [[tensor, list(shape), dtype] for tensor, shape in sorted(shapes.items())],
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
