"""What the planner hands to the executor: a program with offsets, waits and a prediction.

Reading order: Image and Workload (what is asked), ModelShape and Unit (what is run), Tiles (how finely), Buffer
(where), Step and Copy (in which order), Prediction (what it costs), Plan (all of it, as one JSON document).

Two queues run a plan. The *compute queue* runs `steps` in order; `Step.waits` names the copies that must have landed.
The *copy queue* runs `copies` in order; `Copy.after` names the step that must have completed before it may write.
The steps of the decode phase are one loop body, run `Plan.decode_repeats` times; `after` of a copy with `wraps` is
meant in the iteration before (in the first iteration: the end of prefill).

Time, for lifetimes, is the index of a step in `Plan.steps`; a lifetime is half-open, `[birth, death)`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from planner.errors import PlanFileError
from planner.files import write_bytes as write_bytes
from planner.files import write_text as write_text

SCHEMA_VERSION = 1
MOST_PLAN_BYTES = 2**26  # of a plan file; the longest, 72B with every unit on its own, has 2 MB

DType = Literal["bfloat16", "float16", "float32"]
DTYPE_BYTES: dict[str, int] = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
}

Phase = Literal["vision", "prefill", "decode"]
Kind = Literal[
    "patch_embed",
    "window_attn",
    "full_attn",
    "vision_mlp",
    "merger",
    "embed_tokens",
    "self_attn",
    "text_mlp",
    "norm",
    "lm_head",
    "sample",
]
Kernel = Literal["flash", "efficient", "cpu_flash"]
Order = Literal["all_first", "vision_then_llm", "prefetch"]


class Frozen(BaseModel):
    """Immutable, and refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# --- what is asked ------------------------------------------------------------------------------------------------


class WindowRun(Frozen):
    """`count` windows of `rows` patches each, next to one another in window order."""

    count: int
    rows: int


class Image(Frozen):
    """One still image after resizing. `rows` and `cols` count patches; both are even.

    Window order of the patches (the order of the residual stream `x`): all full windows first, then those cut at the
    right edge, then at the bottom, then the corner; each group row-major. `windows` lists these groups, so that
    tiles of equal windows have few distinct row counts. Inside a window merge units are row-major, and inside a
    merge unit the 2x2 patches.
    """

    name: str
    source_width_px: int
    source_height_px: int
    width_px: int
    height_px: int
    rows: int
    cols: int
    windows: tuple[WindowRun, ...]

    @property
    def patches(self) -> int:
        return self.rows * self.cols

    @property
    def tokens(self) -> int:
        return self.patches // 4


class Workload(Frozen):
    """What the plan is for. A run may ask for less (a shorter prompt, fewer new tokens), never for more."""

    images: tuple[Image, ...]
    min_pixels: int
    max_pixels: int
    prompt_tokens: int  # every row of the prompt: template, text, image tokens
    prompt_is_bound: bool  # the text was not tokenised: prompt_tokens is an upper bound
    max_new_tokens: int
    context_tokens: int  # capacity of the KV cache


# --- what is run --------------------------------------------------------------------------------------------------


class VisionShape(Frozen):
    """The vision tower, in config.json's terms."""

    depth: int
    hidden: int  # D
    heads: int
    intermediate: int  # I
    out_hidden: int
    in_channels: int
    patch_px: int
    temporal_patch: int
    merge: int
    window_px: int
    full_attention_blocks: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def patch_values(self) -> int:
        return self.in_channels * self.temporal_patch * self.patch_px**2


class TextShape(Frozen):
    """The language model, in config.json's terms."""

    layers: int
    hidden: int  # E
    heads: int  # H
    kv_heads: int  # G
    head_dim: int
    intermediate: int  # F
    vocabulary: int  # V
    rope_theta: float
    mrope_section: tuple[int, int, int]
    rms_norm_eps: float
    tied: bool


class TokenIds(Frozen):
    """Special ids; `stop` are those that end the answer."""

    image: int
    video: int
    vision_start: int
    vision_end: int
    stop: tuple[int, ...]


class ModelShape(Frozen):
    """Everything about the model that is not weights. `fingerprint`: sha256 over the normalised config and the names, shapes and dtypes of all tensors.

    `dtype`: of weights and activations in the run. `stored`: of the weights in their files, where that is another one
    of the same size; they are converted as they are read.
    """

    name: str
    dtype: DType
    vision: VisionShape
    text: TextShape
    token_ids: TokenIds
    repetition_penalty: float
    fingerprint: str
    stored: DType | None = None

    @property
    def residual_dtype(self) -> DType:
        """Of the residual streams: float32 where the model computes in float16, whose range they leave."""
        return "float32" if self.dtype == "float16" else self.dtype

    @property
    def stored_dtype(self) -> DType:
        """Of the weights in their files."""
        return self.stored or self.dtype


class UnitTensor(Frozen):
    """One tensor, or rows `[row_start, row_stop)` of one, inside a unit.

    `name` is the published checkpoint name without its module prefix's variations (`visual.*`, `model.*`,
    `lm_head.weight`); `local` is what the executor's step calls it (`attn.qkv.weight`).
    """

    name: str
    local: str
    shape: tuple[int, ...]
    row_start: int
    row_stop: int
    offset_bytes: int
    size_bytes: int


class Unit(Frozen):
    """What is resident, streamed or absent as one: a block's attention or MLP half, the merger, a row tile of lm_head."""

    id: str  # "visual/blocks.7.attn", "text/layers.3.mlp", "text/lm_head[0]"
    tensors: tuple[UnitTensor, ...]
    size_bytes: int


# --- how finely ---------------------------------------------------------------------------------------------------


class Tiles(Frozen):
    """Rows processed at once, by kind of step; the last tile of a run may be short."""

    patch_rows: int
    window_rows: int
    query_rows: int
    query_heads: int  # heads per attention call in full-attention vision blocks
    vision_mlp_rows: int
    merger_rows: int  # image tokens
    prompt_rows: int
    prompt_heads: int  # key/value heads per attention call in prefill
    prompt_mlp_rows: int
    vocabulary_rows: int


class WindowTile(NamedTuple):
    """Rows `[start, stop)` of one image, made of whole windows: `runs` of (count, rows), in order."""

    start: int
    stop: int
    runs: tuple[tuple[int, int], ...]


def spans(rows: int, tile: int) -> Iterator[tuple[int, int]]:
    """`[start, stop)` of each tile over `rows` rows; the last one may be short."""
    for start in range(0, rows, tile):
        yield start, min(start + tile, rows)


def question_tile(tile: int, start: int, prompt_tokens: int, more: int) -> int:
    """Rows at once of what follows row `start` of a prompt: `tile`, or the most below it with which the last tile, filled up, ends within `more` rows behind the prompt."""
    left = prompt_tokens - start
    room = min(left + more, prompt_tokens)
    count = -(-left // tile)
    while count * tile > room:
        tile = -(-left // count)
        count += 1 if count * tile > room else 0
    return tile


def window_tiles(windows: tuple[WindowRun, ...], tile_rows: int) -> tuple[WindowTile, ...]:
    """Tiles of whole windows with at most `tile_rows` rows each, or one window where that is larger."""
    tiles: list[WindowTile] = []
    start = stop = 0
    runs: list[tuple[int, int]] = []
    for run in windows:
        left = run.count
        while left:
            room = (tile_rows - (stop - start)) // run.rows
            if room <= 0 and stop == start:
                room = 1
            take = min(left, room)
            if take > 0:
                runs.append((take, run.rows))
                stop += take * run.rows
                left -= take
            if left:
                tiles.append(WindowTile(start, stop, tuple(runs)))
                start, runs = stop, []
    if runs:
        tiles.append(WindowTile(start, stop, tuple(runs)))
    return tuple(tiles)


# --- where --------------------------------------------------------------------------------------------------------


class View(Frozen):
    """A tensor inside a buffer, contiguous, `offset_bytes` from the buffer's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int


BufferKind = Literal["weights", "staging", "kv_cache", "residual", "scratch"]


class Buffer(Frozen):
    """A range of the arena. `lifetimes` are the step intervals in which its content matters; outside them another buffer may use its bytes.

    Weights and staging buffers have no views of their own: a Unit's tensors are placed from `offset_bytes` on.
    """

    name: str
    kind: BufferKind
    offset_bytes: int
    size_bytes: int
    lifetimes: tuple[tuple[int, int], ...]
    views: tuple[View, ...]


class HostBuffer(Frozen):
    """Host memory that counts because the host is the device (the CPU): decoded images, tokenizer."""

    name: str
    size_bytes: int
    lifetimes: tuple[tuple[int, int], ...]


# --- in which order -----------------------------------------------------------------------------------------------


class Outside(Frozen):
    """Memory that a kernel takes itself, outside the arena, and gives back.

    Time is counted in the step's own allocations: `birth` is this one's number, `death` how many had been made when it
    was given back. `declared`: taken by a kernel's inside, where no walk of the executor's code on the CPU sees it.
    """

    name: str
    size_bytes: int
    birth: int
    death: int
    declared: bool = False


class Step(Frozen):
    """One module in one phase. `id` is `vision/blocks.7.attn`, `vision[1]/...` where images run one after another."""

    id: str
    phase: Phase
    kind: Kind
    images: tuple[int, ...]  # of a vision step: which images it processes
    unit: str | None  # weights it needs
    weights: str | None  # the buffer its unit lies in
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    waits: tuple[str, ...]
    kernel: Kernel | None
    outside: tuple[Outside, ...]
    # prediction; in decode: of the last iteration for bytes, of a steady one for seconds
    live_bytes: int  # arena bytes alive
    resident_bytes: int  # arena bytes the device holds (all on a card; pages touched on the CPU)
    outside_bytes: int
    host_bytes: int
    expected_bytes: int  # device bytes
    seconds: float  # without waiting for copies


class Copy(Frozen):
    """One unit's way into a buffer. It serves the first step that waits for it: `copy:prefill/layers.3.mlp`.

    `phase` says in which phase's part of the copy queue it stands; copies of `decode` with `once` run in the first
    iteration only (units that become resident after prefill, and all copies of decode that are not streamed).
    """

    id: str
    phase: Phase
    unit: str
    buffer: str
    after: str | None  # a step; None: as soon as the queue reaches it
    wraps: bool  # `after` is meant in the iteration before
    once: bool
    size_bytes: int
    seconds: float
    source: Literal["disk", "host"] = "disk"


class HostUnit(Frozen):
    """A unit that stays in pinned host memory once it was read: its first copy fills the place, its later copies have `source` host."""

    unit: str
    offset_bytes: int
    size_bytes: int


# --- what it costs ------------------------------------------------------------------------------------------------


class MemoryTerm(Frozen):
    """One line of the device's memory at the peak."""

    name: str
    expected_bytes: int
    error_bytes: int  # how much more it may be
    source: str


class PhasePrediction(Frozen):
    """One row of the report. Bytes are maxima over the phase's steps, except the two peaks, which are sums at one step."""

    phase: Literal["load", "vision", "prefill", "decode"]
    weights_resident_bytes: int
    weights_streamed_bytes: int  # copied during the phase, all iterations
    activations_bytes: int
    kv_cache_bytes: int
    staging_bytes: int
    outside_bytes: int
    context_bytes: int
    allocated_peak_bytes: int  # in live blocks; on the CPU arena bytes alive and kernels' blocks
    reserved_peak_bytes: int  # held for blocks; on the CPU arena bytes held and kernels' blocks
    expected_peak_bytes: int
    bound_peak_bytes: int
    seconds: float
    compute_seconds: float
    copy_seconds: float


class Variant(Frozen):
    """The same request with one idea off; `fits` against the same budget."""

    name: str
    bound_bytes: int
    seconds: float
    fits: bool
    note: str


class Move(Frozen):
    """One thing the plan does to fit: how much less it needs than without it, and what that costs in seconds (negative: it is faster too)."""

    name: str
    saved_bytes: int
    paid_seconds: float


class Further(Frozen):
    """What further requests of a session cost: the same plan again in the same arena.

    `question_rows`: of a question about the same images the rows after the last image run, so many at once; None: keys
    and values are not kept, and every request runs as a whole. `kept_bytes`: what libraries keep for these rows beside
    the plan's own shapes, from the first such question on.
    """

    question_rows: int | None
    question_prefill_seconds: float
    question_seconds: float
    request_seconds: float  # of a request with other images
    kept_bytes: int
    bound_peak_bytes: int  # of the whole session


class Prediction(Frozen):
    phases: tuple[PhasePrediction, ...]
    peak_step: str
    terms: tuple[MemoryTerm, ...]  # of the peak step; they add up to expected_peak_bytes
    expected_peak_bytes: int
    bound_peak_bytes: int
    arena_bytes: int
    live_peak_bytes: int  # the packer's lower bound
    seconds: float
    seconds_lower_bound: float
    candidates: int
    smallest_budget_bytes: int
    variants: tuple[Variant, ...]
    moves: tuple[Move, ...] = ()
    further: Further | None = None


# --- all of it ----------------------------------------------------------------------------------------------------


class Residency(Frozen):
    """How many units of a class are resident in a phase, of how many."""

    phase: Phase
    unit_class: str  # "vision.attn", "text.mlp", "text.lm_head"
    resident: int
    total: int


class Levers(Frozen):
    """What the search decided, for people; the executor follows steps, copies and buffers."""

    order: Order
    images_together: bool
    staging_depth: int
    tiles: Tiles
    residency: tuple[Residency, ...]


class Kept(Frozen):
    """A block outside the arena that a card holds from before the first step to the end; `declared` as in Outside."""

    name: str
    size_bytes: int
    declared: bool = False


class DeviceTerms(Frozen):
    """What the plan assumes of the device. `alloc_conf` is what PYTORCH_ALLOC_CONF must say; `kept` stands in the order of allocation."""

    profile: str
    kind: Literal["cpu", "cuda"]
    budget_bytes: int | None  # None: unlimited
    context_bytes: int
    context_error_bytes: int
    max_tensor_bytes: int
    allocator: str
    alloc_conf: str = ""
    kept: tuple[Kept, ...] = ()


class Plan(Frozen):
    schema_version: Literal[1]
    request: str  # the command that makes this plan
    model: ModelShape
    workload: Workload
    device: DeviceTerms
    levers: Levers
    units: tuple[Unit, ...]
    buffers: tuple[Buffer, ...]
    host_buffers: tuple[HostBuffer, ...]
    steps: tuple[Step, ...]
    copies: tuple[Copy, ...]
    host_units: tuple[HostUnit, ...] = ()
    decode_repeats: int
    prediction: Prediction

    def dumps(self) -> str:
        """The plan as JSON, one line per list entry, the same bytes for the same plan; `digest` last."""
        data = self.model_dump(mode="json")
        data["digest"] = digest(data)
        parts = []
        for key, value in data.items():
            if isinstance(value, list):
                rows = ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in value)
                parts.append(f'"{key}":[\n  {rows}\n]' if rows else f'"{key}":[]')
            else:
                parts.append(f'"{key}":{json.dumps(value, separators=(",", ":"))}')
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def save(self, path: Path) -> None:
        """Write `plan.json` whole or not at all."""
        write_text(path, self.dumps())

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan file; PlanFileError names the file, the field and the command that writes it anew."""
        try:
            text = _read(path).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanFileError(f"{path}: cannot be read as a plan: {error}") from None
        return cls.loads(text, name=str(path))

    @classmethod
    def loads(cls, text: str, *, name: str = "plan.json") -> Plan:
        """Read a plan from its JSON; `name` is what errors call it."""
        anew = f"write it anew with: plan --out {name}"
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanFileError(f"{name}: not a plan: it is not JSON ({error}); {anew}") from None
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise PlanFileError(
                f"{name}: wanted a plan of schema version {SCHEMA_VERSION}, found {version!r}; {anew}"
            )
        signed = data.pop("digest", None)
        try:
            plan = cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise PlanFileError(
                f"{name}: field {field}: {first['msg']} ({error.error_count()} in all); {anew}"
            ) from None
        # what a plan promises holds for the plan as the planner made it; a changed one is another plan, never checked
        if signed != digest(data):
            raise PlanFileError(f"{name}: it was changed after it was written; {anew}")
        return plan


def _read(path: Path) -> bytes:
    """The file's bytes; whatever lies under the name, not more than a plan has is read."""
    pieces, size_bytes = [], 0
    with open(path, "rb") as file:
        # piece by piece: one read takes memory for all that was asked for, however short the file
        while size_bytes <= MOST_PLAN_BYTES and (piece := file.read(2**20)):
            pieces.append(piece)
            size_bytes += len(piece)
    if size_bytes > MOST_PLAN_BYTES:
        raise PlanFileError(
            f"{path}: not a plan: wanted at most {MOST_PLAN_BYTES // 2**20} MiB, found more"
        )
    return b"".join(pieces)


# --- again, in the same arena ---------------------------------------------------------------------------------------


def first_of_prefill(plan: Plan) -> int:
    """The number of prefill's first step."""
    return next(i for i, step in enumerate(plan.steps) if step.phase == "prefill")


def still_there(plan: Plan, first: int) -> frozenset[str]:
    """Copies whose buffer is alive from step `first` to the plan's end, and holds no other unit meanwhile."""
    end = len(plan.steps)
    units: dict[str, set[str]] = {}
    for copy in plan.copies:
        units.setdefault(copy.buffer, set()).add(copy.unit)
    whole_time = {
        buffer.name
        for buffer in plan.buffers
        if any(birth <= first and death >= end for birth, death in buffer.lifetimes)
        and len(units.get(buffer.name, ())) == 1
    }
    # what arrives once the loop runs is not there when prefill begins
    return frozenset(
        copy.id for copy in plan.copies if copy.buffer in whole_time and copy.phase != "decode"
    )


def keeps_cache(plan: Plan, first: int) -> bool:
    """Whether no buffer that is alive from step `first` on shares bytes with keys and values."""
    later = [b for b in plan.buffers if any(death > first for _, death in b.lifetimes)]
    return not any(
        other is not cache and _overlap(cache, other)
        for cache in plan.buffers
        if cache.kind == "kv_cache"
        for other in later
    )


def _overlap(one: Buffer, other: Buffer) -> bool:
    start = max(one.offset_bytes, other.offset_bytes)
    return start < min(one.offset_bytes + one.size_bytes, other.offset_bytes + other.size_bytes)


# --- files ----------------------------------------------------------------------------------------------------------


def digest(data: Mapping[str, object]) -> str:
    """sha256 of a plan's JSON data without its `digest`, whatever its spacing and order of keys."""
    kept = {key: value for key, value in data.items() if key != "digest"}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class TensorLocation(NamedTuple):
    """Where a tensor's bytes lie: absolute file offset, row-major, `shape` as stored."""

    path: Path
    offset_bytes: int
    size_bytes: int
    shape: tuple[int, ...]
    dtype: DType
