"""Memory that kernels take outside the arena, and the products a step runs: formulas that mirror executor/vision.py and text.py.

`tile_calls` lists, for each distinct tile of a step, the matrix products and attention calls in order. From it follow
`outside` (the allocations of a step, for the allocator's simulation), `peak_bytes` (their largest simultaneous
sum) and `gemm_shapes` (for code that a library keeps per shape). Norms, rotary embeddings, activations and copies take
nothing: they write into views.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from math import ceil
from typing import Literal, NamedTuple

from planner.gemm_scratch import float16_scratch_bytes, scratch_bytes
from planner.plan import Kept
from planner.plan.program import Outside
from planner.plan.shapes import Image, ModelShape, WindowRun, Workload
from planner.plan.tiles import Tiles, window_tiles
from planner.plan.words import DTYPE_BYTES, Kernel, Kind

WINDOWS_PER_CALL = 16  # as executor/vision.py
EMBEDDING_ROWS = 256  # as executor/weights.py: rows of the embedding table read at once
KEY_BLOCK = (
    512  # keys per block of the CPU's kernel; aten/src/ATen/native/cpu/FlashAttentionKernel.cpp
)

DeviceKind = Literal["cpu", "cuda"]


class Gemm(NamedTuple):
    """A product (rows, inputs) x (inputs, outputs); one row is a matrix-vector product."""

    rows: int
    inputs: int
    outputs: int


class Attention(NamedTuple):
    """One attention call. `held`: its output and log-sum-exp stay while the next call runs (to be merged with it)."""

    batch: int
    heads: int
    kv_heads: int
    rows: int
    keys: int
    head_dim: int
    causal: bool
    held: bool = False


class Machine(NamedTuple):
    """What the sizes depend on besides shapes. `sm_count` None: split-KV of the flash kernel is left out."""

    kind: DeviceKind = "cpu"
    kernel: Kernel = "cpu_flash"
    threads: int = 1
    amx: bool = False
    sm_count: int | None = None


class Piece(NamedTuple):
    """One block that a call takes."""

    name: str
    size_bytes: int
    declared: bool = False


Calls = tuple[Gemm | Attention, ...]
Taken = tuple[
    tuple[Piece, int], ...
]  # blocks, and how many had been taken when each was given back


def outside(
    kind: Kind,
    shape: ModelShape,
    tiles: Tiles,
    images: Sequence[Image],
    prompt_rows: int,
    context_tokens: int,
    machine: Machine,
    *,
    decode: bool = False,
) -> tuple[Outside, ...]:
    """Allocations of a step in the order in which it makes them, every distinct sequence of them once.

    A sequence begins and ends with nothing held: one call, or two whose results are merged. `images`: those of a
    vision step. In decode (one row) the keys are `context_tokens`.
    """
    if kind == "norm":
        # the row that is normalised is upcast outside the arena, whose `hidden` holds one row alone
        return (Outside(name="norm32", size_bytes=4 * shape.text.hidden, birth=0, death=1),)
    if kind == "embed_tokens" and machine.kind == "cpu" and shape.residual_dtype != shape.dtype:
        # rows as they are stored, before they are widened into the residual stream
        rows = min(EMBEDDING_ROWS, 1 if decode else prompt_rows)
        size = rows * shape.text.hidden * DTYPE_BYTES[shape.stored_dtype]
        return (Outside(name="embedding_rows", size_bytes=size, birth=0, death=1),)
    distinct: dict[Taken, None] = {}
    for calls in tile_calls(
        kind, shape, tiles, images, prompt_rows, context_tokens, machine.kernel, decode=decode
    ):
        distinct.update(_sequences(calls, shape.dtype, machine))
    return tuple(_numbered(distinct))


def kept(model: ModelShape, workload: Workload, workspaces: Sequence[int]) -> tuple[Kept, ...]:
    """What a card holds outside the arena throughout, in the order in which executor/prepare.py and cuda.py take it.

    Positions (int64): row and column of every patch, the order of merge units, three axes of every token; inverse
    frequencies (float32, half a head). `workspaces`: cuBLAS's and cuBLASLt's, taken by the first products.
    """
    found = []
    for number, image in enumerate(workload.images):
        found += [(f"positions[{number}].{axis}", 8 * image.patches) for axis in ("rows", "cols")]
    found += [(f"unit_order[{i}]", 8 * image.tokens) for i, image in enumerate(workload.images)]
    tokens = workload.prompt_tokens + max(0, workload.max_new_tokens - 1)
    found += [
        ("vision_frequencies", 4 * (model.vision.head_dim // 2)),
        ("positions", 8 * 3 * tokens),
        ("text_frequencies", 4 * (model.text.head_dim // 2)),
    ]
    names = ("cublas_workspace", "cublaslt_workspace")
    return (
        *(Kept(name=name, size_bytes=size) for name, size in found),
        *(
            Kept(name=name, size_bytes=size, declared=True)
            for name, size in zip(names, workspaces, strict=True)
            if size
        ),
    )


def peak_bytes(allocations: Iterable[Outside]) -> int:
    """Largest sum of sizes alive at once."""
    return _most((a.birth, a.death, a.size_bytes) for a in allocations)


def doubled_bytes(allocations: Iterable[Outside]) -> int:
    """The same with declared ones of twice their size."""
    return _most((a.birth, a.death, a.size_bytes * (1 + a.declared)) for a in allocations)


def _most(spans: Iterable[tuple[int, int, int]]) -> int:
    alive: dict[int, int] = {}
    for birth, death, size in spans:
        for index in range(birth, death):
            alive[index] = alive.get(index, 0) + size
    return max(alive.values(), default=0)


def gemm_shapes(
    kind: Kind,
    shape: ModelShape,
    tiles: Tiles,
    images: Sequence[Image],
    prompt_rows: int,
    *,
    decode: bool = False,
) -> frozenset[tuple[int, int, int]]:
    """Every distinct (rows, inputs, outputs) that a step of this kind multiplies; rows 1 is matrix times vector."""
    found: set[tuple[int, int, int]] = set()
    for calls in tile_calls(kind, shape, tiles, images, prompt_rows, prompt_rows, decode=decode):
        found.update(call for call in calls if isinstance(call, Gemm))
    return frozenset(found)


def tile_calls(
    kind: Kind,
    shape: ModelShape,
    tiles: Tiles,
    images: Sequence[Image],
    prompt_rows: int,
    context_tokens: int,
    kernel: Kernel = "cpu_flash",
    *,
    decode: bool = False,
) -> list[Calls]:
    """Products and attention calls of each distinct tile of a step, in order."""
    vision, text = shape.vision, shape.text
    width, inner = vision.hidden, vision.intermediate
    heads, size = vision.heads, vision.head_dim
    if kind == "patch_embed":
        rows = [r for image in images for r in _tile_rows(image.patches, tiles.patch_rows)]
        return [(Gemm(r, vision.patch_values, width),) for r in dict.fromkeys(rows)]
    if kind == "window_attn":
        groups_of = [tuple((w.count, w.rows) for w in image.windows) for image in images]
        distinct = [t for groups in groups_of for t in _window_tiles(groups, tiles.window_rows)]
        return [
            (
                Gemm(r, width, 3 * width),
                *(Attention(n, heads, heads, s, s, size, False) for n, s in batches),
                Gemm(r, width, width),
            )
            for r, batches in dict.fromkeys(distinct)
        ]
    if kind == "full_attn":
        full: list[Calls] = []
        parts = _tile_rows(heads, tiles.query_heads)
        for patches in dict.fromkeys(image.patches for image in images):
            for r in _tile_rows(patches, tiles.query_rows):
                project = Gemm(r, width, width)
                attend = (Attention(1, h, h, r, patches, size, False) for h in parts)
                full += [(Gemm(r, width, 2 * width),), (project, *attend, project)]
        return full
    if kind == "vision_mlp":
        mlp_rows = _tile_rows(sum(image.patches for image in images), tiles.vision_mlp_rows)
        up = [Gemm(r, width, inner) for r in mlp_rows]
        return [(g, g, Gemm(g.rows, inner, width)) for g in up]
    if kind == "merger":
        wide = vision.merge**2 * width
        rows = [r for image in images for r in _tile_rows(image.tokens, tiles.merger_rows)]
        found = [(Gemm(r, wide, wide), Gemm(r, wide, vision.out_hidden)) for r in rows]
        return list(dict.fromkeys(found))
    if kind == "self_attn":
        rows_all, base = (1, context_tokens - 1) if decode else (prompt_rows, 0)
        return _prompt_tiles(shape, tiles, rows_all, base, kernel)
    if kind == "text_mlp":
        mlp_rows = _tile_rows(1 if decode else prompt_rows, tiles.prompt_mlp_rows)
        up = [Gemm(r, text.hidden, text.intermediate) for r in mlp_rows]
        return [(g, g, Gemm(g.rows, text.intermediate, text.hidden)) for g in up]
    if kind == "lm_head":
        parts = _tile_rows(text.vocabulary, tiles.vocabulary_rows)
        return [(Gemm(1, text.hidden, part),) for part in parts]
    return []


def _prompt_tiles(
    shape: ModelShape, tiles: Tiles, rows: int, base: int, kernel: Kernel
) -> list[Calls]:
    """The first tile, which has no past in prefill, and of each row count the one with the longest past, in order."""
    text = shape.text
    tile = min(tiles.prompt_rows, rows)
    last = (rows - 1) // tile * tile
    chosen = [(tile, 0)]
    if last:
        chosen += [(tile, last - tile), (rows - last, last)]
    shared, size = text.heads // text.kv_heads, text.head_dim
    query, kv = text.heads * size, text.kv_heads * size
    projections = (Gemm(0, text.hidden, kv), Gemm(0, text.hidden, kv), Gemm(0, text.hidden, query))
    found = []
    for r, start in dict.fromkeys(chosen):
        calls: list[Gemm | Attention] = [g._replace(rows=r) for g in projections]
        past = base + start
        for groups in _tile_rows(text.kv_heads, tiles.prompt_heads):
            if r == 1:
                calls.append(Attention(1, groups, groups, shared, past + 1, size, False))
                continue
            batch, heads = (groups, shared) if kernel == "efficient" else (1, groups * shared)
            kv_heads = heads if kernel == "efficient" else groups
            if past:
                calls.append(Attention(batch, heads, kv_heads, r, past, size, False, held=True))
            calls.append(Attention(batch, heads, kv_heads, r, r, size, True))
        calls.append(Gemm(r, query, text.hidden))
        found.append(tuple(calls))
    return found


def _tile_rows(rows: int, tile: int) -> tuple[int, ...]:
    """Distinct row counts of tiles over `rows` rows."""
    if rows <= tile:
        return (rows,)
    rest = rows % tile
    return (tile, rest) if rest else (tile,)


@lru_cache(maxsize=1024)
def _window_tiles(
    windows: tuple[tuple[int, int], ...], tile_rows: int
) -> tuple[tuple[int, tuple[tuple[int, int], ...]], ...]:
    """Distinct (rows, attention calls as (windows, rows of each)) of the tiles of one image, in order."""
    found: dict[tuple[int, tuple[tuple[int, int], ...]], None] = {}
    runs = tuple(WindowRun(count=count, rows=rows) for count, rows in windows)
    for tile in window_tiles(runs, tile_rows):
        batches: dict[tuple[int, int], None] = {}
        for count, size in tile.runs:
            for n in _tile_rows(count, WINDOWS_PER_CALL):
                batches[n, size] = None
        found[tile.stop - tile.start, tuple(batches)] = None
    return tuple(found)


@lru_cache(maxsize=4096)
def _sequences(calls: Calls, dtype: str, machine: Machine) -> dict[Taken, None]:
    """The distinct sequences of allocations that the calls of one tile make, in order.

    What a call returns is held to its end, or through the call it is merged with; everything else ends with the call.
    """
    found: dict[Taken, None] = {}
    blocks: list[
        tuple[Piece, bool]
    ] = []  # of the calls since nothing was held; whether a call returns it
    ends: list[int] = []  # blocks taken when each block's call ended
    for call in calls:
        if isinstance(call, Gemm):
            pieces, held = gemm_pieces(call, dtype, machine), False
        else:
            pieces, held = attention_pieces(call, dtype, machine), call.held
        blocks += [(piece, piece.name in ("output", "logsumexp")) for piece in pieces]
        ends += [len(blocks)] * len(pieces)
        if held or not blocks:
            continue
        last = len(blocks)
        found[
            tuple(
                (piece, last if returned else end)
                for (piece, returned), end in zip(blocks, ends, strict=True)
            )
        ] = None
        blocks, ends = [], []
    return found


def _numbered(sequences: Iterable[Taken]) -> Iterator[Outside]:
    """The blocks of sequences that follow one another."""
    start = 0
    for sequence in sequences:
        for index, (piece, end) in enumerate(sequence):
            yield Outside.model_construct(
                name=piece.name,
                size_bytes=piece.size_bytes,
                birth=start + index,
                death=start + end,
                declared=piece.declared,
            )
        start += len(sequence)


def gemm_pieces(call: Gemm, dtype: str, machine: Machine) -> list[Piece]:
    """Scratch of one product: on the CPU none in float32, planner.gemm_scratch's in 16 bits.

    On CUDA cuBLAS's workspaces are taken once and kept; they are the allocator's business, not a step's.
    """
    if machine.kind == "cuda" or dtype == "float32":
        return []
    if dtype == "float16":
        size = float16_scratch_bytes(call.rows, threads=machine.threads)
    else:
        size = scratch_bytes(*call, threads=machine.threads, amx=machine.amx)
    return [Piece("gemm_scratch", size)]


def attention_pieces(call: Attention, dtype: str, machine: Machine) -> list[Piece]:
    """What one attention call takes, in the order in which it takes it."""
    if machine.kernel == "cpu_flash":
        return _cpu_flash(call, dtype, machine)
    if machine.kernel == "flash":
        return _cuda_flash(call, dtype, machine)
    return _cuda_efficient(call, dtype)


def _cpu_flash(call: Attention, dtype: str, machine: Machine) -> list[Piece]:
    """Output, log-sum-exp, per-thread blocks, and with AMX the packed K and V.

    B, H, G, T, S, d batch, heads, key heads, rows, keys, head size; e bytes of the dtype; q rows of a query block (256
    from 768 rows on, 64 from 192 on, else 32; at most T), k = min(512, S) keys of a key block.
    - output B·H·T·d·e; log-sum-exp 4·B·H·T
    - per thread, float32: scores q·k, maximum q, sum q, accumulator q·d; in 16 bits also the scores rounded, q·k·e
    - bfloat16 on AMX: the tile unit multiplies pairs of rows laid side by side, so K (transposed) and V of the *whole
      call* are laid out anew: B·G·S·d·e each, V's blocks padded to even length, plus one block k·d·e per thread to
      transpose in. Only if T and S are at least 64 and each packed element is used 4 times per thread.
    Source: aten/src/ATen/native/cpu/FlashAttentionKernel.cpp; equal to torch 2.13's `[memory]` events to the byte.
    """
    batch, heads, groups, rows, keys, size, causal, _ = call
    e = DTYPE_BYTES[dtype]
    wide = 256 if rows >= 768 else 64 if rows >= 192 else 32
    q, k = min(wide, rows), min(KEY_BLOCK, keys)
    pack = machine.amx and dtype == "bfloat16" and rows >= 64 and keys >= 64
    if pack:
        blocks = (batch * heads * ceil(rows / q) + machine.threads - 1) // machine.threads
        work = blocks * q * (min(rows, keys) if causal else keys) * size
        pack = work >= 4 * batch * groups * keys * size
    found = [
        Piece("output", batch * heads * rows * size * e),
        Piece("logsumexp", 4 * batch * heads * rows),
        Piece("scores", 4 * machine.threads * q * (k + 2 + size)),
    ]
    if e == 2:
        even = k + k % 2 if pack else k
        found.append(Piece("scores_rounded", machine.threads * q * even * e))
    if pack:
        rest = (keys - 1) % k + 1
        padded = (keys - 1) // k * (k + k % 2) + rest + rest % 2
        found += [
            Piece("packed_k", batch * groups * keys * size * e),
            Piece("packed_v", batch * groups * padded * size * e),
            Piece("transposed", machine.threads * k * size * e),
        ]
    return found


def _cuda_flash(call: Attention, dtype: str, machine: Machine) -> list[Piece]:
    """Output, log-sum-exp, random state (unused without dropout); float32 partial results where keys are split.

    The number of splits follows flash_api.cpp's num_splits_heuristic: blocks of 64 rows are spread over twice the
    multiprocessors; where those stand idle, keys are split too, in as few parts as reach 85 % of the best occupancy.
    Declared, not recorded: no card was at hand. Source: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp.
    """
    batch, heads, groups, rows, keys, size, _, _ = call
    found = [
        Piece("output", batch * heads * rows * size * DTYPE_BYTES[dtype]),
        Piece("logsumexp", 4 * batch * heads * rows),
    ]
    random_state = [Piece("rng_state", 16), Piece("unused", 8)]
    if machine.sm_count is None:
        return found + random_state
    if rows == 1 and heads > groups:
        heads, rows = groups, heads // groups
    splits = _flash_splits(batch * heads * ceil(rows / 64), machine.sm_count * 2, keys, size)
    if splits > 1:
        multiple = 32 if size <= 128 else 64
        rounded = -(-size // multiple) * multiple
        found += [
            Piece("split_logsumexp", 4 * splits * batch * heads * rows, True),
            Piece("split_output", 4 * splits * batch * heads * rows * rounded, True),
        ]
    return found + random_state


def _flash_splits(work: int, slots: int, keys: int, size: int) -> int:
    if work >= 0.8 * slots:
        return 1
    blocks = ceil(keys / (256 if size <= 64 else 128 if size <= 128 else 64))
    eligible = [
        s
        for s in range(1, min(128, slots, blocks) + 1)
        if s == 1 or ceil(blocks / s) != ceil(blocks / (s - 1))
    ]
    waves = {s: work * s / slots for s in eligible}
    efficiency = {s: wave / ceil(wave) for s, wave in waves.items()}
    best = max(efficiency.values())
    return next(s for s in eligible if efficiency[s] >= 0.85 * best)


def _cuda_efficient(call: Attention, dtype: str) -> list[Piece]:
    """Output, log-sum-exp padded to 32 rows, seed and offset; a float32 accumulator above head size 128 in 16 bits.

    Source: aten/src/ATen/native/transformers/cuda/attention.cu.
    """
    batch, heads, _, rows, _, size, _, _ = call
    e = DTYPE_BYTES[dtype]
    found = [
        Piece("output", batch * heads * rows * size * e),
        Piece("logsumexp", 4 * batch * heads * -(-rows // 32) * 32),
        Piece("philox_seed", 8),
        Piece("philox_offset", 8),
    ]
    if e == 2 and size > 128:
        found.append(Piece("accumulator", 4 * batch * heads * rows * size))
    return found
