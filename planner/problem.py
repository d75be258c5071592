"""One request on one device, with everything about it that does not depend on the levers' setting, computed once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from planner import kept_code, workspace
from planner.buffers import SCRATCH_NAME, VISION_KINDS, Layouted, text_scratch, vision_scratch
from planner.checkpoint.spec import Checkpoint
from planner.checkpoint.template import unit_sizes
from planner.costs import Costs
from planner.host_tier import capacity_bytes
from planner.plan.program import Outside
from planner.plan.shapes import Image, ModelShape, Workload
from planner.plan.tiles import Tiles
from planner.plan.words import DTYPE_BYTES, Kernel, Kind, Phase
from planner.profile import DeviceProfile
from planner.schedule import StepDraft
from planner.workload import host_bytes

Allocator = Literal["native", "expandable"]
# what PYTORCH_ALLOC_CONF must say for each
ALLOC_CONF: dict[str, str] = {"native": "", "expandable": "expandable_segments:True"}

COMPACT_BYTES_PER_TOKEN = 46  # of the published tokenizer.json: 7.03 MB for a vocabulary of 151,936


@dataclass(frozen=True, slots=True)
class Request:
    """What a plan is wanted for. `tiles` pins the row tiles (to compare numbers of plans); None: the search decides."""

    checkpoint: Checkpoint
    workload: Workload
    budget_bytes: int | None  # None: unlimited
    ram_bytes: int | None = None  # None: as the profile says
    tiles: Tiles | None = None
    allocator: Allocator | None = None  # None: as the profile says
    command: str = "plan"


class Problem:
    """A request and a device, and costs by kind of step (remembered)."""

    def __init__(self, request: Request, profile: DeviceProfile) -> None:
        self.request, self.profile = request, profile
        self.model: ModelShape = request.checkpoint.shape
        self.workload = request.workload
        self.costs = Costs(self.model, profile)
        self.on_cpu = profile.kind == "cpu"
        self.allocator = request.allocator or profile.allocator
        self.alloc_conf = ALLOC_CONF[self.allocator]
        workspaces = (profile.workspace_bytes, profile.lt_workspace_bytes)
        self.kept = () if self.on_cpu else workspace.kept(self.model, request.workload, workspaces)
        self.machine = workspace.Machine(
            kind=profile.kind,
            kernel=self.kernel,
            threads=profile.threads or 1,
            amx=profile.amx,
            sm_count=profile.sm_count,
        )
        self._taken: dict[tuple[Kind, Phase, Tiles, tuple[int, ...]], tuple[int, int]] = {}
        self.unit_sizes = lru_cache(maxsize=None)(self._unit_sizes)
        self.outside = lru_cache(maxsize=None)(self._outside)
        self.seconds = lru_cache(maxsize=None)(self._seconds)
        self.start_s = lru_cache(maxsize=None)(self._start_s)
        self.primed_bytes = lru_cache(maxsize=None)(self._primed_bytes)
        self.kept_bytes = lru_cache(maxsize=None)(self._kept_bytes)
        self.fixed_context_bytes = self._fixed_context_bytes()
        ram = request.ram_bytes if request.ram_bytes is not None else profile.default_ram_bytes
        self.total_bytes = sum(self.unit_sizes(self.model.text.vocabulary).values())
        self.cached = self.total_bytes <= ram  # files stay in host memory after they were read once
        repeats = request.workload.max_new_tokens - 1
        self.pinned_bytes = capacity_bytes(profile, ram, self.total_bytes, repeats)

    def _unit_sizes(self, vocabulary_rows: int) -> dict[str, int]:
        return unit_sizes(self.model, vocabulary_rows)

    @property
    def kernel(self) -> Kernel:
        """The attention kernel of every step on this device."""
        if self.on_cpu:
            return "cpu_flash"
        # flash needs sm80 and 16-bit numbers; before that, and in float32, the memory-efficient kernel
        flash = float(self.profile.compute_capability or 0) >= 8.0 and self.model.dtype != "float32"
        return "flash" if flash else "efficient"

    def images_of(self, images: Sequence[int]) -> tuple[Image, ...]:
        return tuple(self.workload.images[i] for i in images)

    def scratch(self, kind: Kind, phase: Phase, tiles: Tiles, images: tuple[int, ...]) -> Layouted:
        """Views and size of a kind's scratch."""
        if kind in VISION_KINDS:
            return vision_scratch(kind, self.model, tiles, self.images_of(images))
        rows = 1 if phase == "decode" else self.workload.prompt_tokens
        tile = tiles.prompt_rows if kind == "self_attn" else tiles.prompt_mlp_rows
        return text_scratch(kind, self.model, tile, rows)

    def _outside(
        self, kind: Kind, phase: Phase, tiles: Tiles, images: tuple[int, ...]
    ) -> tuple[Outside, ...]:
        return workspace.outside(
            kind,
            self.model,
            tiles,
            self.images_of(images),
            self.workload.prompt_tokens,
            self.workload.context_tokens,
            self.machine,
            decode=phase == "decode",
        )

    def outside_of(self, step: StepDraft, tiles: Tiles) -> tuple[Outside, ...]:
        """Blocks that a step takes outside the arena."""
        return self.outside(step.kind, step.phase, tiles, step.images)

    def taken(
        self, kind: Kind, phase: Phase, tiles: Tiles, images: tuple[int, ...]
    ) -> tuple[int, int]:
        """(scratch of a kind's step in the arena, the most bytes its blocks outside the arena take at once)."""
        known = self._taken.get((kind, phase, tiles, images))
        if known is None:
            scratch = 0
            if kind in SCRATCH_NAME:
                scratch = self.scratch(kind, phase, tiles, images).size_bytes
            known = scratch, workspace.peak_bytes(self.outside(kind, phase, tiles, images))
            self._taken[kind, phase, tiles, images] = known
        return known

    def transient(
        self, kind: Kind, phase: Phase, tiles: Tiles, images: tuple[int, ...]
    ) -> tuple[int, int]:
        """(bytes of a kind's step that add to what is resident then, bytes it takes outside the arena).

        On a card blocks outside the arena stay reserved when they are given back: they count once for the whole plan,
        not with the step.
        """
        scratch, outside = self.taken(kind, phase, tiles, images)
        return (scratch + outside if self.on_cpu else scratch), outside

    def _seconds(
        self, kind: Kind, phase: Phase, tiles: Tiles, images: tuple[int, ...], head_rows: int
    ) -> float:
        if kind in VISION_KINDS:
            return self.costs.vision(kind, tiles, self.images_of(images))
        if kind in ("self_attn", "text_mlp"):
            tile = tiles.prompt_rows if kind == "self_attn" else tiles.prompt_mlp_rows
            if phase == "prefill":
                rows = self.workload.prompt_tokens
                return self.costs.text(kind, tile, rows, 0, tiles.prompt_heads)
            # the cache grows with every token; half-way is the mean
            seen = self.workload.prompt_tokens + self.workload.max_new_tokens // 2
            return self.costs.text(kind, 1, 1, seen, tiles.prompt_heads)
        return self.costs.small(kind, head_rows)

    def _start_s(self, tiles: Tiles) -> float:
        """Seconds from the start of the process to the first step: imports, one call of every kernel, images."""
        images = self.workload.images
        products = [shape for shape in self.gemm_shapes(tiles, together=True) if shape[0] > 1]
        code = sum(
            max(self.kept_bytes(shape) - kept_code.DESCRIPTOR_BYTES, 0) for shape in products
        )
        rows = self.workload.prompt_tokens
        read = self.primed_bytes(tiles.vocabulary_rows)
        prime = self.costs.prime(tiles, images, rows, len(products), code, read)
        return self.profile.start_s + prime

    def _primed_bytes(self, vocabulary_rows: int) -> int:
        """Weights that priming reads, one unit of each size: those of the language model in prefill and in decode."""
        sizes = self.unit_sizes(vocabulary_rows)
        distinct = {(unit.partition("/")[0], size) for unit, size in sizes.items()}
        return sum(size * (2 if tower == "text" else 1) for tower, size in distinct)

    def seconds_of(self, step: StepDraft, tiles: Tiles, head_rows: int) -> float:
        """Seconds of a step without waiting; in decode of a mean iteration."""
        return self.seconds(step.kind, step.phase, tiles, step.images, head_rows)

    # --- terms outside the arena --------------------------------------------------------------------------------

    def context_bytes(self, gemm_shapes: frozenset[tuple[int, int, int]]) -> int:
        """Driver or interpreter, libraries, plan, tokenizer, and what the CPU's library keeps for each product shape."""
        return self.fixed_context_bytes + self.kept_for(gemm_shapes)

    def kept_for(self, gemm_shapes: Iterable[tuple[int, int, int]]) -> int:
        """What the CPU's library keeps for these products."""
        return sum(map(self.kept_bytes, gemm_shapes))

    def _fixed_context_bytes(self) -> int:
        profile, model = self.profile, self.model
        if not self.on_cpu:
            return profile.context_bytes
        # a block of the language model has steps in prefill and in decode
        blocks = model.vision.depth + 2 * model.text.layers
        context = profile.context_bytes + blocks * profile.context_block_bytes
        tokenizer = self.request.checkpoint.tokenizer_bytes
        if tokenizer:
            # the same tokens and merges written with spaces between make a larger file, but take no more memory
            tokens = model.text.vocabulary
            tokenizer = min(tokenizer, COMPACT_BYTES_PER_TOKEN * tokens)
            context += round(tokenizer * profile.tokenizer_bytes_per_file_byte)
            context += tokens * profile.tokenizer_bytes_per_token
        if model.dtype == "float32":
            patches = max((image.patches for image in self.workload.images), default=0)
            context += kept_code.float32_bytes(model, self.workload.prompt_tokens, patches)
        return context

    def _kept_bytes(self, gemm_shape: tuple[int, int, int]) -> int:
        """What stays after the products of that shape, with and without bias where the model has both, and after the
        attention over rows that such a product projected."""
        if not self.on_cpu or self.model.dtype == "float32":
            return 0
        rows, inputs, outputs = gemm_shape
        vision, text = self.model.vision, self.model.text
        # float16 has no tile unit here; what is kept for it is as without (12 pairs of widths, 11 row counts)
        amx = self.profile.amx and self.model.dtype == "bfloat16"
        kept = sum(
            kept_code.kept_bytes(rows, inputs, outputs, bias=bias, amx=amx)
            for bias in kept_code.biases(self.model, inputs, outputs)
        )
        if rows == 1 or not amx:
            return kept
        # keys and values of a full block, and keys of the language model, are projected for each tile of query rows
        if (inputs, outputs) == (vision.hidden, 2 * vision.hidden):
            images = {i.patches for i in self.workload.images if i.patches >= rows}
            for keys in {rows} if rows in images else images:
                # of several images a rest of rows is one's alone; tiles are multiples of 64
                if len(images) == 1 or rows % 64 == 0 or (keys - rows) % 64 == 0:
                    first = rows == keys or rows % 32 == 0
                    kept += kept_code.attention_kept_bytes(rows, keys, first=first)
        elif (inputs, outputs) == (text.hidden, text.kv_heads * text.head_dim):
            kept += kept_code.attention_kept_bytes(rows, rows, first=True)
        return kept

    def gemm_shapes(self, tiles: Tiles, together: bool) -> frozenset[tuple[int, int, int]]:
        """Every distinct product of a plan with these tiles: (rows, in, out)."""
        everything = tuple(range(len(self.workload.images)))
        groups = [everything] if together else [(i,) for i in everything]
        model, rows = self.model, self.workload.prompt_tokens
        shapes: set[tuple[int, int, int]] = set()
        for kind in VISION_KINDS:
            for group in groups if everything else ():
                shapes |= workspace.gemm_shapes(kind, model, tiles, self.images_of(group), rows)
        for kind in ("self_attn", "text_mlp", "lm_head"):
            for decode in (False, True):
                shapes |= workspace.gemm_shapes(kind, model, tiles, (), rows, decode=decode)
        return frozenset(shapes)

    @property
    def decoding_bytes(self) -> int:
        """Host bytes while the images are read: those already resized, and the largest being decoded. 0 where the host is not the device."""
        if not self.on_cpu:
            return 0
        kept, peak = 0, 0
        for image in self.workload.images:
            host = host_bytes(image)
            peak = max(peak, kept + host.peak_bytes)
            kept += host.kept_bytes
        return peak


def kv_bytes(model: ModelShape, tokens: int) -> int:
    """Keys and values of one layer."""
    return 2 * tokens * model.text.kv_heads * model.text.head_dim * DTYPE_BYTES[model.dtype]
