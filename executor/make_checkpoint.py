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
from typing import Any

import torch

from executor.random_files import SPECS, Spec, as_json, json_files
from planner.errors import InputError, RunFailed
from planner.units import format_gib

SHARD_BYTES = 5 * 10**9  # as transformers saves
PIECE_VALUES = 2**23  # random numbers made at once: 32 MiB of float32, 16 MiB as bfloat16
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
        for name, content in json_files(chosen, dtype_name).items():
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
        (directory / "model.safetensors.index.json").write_text(as_json(content), encoding="utf-8")


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
