"""Which tensors a Qwen2.5-VL has, and the units they are moved in (ARCHITECTURE.md's table of units).

A unit is what is resident, streamed or absent as one. Its tensors stand at multiples of 64 bytes, its size is a
multiple of 512, so that units pack into an arena whose offsets are multiples of 512. The embedding table is no unit:
its rows are read from the file; where it is tied, its row tiles serve as lm_head.
"""

from __future__ import annotations

from functools import lru_cache

from planner.buffers import round_up
from planner.plan.shapes import ModelShape, TextShape, Unit, UnitTensor, VisionShape
from planner.plan.tiles import spans
from planner.plan.words import DTYPE_BYTES

TENSOR_ALIGNMENT = 64
UNIT_ALIGNMENT = 512

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

Local = tuple[tuple[str, tuple[int, ...]], ...]  # local name and shape, in the order in the unit


def patch_embed_tensors(vision: VisionShape) -> Local:
    patch = (vision.temporal_patch, vision.patch_px, vision.patch_px)
    return (("proj.weight", (vision.hidden, vision.in_channels, *patch)),)


def vision_attn_tensors(vision: VisionShape) -> Local:
    hidden = vision.hidden
    return (
        ("norm1.weight", (hidden,)),
        ("attn.qkv.weight", (3 * hidden, hidden)),
        ("attn.qkv.bias", (3 * hidden,)),
        ("attn.proj.weight", (hidden, hidden)),
        ("attn.proj.bias", (hidden,)),
    )


def vision_mlp_tensors(vision: VisionShape) -> Local:
    hidden, inner = vision.hidden, vision.intermediate
    return (
        ("norm2.weight", (hidden,)),
        ("mlp.gate_proj.weight", (inner, hidden)),
        ("mlp.gate_proj.bias", (inner,)),
        ("mlp.up_proj.weight", (inner, hidden)),
        ("mlp.up_proj.bias", (inner,)),
        ("mlp.down_proj.weight", (hidden, inner)),
        ("mlp.down_proj.bias", (hidden,)),
    )


def merger_tensors(vision: VisionShape) -> Local:
    merged = vision.hidden * vision.merge**2
    return (
        ("ln_q.weight", (vision.hidden,)),
        ("mlp.0.weight", (merged, merged)),
        ("mlp.0.bias", (merged,)),
        ("mlp.2.weight", (vision.out_hidden, merged)),
        ("mlp.2.bias", (vision.out_hidden,)),
    )


def self_attn_tensors(text: TextShape) -> Local:
    hidden, q, kv = text.hidden, text.heads * text.head_dim, text.kv_heads * text.head_dim
    return (
        ("input_layernorm.weight", (hidden,)),
        ("self_attn.q_proj.weight", (q, hidden)),
        ("self_attn.q_proj.bias", (q,)),
        ("self_attn.k_proj.weight", (kv, hidden)),
        ("self_attn.k_proj.bias", (kv,)),
        ("self_attn.v_proj.weight", (kv, hidden)),
        ("self_attn.v_proj.bias", (kv,)),
        ("self_attn.o_proj.weight", (hidden, q)),
    )


def text_mlp_tensors(text: TextShape) -> Local:
    hidden, inner = text.hidden, text.intermediate
    return (
        ("post_attention_layernorm.weight", (hidden,)),
        ("mlp.gate_proj.weight", (inner, hidden)),
        ("mlp.up_proj.weight", (inner, hidden)),
        ("mlp.down_proj.weight", (hidden, inner)),
    )


def norm_tensors(text: TextShape) -> Local:
    return (("weight", (text.hidden,)),)


def lm_head_name(text: TextShape) -> str:
    """The tensor whose rows make the logits."""
    return EMBEDDING if text.tied else LM_HEAD


@lru_cache(maxsize=16)
def block_tensors(vision: VisionShape, text: TextShape) -> tuple[tuple[str, str, Local], ...]:
    """(unit id, published prefix, tensors) of every unit but lm_head, in the order of a run."""
    attn, mlp = vision_attn_tensors(vision), vision_mlp_tensors(vision)
    rows = [("visual/patch_embed", "visual.patch_embed.", patch_embed_tensors(vision))]
    for i in range(vision.depth):
        rows.append((f"visual/blocks.{i}.attn", f"visual.blocks.{i}.", attn))
        rows.append((f"visual/blocks.{i}.mlp", f"visual.blocks.{i}.", mlp))
    rows.append(("visual/merger", "visual.merger.", merger_tensors(vision)))
    self_attn, text_mlp = self_attn_tensors(text), text_mlp_tensors(text)
    for i in range(text.layers):
        rows.append((f"text/layers.{i}.self_attn", f"model.layers.{i}.", self_attn))
        rows.append((f"text/layers.{i}.mlp", f"model.layers.{i}.", text_mlp))
    rows.append(("text/norm", "model.norm.", norm_tensors(text)))
    return tuple(rows)


def template(vision: VisionShape, text: TextShape) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every tensor a run needs; nothing else of a checkpoint is read."""
    shapes = {
        prefix + local: shape
        for _, prefix, tensors in block_tensors(vision, text)
        for local, shape in tensors
    }
    shapes[EMBEDDING] = (text.vocabulary, text.hidden)
    shapes[lm_head_name(text)] = (text.vocabulary, text.hidden)
    return shapes


def units(model: ModelShape, vocabulary_rows: int) -> tuple[Unit, ...]:
    """Every unit in the order of a run, lm_head in tiles of `vocabulary_rows` rows.

    `UnitTensor.shape` is that of the rows in the unit: `(row_stop - row_start, ...)`.
    """
    text = model.text
    name = lm_head_name(text)
    tiles = tuple(
        _unit(
            f"text/lm_head[{i}]",
            ((name, "weight", (stop - start, text.hidden), start),),
            model.dtype,
        )
        for i, (start, stop) in enumerate(spans(text.vocabulary, vocabulary_rows))
    )
    return _block_units(model.vision, text, model.dtype) + tiles


def unit_sizes(model: ModelShape, vocabulary_rows: int) -> dict[str, int]:
    """Unit id -> bytes, the same ids, order and sizes as `units`, without building any of them."""
    text = model.text
    sizes = dict(_block_sizes(model.vision, text, model.dtype))
    for i, (start, stop) in enumerate(spans(text.vocabulary, vocabulary_rows)):
        sizes[f"text/lm_head[{i}]"] = _size((("weight", (stop - start, text.hidden)),), model.dtype)
    return sizes


@lru_cache(maxsize=16)
def _block_units(vision: VisionShape, text: TextShape, dtype: str) -> tuple[Unit, ...]:
    return tuple(
        _unit(unit, tuple((prefix + local, local, shape, 0) for local, shape in tensors), dtype)
        for unit, prefix, tensors in block_tensors(vision, text)
    )


@lru_cache(maxsize=16)
def _block_sizes(vision: VisionShape, text: TextShape, dtype: str) -> dict[str, int]:
    by_tensors: dict[int, int] = {}  # every block of a kind shares one tuple of tensors
    sizes = {}
    for unit, _, tensors in block_tensors(vision, text):
        if id(tensors) not in by_tensors:
            by_tensors[id(tensors)] = _size(tensors, dtype)
        sizes[unit] = by_tensors[id(tensors)]
    return sizes


def _unit(
    unit: str, tensors: tuple[tuple[str, str, tuple[int, ...], int], ...], dtype: str
) -> Unit:
    """A unit of (name, local, shape, first row), tensors one behind another."""
    placed = []
    offset = 0
    for name, local, shape, row_start in tensors:
        size_bytes = _tensor_bytes(shape, dtype)
        placed.append(
            # model_construct: these values are ours, and validation would cost more than the search
            UnitTensor.model_construct(
                name=name,
                local=local,
                shape=shape,
                row_start=row_start,
                row_stop=row_start + shape[0],
                offset_bytes=offset,
                size_bytes=size_bytes,
            )
        )
        offset += round_up(size_bytes, TENSOR_ALIGNMENT)
    return Unit.model_construct(
        id=unit, tensors=tuple(placed), size_bytes=round_up(offset, UNIT_ALIGNMENT)
    )


def _size(tensors: Local, dtype: str) -> int:
    total = sum(round_up(_tensor_bytes(shape, dtype), TENSOR_ALIGNMENT) for _, shape in tensors)
    return round_up(total, UNIT_ALIGNMENT)


def _tensor_bytes(shape: tuple[int, ...], dtype: str) -> int:
    size_bytes = DTYPE_BYTES[dtype]
    for extent in shape:
        size_bytes *= extent
    return size_bytes
