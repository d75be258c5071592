"""A setting of the levers in three parts (vision, prefill, decode), worked out by index: seconds and live bytes, without names.

The same program as `planner.schedule` writes, as numbers. A *frame* is a part without tiles: which step needs which
weights, the copies as jobs of a queue, the arena bytes alive beside a step's own scratch. Tiles add seconds, scratch
and blocks outside the arena, kind by kind. `planner.worked` joins the parts. Tests hold all of it against program,
graph and timeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple

from planner import buffers
from planner.plan.tiles import Tiles
from planner.plan.words import Kind, Phase
from planner.problem import Problem
from planner.queues import Job, Loop, loop
from planner.schedule import LOOKAHEAD, Choice, PhaseResidency, pinned, refills
from planner.workload import host_bytes


class Bare(NamedTuple):
    """A part without weights and tiles: of each step its kind, its images, its unit's size (0: none), the live bytes beside its scratch.

    `unwritten`: of these, what the device need not hold yet (arena pages on the CPU); `host`: what the host holds there.
    `passing`: live bytes that no other step has.
    """

    kinds: list[Kind]
    images: list[tuple[int, ...]]
    units: list[int]
    live: list[int]
    unwritten: list[int]
    host: list[int]
    passing: list[int]


@dataclass(frozen=True, eq=False)
class Frame:
    """A part with its weights. `jobs` by need, `sizes` of their units; `early`: jobs that the order `prefetch` may bring before.

    `live`: arena bytes alive at each step beside its scratch; `held`: those that the device holds there at least.
    """

    bare: Bare
    jobs: list[Job]
    sizes: list[int]
    early: list[int]
    live: list[int]
    held: list[int]

    @cached_property
    def base(self) -> dict[Kind, int]:
        """The most arena bytes held beside the scratch, over all steps of a kind."""
        most: dict[Kind, int] = {}
        for kind, held in zip(self.bare.kinds, self.held, strict=True):
            if held > most.get(kind, -1):
                most[kind] = held
        return most

    @cached_property
    def still(self) -> dict[tuple[Kind, Kind, tuple[int, ...]], int]:
        """Of two kinds and some images: the most bytes held beside the scratch of the first, by the time that a step of the second with these images runs, one of the first having run before.

        On the CPU pages stay until the phase ends: what a step has written is there beside the blocks of a later one. What
        later weights fill of a slot lies beside it too. Where a kind runs again, its scratch is none of the bytes that
        are alive until then.
        """
        most: dict[tuple[Kind, Kind, tuple[int, ...]], int] = {}
        before: dict[Kind, int] = {}
        bare = self.bare
        last = {kind: index for index, kind in enumerate(bare.kinds)}
        for index, kind in enumerate(bare.kinds):
            held, images = self.held[index], bare.images[index]
            full = self.live[index] - bare.unwritten[index]  # once slots are filled
            if full > before.get(kind, -1):
                before[kind] = full
            staying, host = held - bare.passing[index], bare.host[index]
            for other, most_full in before.items():
                size = most_full - (full - held)  # what is not filled yet is not there
                beside = host + (staying if last[other] > index and staying > size else size)
                if beside > most.get((other, kind, images), -1):
                    most[other, kind, images] = beside
        return most

    @cached_property
    def copy_seconds(self) -> float:
        return sum(job.seconds for job in self.jobs)


class Parts:
    """The parts of one problem's settings; remembers them."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.repeats = max(problem.workload.max_new_tokens - 1, 0)
        self.bare_vision = lru_cache(maxsize=None)(self._bare_vision)
        self.bare_text = lru_cache(maxsize=None)(self._bare_text)
        self.vision = lru_cache(maxsize=None)(self._vision)
        self.prefill = lru_cache(maxsize=None)(self._prefill)
        self.decode = lru_cache(maxsize=None)(self._decode)
        self.looped = lru_cache(maxsize=None)(self._looped)
        self.pinned = lru_cache(maxsize=None)(self._pinned)

    # --- vision -------------------------------------------------------------------------------------------------

    def groups(self, together: bool) -> list[tuple[int, ...]]:
        """Which images run at once."""
        everything = tuple(range(len(self.problem.workload.images)))
        if not everything:
            return []
        return [everything] if together else [(i,) for i in everything]

    def frames(self, choice: Choice, *, first: bool) -> dict[Phase, Frame]:
        """The parts of a setting; `first`: with all weights before the first step."""
        rows = choice.tiles.vocabulary_rows
        found: dict[Phase, Frame] = {
            "vision": self.vision(choice.images_together, choice.vision, choice.depth, first),
            "prefill": self.prefill(choice.prefill, choice.decode, choice.depth, rows),
        }
        if self.repeats:
            found["decode"] = self.decode(choice.decode, choice.prefill, choice.depth, rows)
        return found

    def _bare_vision(self, together: bool) -> Bare:
        problem, model, workload = self.problem, self.problem.model, self.problem.workload
        shape, groups = model.vision, self.groups(together)
        sizes = problem.unit_sizes(model.text.vocabulary)
        kinds: list[Kind] = ["patch_embed"]
        for block in range(shape.depth):
            full = block in shape.full_attention_blocks
            kinds += ["full_attn" if full else "window_attn", "vision_mlp"]
        kinds.append("merger")
        attn, mlp = sizes["visual/blocks.0.attn"], sizes["visual/blocks.0.mlp"]
        units = [sizes["visual/patch_embed"], *[attn, mlp] * shape.depth, sizes["visual/merger"]]
        out = buffers.residual(model, workload.prompt_tokens, model.text.hidden).size_bytes
        patches = [sum(workload.images[i].patches for i in group) for group in groups]
        x = buffers.residual(model, max(patches, default=0), shape.hidden).size_bytes
        found = Bare([], [], [], [], [], [], [])
        for number, group in enumerate(groups):
            # images of this and later groups stay on the host until their patches are embedded
            waiting = [i for later in groups[number + 1 :] for i in later] if problem.on_cpu else []
            for kind, size in zip(kinds, units, strict=True):
                here = [*group, *waiting] if problem.on_cpu and kind == "patch_embed" else waiting
                found.kinds.append(kind)
                found.images.append(group)
                found.units.append(size)
                found.live.append(x + (out if number or kind == "merger" else 0))
                found.unwritten.append(0)
                found.passing.append(0)
                found.host.append(sum(host_bytes(workload.images[i]).kept_bytes for i in here))
        return found

    def _vision(self, together: bool, residency: PhaseResidency, depth: int, first: bool) -> Frame:
        """`first`: all residents come before the first step (the order `all_first`)."""
        bare = self.bare_vision(together)
        count, blocks = len(bare.kinds), self.problem.model.vision.depth
        weights = _Weights(self.problem, bare)
        if not count:
            return weights.frame()
        attn, mlp = residency.positions((blocks, blocks))[:2]
        each = 2 * blocks + 2  # steps of a group
        own = {0, each - 1, *(2 * i + 1 for i in attn), *(2 * i + 2 for i in mlp)}
        for unit in sorted(own):
            # the merger is needed last: it need not wait in memory from the start
            late = unit == each - 1 and not first
            after = max(unit - 1 - LOOKAHEAD, -1) if late else -1
            weights.own(0 if first else unit, after, unit, count - each + unit + 1)
        streamed = [need for need in range(count) if need % each not in own]
        weights.streamed(streamed, depth, again_from=each)
        return weights.frame()

    # --- text ---------------------------------------------------------------------------------------------------

    def _bare_text(self, decode: bool, vocabulary_rows: int) -> Bare:
        problem, model, workload = self.problem, self.problem.model, self.problem.workload
        text = model.text
        sizes = problem.unit_sizes(vocabulary_rows)
        heads = [size for unit, size in sizes.items() if unit.startswith("text/lm_head[")]
        kinds: list[Kind] = ["embed_tokens", *(("self_attn", "text_mlp") * text.layers), "norm"]
        kinds += ["lm_head"] * len(heads)
        kinds.append("sample")
        attn, mlp = sizes["text/layers.0.self_attn"], sizes["text/layers.0.mlp"]
        units = [0, *[attn, mlp] * text.layers, sizes["text/norm"], *heads, 0]
        rows = 1 if decode else workload.prompt_tokens
        x = buffers.residual(model, rows, text.hidden).size_bytes
        kv = buffers.kv_cache(model, workload.context_tokens).size_bytes
        behind = 0 if decode or not problem.on_cpu else self._unfilled()
        hidden, logits = buffers.hidden(model).size_bytes, buffers.logits(model).size_bytes
        found = Bare(kinds, [()] * len(kinds), units, [], [], [0] * len(kinds), [])
        layers = text.layers if decode else 0
        for kind in kinds:
            layers += kind == "self_attn" and not decode
            # without decode nobody reads a layer's keys and values again
            alive = layers if self.repeats else int(kind == "self_attn")
            live = alive * kv + (x if kind not in ("lm_head", "sample") else 0)
            live += hidden if kind in ("norm", "lm_head") else 0
            live += logits if kind in ("lm_head", "sample") else 0
            found.live.append(live)
            found.unwritten.append(alive * behind)
            found.passing.append(0 if self.repeats else alive * (kv - behind))
        return found

    def _unfilled(self) -> int:
        """Bytes of one layer's KV cache that prefill does not write."""
        model, workload = self.problem.model, self.problem.workload
        whole = buffers.kv_cache(model, workload.context_tokens).size_bytes
        row = 2 * model.text.kv_heads * model.text.head_dim * self.problem.costs.element
        return whole - workload.prompt_tokens * row

    def _own(self, found: Sequence[frozenset[int]]) -> set[int]:
        layers = self.problem.model.text.layers
        attn, mlp, head = found
        first_head = 2 * layers + 2
        norm = {first_head - 1}
        return norm.union(
            (2 * i + 1 for i in attn), (2 * i + 2 for i in mlp), (first_head + i for i in head)
        )

    def totals(self, vocabulary_rows: int) -> tuple[int, int, int]:
        """Attention halves, MLP halves and lm_head tiles of the language model."""
        layers = self.problem.model.text.layers
        return layers, layers, len(self.bare_text(True, vocabulary_rows).kinds) - 2 * layers - 3

    def _prefill(
        self, residency: PhaseResidency, within: PhaseResidency, depth: int, vocabulary_rows: int
    ) -> Frame:
        """Steps and jobs are counted from the end of the vision tower."""
        bare, totals = self.bare_text(False, vocabulary_rows), self.totals(vocabulary_rows)
        own = self._own(residency.positions(totals, within))
        weights = _Weights(self.problem, bare)
        count = len(bare.kinds)
        for unit in sorted(own):
            weights.own(unit, -1, unit, count if self.repeats else unit + 1)
        streamed = [need for need in range(count) if bare.units[need] and need not in own]
        pinned = self.pinned(within, vocabulary_rows)
        weights.streamed(streamed, depth, again_from=count, pinned=pinned)
        return weights.frame()

    @cached_property
    def prefill_bare(self) -> Frame:
        """Prefill without weights; what is held in attention and MLP halves does not depend on the rows of lm_head tiles."""
        return _Weights(
            self.problem, self.bare_text(False, self.problem.model.text.vocabulary)
        ).frame()

    def _pinned(self, residency: PhaseResidency, vocabulary_rows: int) -> frozenset[int]:
        """Steps of the loop whose units stay in pinned host memory."""
        if not self.repeats or not self.problem.pinned_bytes:
            return frozenset()
        bare = self.bare_text(True, vocabulary_rows)
        own = self._own(residency.positions(self.totals(vocabulary_rows)))
        streamed = [need for need, size in enumerate(bare.units) if size and need not in own]
        sizes = tuple(bare.units[need] for need in streamed)
        return frozenset(streamed[i] for i in pinned(sizes, self.problem.pinned_bytes))

    def _decode(
        self, residency: PhaseResidency, prefill: PhaseResidency, depth: int, vocabulary_rows: int
    ) -> Frame:
        """The loop's body."""
        bare, totals = self.bare_text(True, vocabulary_rows), self.totals(vocabulary_rows)
        own = self._own(residency.positions(totals))
        before = self._own(prefill.positions(totals, residency))
        weights = _Weights(self.problem, bare)
        count = len(bare.kinds)
        for unit in sorted(own):
            weights.own(unit, -1, unit, count, again=True, brought=unit in before)
        streamed = [need for need in range(count) if bare.units[need] and need not in own]
        pinned = self.pinned(residency, vocabulary_rows)
        weights.streamed(streamed, depth, again_from=0, looped=True, pinned=pinned)
        return weights.frame()

    def _looped(
        self, residency: PhaseResidency, prefill: PhaseResidency, depth: int, tiles: Tiles
    ) -> Loop:
        frame = self.decode(residency, prefill, depth, tiles.vocabulary_rows)
        steps = self.seconds("decode", frame.bare, tiles)
        return loop(steps, frame.jobs, self.repeats, self.problem.costs.beside)

    # --- tiles --------------------------------------------------------------------------------------------------

    def seconds(self, phase: str, bare: Bare, tiles: Tiles) -> list[float]:
        """Seconds of each step."""
        head_rows = min(tiles.vocabulary_rows, self.problem.model.text.vocabulary)
        known: dict[tuple[Kind, tuple[int, ...]], float] = {}
        for key in zip(bare.kinds, bare.images, strict=True):
            if key not in known:
                kind, images = key
                known[key] = self.problem.seconds(kind, phase, tiles, images, head_rows)
        return [known[key] for key in zip(bare.kinds, bare.images, strict=True)]

    def scratch(self, phase: str, bare: Bare, tiles: Tiles) -> dict[Kind, tuple[int, int]]:
        """Of each kind of step its scratch (one buffer for all groups) and its largest blocks outside the arena."""
        most: dict[Kind, tuple[int, int]] = {}
        for kind, images in dict.fromkeys(zip(bare.kinds, bare.images, strict=True)):
            size, outside = self.problem.taken(kind, phase, tiles, images)  # type: ignore[arg-type]
            known = most.get(kind, (0, 0))
            most[kind] = max(known[0], size), max(known[1], outside)
        return most

    def live(self, phase: str, frame: Frame, tiles: Tiles) -> list[int]:
        """Arena bytes alive at each step."""
        scratch = self.scratch(phase, frame.bare, tiles)
        pairs = zip(frame.live, frame.bare.kinds, strict=True)
        return [live + scratch[kind][0] for live, kind in pairs]

    def held(self, phase: Phase, frame: Frame, tiles: Tiles) -> int:
        """The most bytes held at a step: of the arena, and on the CPU of its blocks outside it."""
        scratch, taken = self.scratch(phase, frame.bare, tiles), self.problem.taken
        if not self.problem.on_cpu:
            return max((base + scratch[kind][0] for kind, base in frame.base.items()), default=0)
        return max(
            (
                held + scratch[before][0] + taken(kind, phase, tiles, images)[1]
                for (before, kind, images), held in frame.still.items()
            ),
            default=0,
        )


class _Weights:
    """Collects the copies of a part and what they hold."""

    def __init__(self, problem: Problem, bare: Bare) -> None:
        self.costs, self.cached = problem.costs, problem.cached
        self.by_pages = problem.on_cpu
        self.known: dict[tuple[int, bool, bool], float] = {}
        self.bare = bare
        self.change = [0] * (len(bare.kinds) + 1)
        self.slack = [0] * (len(bare.kinds) + 1)  # of staging slots, beyond the unit in them
        self.found: list[tuple[int, Job, int, bool]] = []

    def _cost(self, size: int, *, again: bool, fresh: bool) -> float:
        """Seconds of a copy."""
        key = (size, again, fresh)
        known = self.known.get(key)
        if known is None:
            known = self.costs.copy(size, first=not again, cached=self.cached, fresh=fresh)
            self.known[key] = known
        return known

    def own(
        self,
        need: int,
        after: int,
        unit: int,
        death: int,
        *,
        again: bool = False,
        brought: bool = False,
    ) -> None:
        size = self.bare.units[unit]
        self.change[after + 1] += size
        self.change[death] -= size
        if not brought:
            cost = self._cost(size, again=again, fresh=True)
            self.found.append((need, Job(need, after, cost, False, again), size, True))

    def streamed(
        self,
        needs: Sequence[int],
        depth: int,
        *,
        again_from: int,
        looped: bool = False,
        pinned: frozenset[int] = frozenset(),
    ) -> None:
        units, change, slack = self.bare.units, self.change, self.slack
        slots = [0] * depth
        found = list(refills(needs, depth, loop=looped))
        for need, (slot, _, _) in zip(needs, found, strict=True):
            if units[need] > slots[slot]:
                slots[slot] = units[need]
        if looped:
            change[0] += sum(slots)
            slack[0] += sum(slots)
        filled = [0] * depth
        for need, (slot, start, wraps) in zip(needs, found, strict=True):
            size, after = units[need], -1 if start is None or wraps else start
            # a slot's pages are new to its first unit; in a loop that is one of many
            again, fresh = need >= again_from, not looped and not filled[slot]
            if size > filled[slot]:
                if looped:
                    slack[after + 1] -= size - filled[slot]
                filled[slot] = size
            if not looped:
                change[after + 1] += slots[slot]
                change[need + 1] -= slots[slot]
                slack[after + 1] += slots[slot] - filled[slot]
                slack[need + 1] -= slots[slot] - filled[slot]
            cost = self._cost(size, again=again, fresh=fresh)
            if need in pinned:
                costs = self.costs
                cost = costs.from_host(size) if looped else cost + costs.pin(size)
            job = Job(need, -1 if start is None else start, cost, wraps)
            self.found.append((need, job, size, False))

    def frame(self) -> Frame:
        self.found.sort(key=itemgetter(0))
        bare, change = self.bare, accumulate(self.change)
        live = [size + beside for size, beside in zip(change, bare.live, strict=False)]
        held = live  # a card holds the arena whole
        if self.by_pages:
            less = zip(live, accumulate(self.slack), bare.unwritten, strict=False)
            held = [size - slack - unwritten for size, slack, unwritten in less]
        return Frame(
            bare,
            [job for _, job, _, _ in self.found],
            [size for _, _, size, _ in self.found],
            [number for number, (_, _, _, own) in enumerate(self.found) if own],
            live,
            held,
        )
