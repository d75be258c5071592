"""A checkpoint's JSON files in one normal form, whichever version of transformers saved them.

Three layouts of config.json exist: flat (all published checkpoints: text fields at the root), nested (`text_config`,
transformers 4.52 and later) and v5 (`rope_parameters` in place of `rope_theta` and `rope_scaling`). Saves leave out
fields that equal transformers' class defaults, which are not the published models' values: `Config.defaulted` names
such fields, so that tensor shapes can correct them. What would change the arithmetic is refused, never ignored.
Source: transformers 4.49 to 5.23, models/qwen2_5_vl/configuration_qwen2_5_vl.py and image_processing_base.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from planner.checkpoint.headers import load_json, read_small, show
from planner.errors import CheckpointError
from planner.plan.shapes import TextShape, TokenIds, VisionShape

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"

MODEL_TYPES = ("qwen2_5_vl",)
MIN_PIXELS = 3136  # class defaults of Qwen2VLImageProcessor
MAX_PIXELS = 1003520
_MAX_EXTENT = 2**31 - 1
_MAX_LAYERS = 4096

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class Config:
    """config.json in normal form; `defaulted` names the fields it did not hold (`vision.hidden`, `text.tied`)."""

    vision: VisionShape
    text: TextShape
    token_ids: TokenIds
    defaulted: frozenset[str]


@dataclass(frozen=True, slots=True)
class Generation:
    """What of generation_config.json a run needs; `stop` is None where the file does not say."""

    repetition_penalty: float
    stop: tuple[int, ...] | None


def read_config(directory: Path) -> Config:
    """config.json of a checkpoint folder in normal form."""
    path = directory / CONFIG_FILE
    return normalise_config(load_json(read_small(path), path), path)


def read_generation(directory: Path) -> Generation:
    """generation_config.json of a checkpoint folder; without the file no penalty and no stop ids."""
    path = directory / GENERATION_FILE
    if not path.exists():
        return Generation(1.0, None)
    return normalise_generation(load_json(read_small(path), path), path)


def read_pixel_bounds(directory: Path, vision: VisionShape) -> tuple[int, int]:
    """(min_pixels, max_pixels) of a checkpoint folder's image processor, or its class defaults without a file."""
    path = directory / PROCESSOR_FILE  # newer saves nest it here, and transformers looks here first
    if path.exists():
        nested = load_json(read_small(path), path).get("image_processor")
        if nested is not None:
            return normalise_pixel_bounds(nested, vision, path)
    path = directory / PREPROCESSOR_FILE
    data = load_json(read_small(path), path) if path.exists() else {}
    return normalise_pixel_bounds(data, vision, path)


class _Fields:
    """Typed look-ups in the first of several JSON objects that has a key; notes what was defaulted."""

    def __init__(
        self, path: Path, places: Sequence[Mapping[str, object]], defaulted: set[str]
    ) -> None:
        self.path, self.places, self.defaulted = path, places, defaulted

    def value(self, keys: Sequence[str]) -> object:
        for place in self.places:
            for key in keys:
                if place.get(key) is not None:
                    return place[key]
        return None

    def size(
        self, field: str, keys: Sequence[str], default: int, *, at_most: int = _MAX_EXTENT
    ) -> int:
        found = self.value(keys)
        if isinstance(found, list) and found and all(v == found[0] for v in found):
            found = found[0]  # v5 may write patch sizes as [14, 14]
        if found is None:
            self.defaulted.add(field)
            return default
        return _size(found, self.path, keys[0], at_most=at_most)

    def flag(self, field: str, keys: Sequence[str], default: bool) -> bool:
        found = self.value(keys)
        if found is None:
            self.defaulted.add(field)
            return default
        if not isinstance(found, bool):
            raise _wrong(self.path, keys[0], "true or false", found)
        return found

    def real(self, keys: Sequence[str], default: float) -> float:
        found = self.value(keys)
        return default if found is None else _real(found, self.path, keys[0])

    def want(self, keys: Sequence[str], accepted: Sequence[object]) -> None:
        """Refuse a value that this project does not compute; an absent one is the first of `accepted`."""
        found = self.value(keys)
        if found is not None and found not in accepted:
            wanted = " or ".join(str(value) for value in accepted)
            raise CheckpointError(
                f"{self.path}: {keys[0]}: wanted {wanted}, found {show(found)}, which is not supported; "
                "use a published Qwen2.5-VL checkpoint or a fine-tune of one"
            )


def normalise_config(data: Mapping[str, object], path: Path) -> Config:
    """The fields of a config.json of any of the three layouts; CheckpointError for another architecture."""
    model_type = data.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"{path}: wanted model_type {MODEL_TYPES[0]!r}, found {show(model_type)}: only Qwen2.5-VL is supported"
        )
    if data.get("quantization_config") is not None:
        raise CheckpointError(
            f"{path}: wanted weights in BF16, F16 or F32, found quantization_config: quantised checkpoints are not "
            "supported; use the repository without -AWQ, -GPTQ or similar in its name"
        )
    nested = _mapping(data.get("text_config"), path, "text_config")
    defaulted: set[str] = set()
    text = _text(_Fields(path, (nested, data), defaulted), nested, data)
    vision_data = _mapping(data.get("vision_config"), path, "vision_config")
    vision = _vision(_Fields(path, (vision_data,), defaulted))
    ids = _Fields(path, (data, nested), set())
    stop = ids.value(("eos_token_id",))
    token_ids = TokenIds(
        image=ids.size("", ("image_token_id",), 151655),
        video=ids.size("", ("video_token_id",), 151656),
        vision_start=ids.size("", ("vision_start_token_id",), 151652),
        vision_end=ids.size("", ("vision_end_token_id",), 151653),
        stop=() if stop is None else _token_list(stop, path),
    )
    return Config(vision, text, token_ids, frozenset(defaulted))


def _text(fields: _Fields, nested: Mapping[str, object], root: Mapping[str, object]) -> TextShape:
    path = fields.path
    fields.want(("hidden_act",), ("silu",))
    fields.want(("use_sliding_window",), (False,))
    layer_types = fields.value(("layer_types",))
    if layer_types is not None and set(map(str, _list(layer_types, path, "layer_types"))) != {
        "full_attention"
    }:
        raise _wrong(path, "layer_types", "full_attention in every layer", layer_types)
    rope = _mapping(fields.value(("rope_parameters", "rope_scaling")), path, "rope_scaling")
    rope_fields = _Fields(path, (rope,), set())
    for key in ("type", "rope_type"):
        rope_fields.want((key,), ("mrope", "default"))
    section = rope.get("mrope_section")
    if section is None:
        raise _wrong(path, "rope_scaling", "mrope_section with three sizes", dict(rope) or None)
    parts = [_size(v, path, "mrope_section") for v in _list(section, path, "mrope_section")]
    if len(parts) != 3:
        raise _wrong(path, "mrope_section", "three sizes", section)
    heads = fields.size("text.heads", ("num_attention_heads",), 64)
    hidden = fields.size("text.hidden", ("hidden_size",), 8192)
    # an explicit null means as many as heads; an absent key the class default
    null_kv = any("num_key_value_heads" in place for place in fields.places)
    return TextShape(
        layers=fields.size("text.layers", ("num_hidden_layers",), 80, at_most=_MAX_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=fields.size("text.kv_heads", ("num_key_value_heads",), heads if null_kv else 8),
        head_dim=2 * sum(parts),
        intermediate=fields.size("text.intermediate", ("intermediate_size",), 29568),
        vocabulary=fields.size("text.vocabulary", ("vocab_size",), 152064),
        rope_theta=_Fields(path, (rope, *fields.places), set()).real(("rope_theta",), 1e6),
        mrope_section=(parts[0], parts[1], parts[2]),
        rms_norm_eps=fields.real(("rms_norm_eps",), 1e-5),
        tied=_tied(fields, nested, root),
    )


def _tied(fields: _Fields, nested: Mapping[str, object], root: Mapping[str, object]) -> bool:
    """True where either place says so, as transformers 5 reads it."""
    places = [_Fields(fields.path, (place,), set()) for place in (root, nested)]
    found = [place.flag("", ("tie_word_embeddings",), False) for place in places]
    if all(place.get("tie_word_embeddings") is None for place in (root, nested)):
        fields.defaulted.add("text.tied")
    return any(found)


def _vision(fields: _Fields) -> VisionShape:
    fields.want(("hidden_act",), ("silu",))
    depth = fields.size("vision.depth", ("depth", "num_hidden_layers"), 32, at_most=_MAX_LAYERS)
    full = fields.value(("fullatt_block_indexes",))
    if full is None:
        blocks = [7, 15, 23, 31]
    else:
        blocks = [_count(v, fields.path) for v in _list(full, fields.path, "fullatt_block_indexes")]
    return VisionShape(
        depth=depth,
        hidden=fields.size("vision.hidden", ("hidden_size",), 3584),
        heads=fields.size("vision.heads", ("num_heads", "num_attention_heads"), 16),
        intermediate=fields.size("vision.intermediate", ("intermediate_size",), 3420),
        out_hidden=fields.size("vision.out_hidden", ("out_hidden_size",), 3584),
        in_channels=fields.size("vision.in_channels", ("in_channels", "in_chans"), 3),
        patch_px=fields.size("vision.patch_px", ("patch_size",), 14),
        temporal_patch=fields.size("vision.temporal_patch", ("temporal_patch_size",), 2),
        merge=fields.size("vision.merge", ("spatial_merge_size",), 2),
        window_px=fields.size("vision.window_px", ("window_size",), 112),
        full_attention_blocks=tuple(sorted(set(blocks))),
    )


def check_config(config: Config, path: Path) -> None:
    """Refuse shapes that do not divide, or that images are not cut for."""
    vision, text = config.vision, config.text
    if vision.hidden % vision.heads or vision.head_dim % 4:
        raise _wrong(
            path,
            "vision num_heads",
            f"heads of a multiple of 4 that divide {vision.hidden}",
            vision.heads,
        )
    if vision.in_channels != 3:
        raise _wrong(path, "vision in_channels", "3", vision.in_channels)
    if vision.merge != 2:
        raise _wrong(path, "vision spatial_merge_size", "2", vision.merge)
    if vision.window_px % (vision.patch_px * vision.merge):
        wanted = f"a multiple of {vision.patch_px * vision.merge}"
        raise _wrong(path, "vision window_size", wanted, vision.window_px)
    if vision.out_hidden != text.hidden:
        raise _wrong(
            path,
            "vision out_hidden_size",
            f"the text model's hidden_size {text.hidden}",
            vision.out_hidden,
        )
    if text.heads * text.head_dim != text.hidden:
        wanted = f"three sizes that add up to half of {text.hidden}/{text.heads}"
        raise _wrong(path, "mrope_section", wanted, list(text.mrope_section))
    if text.heads % text.kv_heads:
        raise _wrong(path, "num_key_value_heads", f"a divisor of {text.heads}", text.kv_heads)


def normalise_generation(data: Mapping[str, object], path: Path) -> Generation:
    """Penalty and stop ids of a generation_config.json."""
    penalty, stop = data.get("repetition_penalty"), data.get("eos_token_id")
    return Generation(
        1.0 if penalty is None else _real(penalty, path, "repetition_penalty"),
        None if stop is None else _token_list(stop, path),
    )


def normalise_pixel_bounds(data: object, vision: VisionShape, path: Path) -> tuple[int, int]:
    """(min_pixels, max_pixels) of an image processor's settings; others than Qwen2.5-VL's own are refused."""
    mapping = _mapping(data, path, "image_processor")
    size = _mapping(mapping.get("size"), path, "size")
    fields = _Fields(path, (mapping,), set())
    fields.want(("patch_size",), (vision.patch_px,))
    fields.want(("temporal_patch_size",), (vision.temporal_patch,))
    fields.want(("merge_size",), (vision.merge,))
    fields.want(("resample",), (3,))
    for switch in ("do_resize", "do_rescale", "do_normalize"):
        fields.want((switch,), (True,))
    for key, wanted in (("image_mean", _CLIP_MEAN), ("image_std", _CLIP_STD)):
        found = mapping.get(key)
        values = (
            [_real(v, path, key) for v in _list(found, path, key)] if found is not None else wanted
        )
        if len(values) != 3 or any(
            not math.isclose(a, b, rel_tol=1e-6) for a, b in zip(values, wanted, strict=True)
        ):
            raise _wrong(path, key, str(list(wanted)), found)
    bounds = []
    for key, edge, default in (
        ("min_pixels", "shortest_edge", MIN_PIXELS),
        ("max_pixels", "longest_edge", MAX_PIXELS),
    ):
        found = mapping.get(key)
        found = size.get(edge) if found is None else found
        bounds.append(default if found is None else _size(found, path, key))
    if bounds[0] > bounds[1]:
        raise _wrong(path, "min_pixels", f"at most max_pixels, {bounds[1]}", bounds[0])
    return bounds[0], bounds[1]


def _mapping(value: object, path: Path, key: str) -> Mapping[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(path, key, "a JSON object", value)
    return value


def _list(value: object, path: Path, key: str) -> list[object]:
    if not isinstance(value, list):
        raise _wrong(path, key, "a list", value)
    return value


def _size(value: object, path: Path, key: str, *, at_most: int = _MAX_EXTENT) -> int:
    if type(value) is not int or not 0 < value <= at_most:
        raise _wrong(path, key, f"a whole number from 1 to {at_most}", value)
    return value


def _count(value: object, path: Path) -> int:
    if type(value) is not int or not 0 <= value < _MAX_LAYERS:
        raise _wrong(
            path, "fullatt_block_indexes", f"whole numbers from 0 to {_MAX_LAYERS - 1}", value
        )
    return value


def _real(value: object, path: Path, key: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
        raise _wrong(path, key, "a number above zero", value)
    return float(value)


def _token_list(value: object, path: Path) -> tuple[int, ...]:
    """One token id or a list of them, in the file's order."""
    values = value if isinstance(value, list) else [value]
    if not all(type(v) is int and 0 <= v <= _MAX_EXTENT for v in values):
        raise _wrong(path, "eos_token_id", "a token id or a list of them", value)
    return tuple(values)


def _wrong(path: Path, key: str, wanted: str, found: object) -> CheckpointError:
    return CheckpointError(
        f"{path}: {key}: wanted {wanted}, found {show(found)}; fetch the file again or correct it"
    )
