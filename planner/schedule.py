"""From levers to a program: steps in order, the buffers they name, and the copies that bring weights.

A *program* is a plan without offsets and without a prediction. Lifetimes of buffers follow from it (`planner.graph`).
Two rules keep both queues free of races and of deadlocks:

- a copy starts after the step before which its buffer's bytes may still be in use (`after`), and the step that needs
  it waits for it; so along the index of steps a weight buffer is alive from `after` + 1 on;
- the copy queue is in an order in which both queues can be walked to their end (here: by need; `planner.simulate`
  refines it by predicted seconds), so that no copy stands behind one that waits for a later step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from planner import buffers
from planner.plan.program import BufferKind, View
from planner.plan.shapes import Image, ModelShape, Workload
from planner.plan.tiles import Tiles
from planner.plan.words import Kind, Order, Phase

Anchor = Literal["late", "early", "middle"]

Source = Literal["disk", "host"]  # where a copy takes its unit from
LOOKAHEAD = 1  # steps by which a unit that is used once and has its own buffer is fetched ahead


class StepDraft(NamedTuple):
    id: str
    phase: Phase
    kind: Kind
    images: tuple[int, ...]
    unit: str | None
    weights: str | None
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    waits: tuple[str, ...]


class BufferDraft(NamedTuple):
    name: str
    kind: BufferKind
    size_bytes: int
    views: tuple[View, ...]


class CopyDraft(NamedTuple):
    """`after` is the index of a step, -1 for none; see planner.plan.Copy."""

    id: str
    phase: Phase
    unit: str
    buffer: str
    after: int
    wraps: bool
    once: bool
    size_bytes: int
    need: int  # index of the first step that waits for it
    source: Source = "disk"


@dataclass(frozen=True, slots=True)
class PhaseResidency:
    """Which units of each class are resident, by count; the others are streamed. Residents are spread evenly, beginning
    at the end that `anchor` names (of lm_head tiles `head_anchor`: the last may be short), unless `sets` names them
    (positions of attention halves, MLP halves, lm_head tiles; the counts are their sizes).

    In prefill no more than in decode: residents of prefill stay.
    """

    attn: int
    mlp: int
    head: int = 0  # lm_head tiles
    anchor: Anchor = "late"
    sets: tuple[frozenset[int], frozenset[int], frozenset[int]] | None = None
    head_anchor: Anchor = "late"

    @classmethod
    def of(
        cls, attn: Iterable[int], mlp: Iterable[int], head: Iterable[int] = ()
    ) -> PhaseResidency:
        """Exactly these units."""
        sets = frozenset(attn), frozenset(mlp), frozenset(head)
        return cls(len(sets[0]), len(sets[1]), len(sets[2]), sets=sets)

    def positions(
        self, totals: Sequence[int], within: PhaseResidency | None = None
    ) -> list[frozenset[int]]:
        """Positions of the residents of each class, of so many in all; spread over the residents of `within` where given."""
        if self.sets is not None:
            return list(self.sets)
        counts = (self.attn, self.mlp, self.head)
        anchors = (self.anchor, self.anchor, self.head_anchor)
        if within is None:
            return [spread(*found) for found in zip(counts, totals, anchors, strict=False)]
        found = []
        for count, outer, anchor in zip(counts, within.positions(totals), anchors, strict=False):
            among = sorted(outer)
            found.append(frozenset(among[i] for i in spread(count, len(among), anchor)))
        return found


@dataclass(frozen=True, slots=True)
class Choice:
    """One setting of every lever."""

    order: Order
    images_together: bool
    depth: int
    vision: PhaseResidency
    prefill: PhaseResidency
    decode: PhaseResidency
    tiles: Tiles
    spare_bytes: int = 0  # that what is prefetched leaves free, for gaps in the layout


@dataclass(frozen=True, slots=True)
class Program:
    """Steps, buffers and copies of one choice. `starts`: index of the first step of each phase."""

    choice: Choice
    steps: tuple[StepDraft, ...]
    buffers: Mapping[str, BufferDraft]
    copies: tuple[CopyDraft, ...]
    starts: Mapping[Phase, int]
    decode_repeats: int
    pinned: tuple[str, ...] = ()  # units that stay in pinned host memory, in order of use

    @property
    def decode_start(self) -> int:
        return self.starts.get("decode", len(self.steps))


@lru_cache(maxsize=8192)
def spread(resident: int, total: int, anchor: Anchor = "late") -> frozenset[int]:
    """`resident` of `total` positions, evenly: between two residents lie equally many streamed units, give or take one.

    `late` has the last of them, `early` the first, `middle` neither unless all.
    """
    if anchor == "middle":
        return frozenset((2 * i + 1) * total // (2 * resident) for i in range(resident))
    late = (i for i in range(total) if (i + 1) * resident // total != i * resident // total)
    return frozenset(total - 1 - i if anchor == "early" else i for i in late)


@lru_cache(maxsize=8192)
def pinned(sizes: Sequence[int], capacity: int) -> frozenset[int]:
    """Positions of the streamed units (a tuple of sizes, in order of use) that stay pinned: as many as fit, evenly spread."""
    if sum(sizes) <= capacity:
        return frozenset(range(len(sizes)))
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if sum(map(sizes.__getitem__, spread(middle, len(sizes)))) <= capacity:
            low = middle
        else:
            high = middle - 1
    return spread(low, len(sizes))


def program(
    choice: Choice,
    model: ModelShape,
    workload: Workload,
    unit_sizes: Mapping[str, int],
    *,
    prefetch_after: Mapping[str, int] | None = None,
    pinned_bytes: int = 0,
) -> Program:
    """The program of one choice; `pinned_bytes` of streamed units may stay in pinned host memory.

    `prefetch_after` (unit to step index) is where LLM residents may start to arrive under the order `prefetch`
    (`planner.variants` finds it from the free space); without it they arrive after the vision tower.
    """
    heads = sum(1 for unit in unit_sizes if unit.startswith("text/lm_head["))
    drafts = _Drafts(choice, model, workload, unit_sizes, heads)
    drafts.vision()
    vision_end = len(drafts.steps) - 1
    drafts.text("prefill")
    prefill_end = len(drafts.steps) - 1
    repeats = workload.max_new_tokens - 1
    if repeats > 0:
        drafts.text("decode")

    copies = list(_vision_copies(drafts))
    copies += _prefill_copies(drafts, vision_end, prefetch_after or {})
    copies.sort(key=lambda copy: copy.need)
    pinned_units: tuple[str, ...] = ()
    if repeats > 0:
        in_loop, pinned_units = _pin(_decode_copies(drafts, prefill_end), pinned_bytes)
        copies += in_loop
    waits: dict[int, list[str]] = {}
    for copy in copies:
        waits.setdefault(copy.need, []).append(copy.id)
    steps = tuple(
        step._replace(
            weights=drafts.where.get(index),
            waits=tuple(waits.get(index, ())),
        )
        for index, step in enumerate(drafts.steps)
    )
    repeats = max(repeats, 0)
    return Program(
        choice, steps, drafts.buffers, tuple(copies), drafts.starts, repeats, pinned_units
    )


class _Drafts:
    """Collects steps and buffers; `where` says in which buffer a step finds its unit."""

    def __init__(
        self,
        choice: Choice,
        model: ModelShape,
        workload: Workload,
        unit_sizes: Mapping[str, int],
        heads: int,
    ) -> None:
        self.choice, self.model, self.workload = choice, model, workload
        self.unit_sizes, self.heads = unit_sizes, heads
        self.steps: list[StepDraft] = []
        self.buffers: dict[str, BufferDraft] = {}
        self.starts: dict[Phase, int] = {}
        self.where: dict[int, str] = {}

    def buffer(self, name: str, kind: BufferKind, layouted: buffers.Layouted) -> str:
        known = self.buffers.get(name)
        if known is None or known.size_bytes < layouted.size_bytes:
            self.buffers[name] = BufferDraft(name, kind, layouted.size_bytes, layouted.views)
        return name

    def weights(self, name: str, kind: BufferKind, size_bytes: int) -> str:
        return self.buffer(name, kind, buffers.Layouted((), size_bytes))

    def step(
        self,
        id: str,
        phase: Phase,
        kind: Kind,
        unit: str | None,
        reads: tuple[str, ...],
        writes: tuple[str, ...],
        images: tuple[int, ...] = (),
    ) -> None:
        self.starts.setdefault(phase, len(self.steps))
        self.steps.append(StepDraft(id, phase, kind, images, unit, None, reads, writes, ()))

    def vision(self) -> None:
        """Steps of the vision tower, for all images at once or one after another; none without images."""
        if not self.workload.images:
            return
        everything = tuple(range(len(self.workload.images)))
        groups = [everything] if self.choice.images_together else [(i,) for i in everything]
        shape, tiles = self.model.vision, self.choice.tiles
        out = self.buffer(
            "prefill/x",
            "residual",
            buffers.residual(self.model, self.workload.prompt_tokens, self.model.text.hidden),
        )
        for group in groups:
            images = [self.workload.images[i] for i in group]
            prefix = f"vision[{group[0]}]/" if len(groups) > 1 else "vision/"
            patches = sum(image.patches for image in images)
            x = self.buffer(
                "vision/x", "residual", buffers.residual(self.model, patches, shape.hidden)
            )

            laid_out: dict[Kind, buffers.Layouted] = {}

            def add(
                module: str,
                kind: Kind,
                reads: tuple[str, ...],
                writes: tuple[str, ...],
                images: Sequence[Image] = images,
                prefix: str = prefix,
                group: tuple[int, ...] = group,
                laid_out: dict[Kind, buffers.Layouted] = laid_out,
            ) -> None:
                name = f"vision/{buffers.SCRATCH_NAME[kind]}"
                if kind not in laid_out:
                    laid_out[kind] = buffers.vision_scratch(kind, self.model, tiles, images)
                scratch = self.buffer(name, "scratch", laid_out[kind])
                unit = f"visual/{module}"
                self.step(prefix + module, "vision", kind, unit, reads, (*writes, scratch), group)

            add("patch_embed", "patch_embed", (), (x,))
            for block in range(shape.depth):
                full = block in shape.full_attention_blocks
                add(f"blocks.{block}.attn", "full_attn" if full else "window_attn", (x,), (x,))
                add(f"blocks.{block}.mlp", "vision_mlp", (x,), (x,))
            # in several groups each merger adds its own image's rows
            add("merger", "merger", (x, out) if group[0] else (x,), (out,))

    def text(self, phase: Phase) -> None:
        """Steps of prefill, or of one decode iteration."""
        model, tiles = self.model, self.choice.tiles
        decode = phase == "decode"
        rows = 1 if decode else self.workload.prompt_tokens
        x = self.buffer(f"{phase}/x", "residual", buffers.residual(model, rows, model.text.hidden))
        attention = self.buffer(
            f"{phase}/self_attn",
            "scratch",
            buffers.text_scratch("self_attn", model, tiles.prompt_rows, rows),
        )
        mlp = self.buffer(
            f"{phase}/mlp",
            "scratch",
            buffers.text_scratch("text_mlp", model, tiles.prompt_mlp_rows, rows),
        )
        hidden = self.buffer(f"{phase}/hidden", "residual", buffers.hidden(model))
        logits = self.buffer(f"{phase}/logits", "residual", buffers.logits(model))
        cache = buffers.kv_cache(model, self.workload.context_tokens)
        before = (x,) if phase == "prefill" and self.workload.images else ()
        self.step(f"{phase}/embed_tokens", phase, "embed_tokens", None, before, (x,))
        for layer in range(model.text.layers):
            module = f"layers.{layer}"
            kv = self.buffer(f"kv/{module}", "kv_cache", cache)
            self.step(
                f"{phase}/{module}.self_attn",
                phase,
                "self_attn",
                f"text/{module}.self_attn",
                (x, kv) if decode else (x,),
                (x, kv, attention),
            )
            unit = f"text/{module}.mlp"
            self.step(f"{phase}/{module}.mlp", phase, "text_mlp", unit, (x,), (x, mlp))
        self.step(f"{phase}/norm", phase, "norm", "text/norm", (x,), (hidden,))
        for tile in range(self.heads):
            module = f"lm_head[{tile}]"
            # every tile adds its part of the logits
            reads = (hidden, logits) if tile else (hidden,)
            self.step(f"{phase}/{module}", phase, "lm_head", f"text/{module}", reads, (logits,))
        self.step(f"{phase}/sample", phase, "sample", None, (logits,), ())

    def uses(self, phase: Phase) -> list[tuple[int, str]]:
        """(step index, unit) of every step of a phase that needs weights."""
        return [
            (index, step.unit)
            for index, step in enumerate(self.steps)
            if step.phase == phase and step.unit is not None
        ]


def resident_units(phase: Phase, choice: Choice, model: ModelShape, heads: int) -> set[str]:
    """Units with a buffer of their own in a phase: those that the residency counts choose, and the ends of a stage.

    Prefill's are a subset of decode's, so that what was resident once stays.
    """
    if phase == "vision":
        blocks = model.vision.depth
        attn, mlp = choice.vision.positions((blocks, blocks))[:2]
        units = {"visual/patch_embed", "visual/merger"}
        units |= {f"visual/blocks.{i}.attn" for i in attn}
        return units | {f"visual/blocks.{i}.mlp" for i in mlp}
    totals = (model.text.layers, model.text.layers, heads)
    if phase == "prefill":
        found = choice.prefill.positions(totals, within=choice.decode)
    else:
        found = choice.decode.positions(totals)
    units = {"text/norm"}
    for name, positions in zip(
        ("layers.{}.self_attn", "layers.{}.mlp", "lm_head[{}]"), found, strict=True
    ):
        units |= {f"text/{name.format(i)}" for i in positions}
    return units


def _vision_copies(drafts: _Drafts) -> Iterable[CopyDraft]:
    choice = drafts.choice
    uses = drafts.uses("vision")
    resident = resident_units("vision", choice, drafts.model, drafts.heads)
    for index, unit in uses:
        if unit in resident:
            drafts.where[index] = f"weights/{unit}"
    for index, unit in _first_uses(uses):
        if unit in resident:
            # the merger is needed last: it need not wait in memory from the start
            late = unit == "visual/merger" and choice.order != "all_first"
            after = max(index - 1 - LOOKAHEAD, -1) if late else -1
            yield _own(drafts, "vision", unit, index, after)
    streamed = [(index, unit) for index, unit in uses if unit not in resident]
    yield from _streamed(drafts, "vision", streamed, start=-1)


def _prefill_copies(
    drafts: _Drafts, vision_end: int, prefetch_after: Mapping[str, int]
) -> Iterable[CopyDraft]:
    choice = drafts.choice
    uses = drafts.uses("prefill")
    resident = resident_units("prefill", choice, drafts.model, drafts.heads)
    for index, unit in uses:
        if unit in resident:
            after = -1 if choice.order == "all_first" else vision_end
            if choice.order == "prefetch":
                after = prefetch_after.get(unit, vision_end)
            yield _own(drafts, "prefill", unit, index, after)
    streamed = [(index, unit) for index, unit in uses if unit not in resident]
    yield from _streamed(drafts, "prefill", streamed, start=vision_end)


def _decode_copies(drafts: _Drafts, prefill_end: int) -> list[CopyDraft]:
    choice, heads = drafts.choice, drafts.heads
    uses = drafts.uses("decode")
    before = resident_units("prefill", choice, drafts.model, heads)
    resident = resident_units("decode", choice, drafts.model, heads)
    grown = []
    for index, unit in uses:
        if unit in before:
            drafts.where[index] = f"weights/{unit}"
        elif unit in resident:
            grown.append(_own(drafts, "decode", unit, index, prefill_end))
    streamed = [
        (index, unit) for index, unit in uses if unit not in resident and unit not in before
    ]
    copies = grown + list(_streamed(drafts, "decode", streamed, start=prefill_end))
    # first those of the first iteration in order of need, so that the loop can begin while units still arrive
    return sorted(copies, key=lambda copy: copy.need)


def _pin(copies: Sequence[CopyDraft], capacity: int) -> tuple[list[CopyDraft], tuple[str, ...]]:
    """The loop's copies with those of pinned units from host memory, and these units in order of use."""
    streamed = [copy for copy in copies if not copy.once]
    positions = pinned(tuple(copy.size_bytes for copy in streamed), capacity)
    units = {streamed[position].unit: None for position in sorted(positions)}
    return [
        copy._replace(source="host") if copy.unit in units and not copy.once else copy
        for copy in copies
    ], tuple(units)


def _own(drafts: _Drafts, phase: Phase, unit: str, serves: int, after: int) -> CopyDraft:
    """The one copy of a resident unit. Where all come first, the first step waits for it already."""
    size_bytes = drafts.unit_sizes[unit]
    buffer = drafts.weights(f"weights/{unit}", "weights", size_bytes)
    drafts.where[serves] = buffer
    need = 0 if drafts.choice.order == "all_first" and phase != "decode" else serves
    once = phase == "decode"
    id = f"copy:{drafts.steps[serves].id}"
    return CopyDraft(id, phase, unit, buffer, after, False, once, size_bytes, need)


def _streamed(
    drafts: _Drafts, phase: Phase, uses: Sequence[tuple[int, str]], *, start: int
) -> Iterable[CopyDraft]:
    """Copies through `depth` staging slots in turn; a slot is refilled after the step that used it last."""
    found = refills([need for need, _ in uses], drafts.choice.depth, loop=phase == "decode")
    for (need, unit), (slot, after, wraps) in zip(uses, found, strict=True):
        size_bytes = drafts.unit_sizes[unit]
        buffer = drafts.weights(f"staging/{phase}/{slot}", "staging", size_bytes)
        drafts.where[need] = buffer
        id = f"copy:{drafts.steps[need].id}"
        after = start if after is None else after
        yield CopyDraft(id, phase, unit, buffer, after, wraps, False, size_bytes, need)


def refills(
    needs: Sequence[int], depth: int, *, loop: bool
) -> Iterator[tuple[int, int | None, bool]]:
    """(slot, step after whose end it is refilled, whether in the iteration before) of each streamed use; None: from the phase's start."""
    count = len(needs)
    depth = min(depth, count)
    for position in range(count):
        slot = position % depth
        if position >= depth:
            yield slot, needs[position - depth], False
        elif loop:
            yield slot, needs[(count - 1 - slot) // depth * depth + slot], True
        else:
            yield slot, None, False


def _first_uses(uses: Iterable[tuple[int, str]]) -> Iterable[tuple[int, str]]:
    seen = set()
    for index, unit in uses:
        if unit not in seen:
            seen.add(unit)
            yield index, unit
