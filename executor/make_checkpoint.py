"""Checkpoints with random weights: the real shapes and file layout without the real model.

What such a checkpoint answers is noise by construction; memory, speed and the paths through the code are those of a
real one. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from executor.prompt import byte_alphabet
from planner.errors import InputError, RunFailed
from planner.units import format_gib

SHARD_BYTES = 5 * 10**9  # as transformers saves
PIECE_VALUES = 2**23  # random numbers made at once: 32 MiB of float32, 16 MiB as bfloat16
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Spec(NamedTuple):
    """One kind of checkpoint. Special tokens take the 22 ids from `first_special` on."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    mrope_section: tuple[int, int, int]
    vision_hidden: int
    vision_heads: int
    vision_depth: int
    vision_intermediate: int
    full_attention_blocks: tuple[int, ...]
    first_special: int
    dtype: str
    max_position_embeddings: int


# structure-complete and small: windowed and full-attention blocks, grouped queries, MLP widths that no power of two
# divides (as 3420), vocabulary rows beyond the tokenizer's
_TINY = Spec(
    hidden=64,
    layers=4,
    heads=4,
    kv_heads=2,
    intermediate=180,
    vocabulary=640,
    tied=False,
    mrope_section=(2, 3, 3),
    vision_hidden=64,
    vision_heads=4,
    vision_depth=4,
    vision_intermediate=92,
    full_attention_blocks=(1, 3),
    first_special=600,
    dtype="float32",
    max_position_embeddings=32768,
)
# Qwen2.5-VL-3B-Instruct and -7B-Instruct: their config.json on the Hugging Face hub
_3B = Spec(
    hidden=2048,
    layers=36,
    heads=16,
    kv_heads=2,
    intermediate=11008,
    vocabulary=151936,
    tied=True,
    mrope_section=(16, 24, 24),
    vision_hidden=1280,
    vision_heads=16,
    vision_depth=32,
    vision_intermediate=3420,
    full_attention_blocks=(7, 15, 23, 31),
    first_special=151643,
    dtype="bfloat16",
    max_position_embeddings=128000,
)
_7B = _3B._replace(
    hidden=3584,
    layers=28,
    heads=28,
    kv_heads=4,
    intermediate=18944,
    vocabulary=152064,
    tied=False,
)
# large enough for weights to matter beside the process itself, small enough to be made and run in seconds
_SMALL = _3B._replace(
    hidden=1024,
    layers=12,
    heads=8,
    intermediate=4096,
    vocabulary=4096,
    vision_hidden=640,
    vision_heads=8,
    vision_depth=16,
    vision_intermediate=1716,
    full_attention_blocks=(3, 7, 11, 15),
    first_special=4000,
)
# the same widths, a quarter as deep: its weights do not stay in a core's caches either
_MINI = _SMALL._replace(layers=4, vision_depth=4, full_attention_blocks=(1, 3))
SPECS = {
    "tiny": _TINY,
    "tiny-tied": _TINY._replace(tied=True),
    "mini": _MINI,
    "small": _SMALL,
    "3b": _3B,
    "7b": _7B,
}


def make_random_checkpoint(
    spec: str,
    directory: Path,
    *,
    seed: int = 0,
    dtype: str | None = None,
    tied: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Bytes of the weights written to `directory`, which appears whole or not at all.

    `spec`: `tiny` (0.6 million weights, separate lm_head, float32), `tiny-tied` (lm_head is the embedding), `mini`
    (0.2 GB, tied), `small` (0.5 GB, tied), `3b` (7.5 GB, tied) or `7b` (16.6 GB, separate lm_head), the last four in bfloat16, the last two
    with the published shapes; `:float32` and the
    like after it choose another dtype, and `dtype` and `tied` overrule both. The files are those of a published
    checkpoint: config.json, generation_config.json, preprocessor_config.json, tokenizer.json and safetensors, in shards
    beyond 5 GB. A tensor's values depend on seed, name, shape and dtype alone. Its tokenizer splits text into bytes and a
    few common words; the answer is noise. Weights are made and
    written in pieces of 48 MiB.
    """
    chosen, dtype_name = _parse_spec(spec, dtype=dtype, tied=tied)
    # os.path, not Path: a name that no file can have is no file
    if not os.path.isdir(directory.parent):
        raise InputError(
            f"{directory}: wanted a directory inside an existing one; make {directory.parent} first"
        )
    if os.path.exists(directory) and (not os.path.isdir(directory) or any(directory.iterdir())):
        raise InputError(
            f"{directory}: wanted a new or empty directory, found content; choose another"
        )
    tensors = tuple(_tensors(chosen))
    item_bytes = DTYPES[dtype_name].itemsize
    total_bytes = sum(math.prod(shape) for _, shape in tensors) * item_bytes
    free_bytes = shutil.disk_usage(directory.parent).free
    if free_bytes < total_bytes + 2**24:
        raise RunFailed(
            f"{directory}: wanted {format_gib(total_bytes)} of disk space, found {format_gib(free_bytes)} free; "
            "choose another disk or a smaller spec"
        )
    # known before it is made, so that an interrupt at any moment finds what to delete
    made = directory.with_name(f".{directory.name[:100]}.{secrets.token_hex(4)}.part")
    try:
        try:
            os.lstat(directory)  # the name may be too long for the file system
        except FileNotFoundError:
            pass
        made.mkdir(mode=0o700)
        for name, content in _json_files(chosen, dtype_name).items():
            (made / name).write_text(content, encoding="utf-8")
        _write_weights(made, tensors, dtype_name, seed, total_bytes, progress)
        made.chmod(0o755)
        os.replace(made, directory)
    except OSError as error:
        shutil.rmtree(made, ignore_errors=True)
        raise RunFailed(
            f"{directory}: cannot be written: {error.strerror or error}; nothing was left behind"
        ) from None
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return total_bytes


def _parse_spec(spec: str, *, dtype: str | None, tied: bool | None) -> tuple[Spec, str]:
    name, _, suffix = spec.partition(":")
    if name not in SPECS:
        raise InputError(f"wanted one of {', '.join(SPECS)}, found {name!r}")
    chosen = SPECS[name] if tied is None else SPECS[name]._replace(tied=tied)
    dtype_name = dtype or suffix or chosen.dtype
    if dtype_name not in DTYPES or (suffix and suffix not in DTYPES):
        raise InputError(
            f"{spec}: wanted a dtype of {', '.join(DTYPES)}, found {suffix or dtype_name!r}"
        )
    return chosen, dtype_name


# --- weights ------------------------------------------------------------------------------------------------------


def _tensors(spec: Spec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(published name, shape) of every tensor, in the order of the files."""
    d, i, e, f = spec.vision_hidden, spec.vision_intermediate, spec.hidden, spec.intermediate
    kv = spec.kv_heads * (e // spec.heads)
    yield "visual.patch_embed.proj.weight", (d, 3, 2, 14, 14)
    for n in range(spec.vision_depth):
        block = f"visual.blocks.{n}."
        yield block + "norm1.weight", (d,)
        yield block + "norm2.weight", (d,)
        for name, out, into in (
            ("attn.qkv", 3 * d, d),
            ("attn.proj", d, d),
            ("mlp.gate_proj", i, d),
            ("mlp.up_proj", i, d),
            ("mlp.down_proj", d, i),
        ):
            yield f"{block}{name}.weight", (out, into)
            yield f"{block}{name}.bias", (out,)
    yield "visual.merger.ln_q.weight", (d,)
    for name, out in (("0", 4 * d), ("2", e)):
        yield f"visual.merger.mlp.{name}.weight", (out, 4 * d)
        yield f"visual.merger.mlp.{name}.bias", (out,)
    yield "model.embed_tokens.weight", (spec.vocabulary, e)
    for n in range(spec.layers):
        layer = f"model.layers.{n}."
        yield layer + "input_layernorm.weight", (e,)
        yield layer + "post_attention_layernorm.weight", (e,)
        for name, out in (("q_proj", e), ("k_proj", kv), ("v_proj", kv)):
            yield f"{layer}self_attn.{name}.weight", (out, e)
            yield f"{layer}self_attn.{name}.bias", (out,)
        yield layer + "self_attn.o_proj.weight", (e, e)
        yield layer + "mlp.gate_proj.weight", (f, e)
        yield layer + "mlp.up_proj.weight", (f, e)
        yield layer + "mlp.down_proj.weight", (e, f)
    yield "model.norm.weight", (e,)
    if not spec.tied:
        yield "lm_head.weight", (spec.vocabulary, e)


def _mean_and_std(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Of a tensor's normal distribution: such that activations stay near 1 and the next token depends on the context.

    Products keep the size of their input (1 / sqrt(inputs)); what is added to the residual is smaller, the embedding
    smaller still, or a tied lm_head would answer every token with itself. Queries and keys are larger: attention that
    averages over thousands of keys would tell the tokens of no two prompts apart.
    """
    if len(shape) == 1:
        return (0.0, 0.02) if name.endswith(".bias") else (1.0, 0.1)
    gain = 1.0
    if name.endswith((".q_proj.weight", ".k_proj.weight")):
        gain = 2.5
    elif name.endswith((".o_proj.weight", ".down_proj.weight", "attn.proj.weight", "mlp.2.weight")):
        gain = 0.5
    elif name == "lm_head.weight":
        gain = 2.0
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))


def _pieces(name: str, shape: tuple[int, ...], dtype_name: str, seed: int) -> Iterator[memoryview]:
    """The tensor's bytes, a bounded piece at a time."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    mean, std = _mean_and_std(name, shape)
    values = math.prod(shape)
    piece = torch.empty(min(values, PIECE_VALUES), dtype=torch.float32)
    for start in range(0, values, PIECE_VALUES):
        part = piece[: min(PIECE_VALUES, values - start)].normal_(mean, std, generator=generator)
        yield part.to(DTYPES[dtype_name]).view(torch.uint8).numpy().data


def _write_weights(
    directory: Path,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    dtype_name: str,
    seed: int,
    total_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    item_bytes = DTYPES[dtype_name].itemsize
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in tensors:
        size = math.prod(shape) * item_bytes
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += size
    written = 0
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        index.update({name: file_name for name, _ in shard})
        with open(directory / file_name, "wb") as file:
            file.write(_safetensors_header(shard, dtype_name))
            for name, shape in shard:
                for piece in _pieces(name, shape, dtype_name, seed):
                    file.write(piece)
                    written += len(piece)
                    if progress is not None:
                        progress(written, total_bytes)
    if len(shards) > 1:
        content = {"metadata": {"total_size": total_bytes}, "weight_map": index}
        (directory / "model.safetensors.index.json").write_text(_json(content), encoding="utf-8")


def _safetensors_header(tensors: Sequence[tuple[str, tuple[int, ...]]], dtype_name: str) -> bytes:
    """Length and JSON that open a safetensors file, padded to 8 bytes so that the tensors are aligned."""
    stored = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype_name]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        end = offset + math.prod(shape) * DTYPES[dtype_name].itemsize
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


# --- configuration and tokenizer ----------------------------------------------------------------------------------

# in the order of their ids; the first 14 are control tokens, the others ordinary text that is kept whole
ADDED_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>"),
    *("</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
CONTROL_TOKENS = 14

# Qwen2.5's tokenizer.json
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = (
    "system You are a helpful assistant user the this image Describe What is in picture of and to on it with for"
).split()


def _json(content: object) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _json_files(spec: Spec, dtype_name: str) -> dict[str, str]:
    """The small files of a published checkpoint, by name."""
    ids = {token: spec.first_special + i for i, token in enumerate(ADDED_TOKENS)}
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "initializer_range": 0.02,
        "intermediate_size": spec.intermediate,
        "max_position_embeddings": spec.max_position_embeddings,
        "max_window_layers": spec.layers,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": spec.tied,
        "torch_dtype": dtype_name,
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": spec.vision_depth,
            "hidden_act": "silu",
            "hidden_size": spec.vision_hidden,
            "intermediate_size": spec.vision_intermediate,
            "num_heads": spec.vision_heads,
            "in_chans": 3,
            "out_hidden_size": spec.hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": list(spec.full_attention_blocks),
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": list(spec.mrope_section)},
        "vocab_size": spec.vocabulary,
    }
    generation = {
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "do_sample": True,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "repetition_penalty": 1.05,
        "temperature": 1e-06,
    }
    preprocessor = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    return {
        "config.json": _json(config),
        "generation_config.json": _json(generation),
        "preprocessor_config.json": _json(preprocessor),
        "tokenizer.json": json.dumps(_tokenizer(spec.first_special), ensure_ascii=False),
    }


def _tokenizer(first_special: int) -> dict[str, Any]:
    """tokenizer.json: 256 bytes, the beginnings of a few words, then made-up words up to the special tokens.

    No text is split into the made-up words (no merge leads to them); they give the noise of the answer a look.
    """
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    merges: list[str] = []
    for word in [*WORDS, *("Ġ" + word for word in WORDS)]:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
                vocabulary[word[:end]] = len(vocabulary)
    syllables = [consonant + vowel for consonant in "bdfghklmnprstvz" for vowel in "aeiou"]
    number = 0
    while len(vocabulary) < first_special:
        digits, rest = [], number
        for _ in range(3):
            rest, digit = divmod(rest, len(syllables))
            digits.append(syllables[digit])
        vocabulary.setdefault("Ġ" + "".join(digits), len(vocabulary))
        number += 1
    added = []
    for i, token in enumerate(ADDED_TOKENS):
        vocabulary[token] = first_special + i  # also in the vocabulary, so that ids are kept
        added.append(
            {
                "id": first_special + i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": i < CONTROL_TOKENS,
            }
        )
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": SPLIT},
                    "behavior": "Isolated",
                    "invert": False,
                },
                byte_level,
            ],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
