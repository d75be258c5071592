"""A setting of the levers in three parts (vision, prefill, decode), worked out by index: seconds and live bytes, without names.

The same program as `planner.schedule` writes, as numbers: of each part the seconds of its steps, its copies as jobs,
and the arena bytes alive at each step. With vision before the language model the parts do not overlap, so that a
setting's seconds are the sum of theirs and its live bytes one list behind another. Each part is computed once per
setting of the levers it depends on. Tests hold it against the program, its graph and its timeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from planner import buffers
from planner.plan import Kind, Phase, Tiles
from planner.problem import Problem
from planner.queues import Job, Loop, line, loop, queue
from planner.schedule import LOOKAHEAD, Choice, PhaseResidency, refills
from planner.workspace import peak_bytes


class Steps(NamedTuple):
    """A part without weights: of each step its seconds, its live bytes, its blocks outside the arena, and the size of its unit (0: none)."""

    seconds: list[float]
    live: list[int]
    outside: list[int]
    units: list[int]


@dataclass(frozen=True)
class Part:
    """A part with its weights. `jobs` by need; `sizes` of their units; `early`: the jobs that the order `prefetch` may bring before."""

    steps: Steps
    jobs: list[Job]
    sizes: list[int]
    early: list[int]
    live: list[int]

    @cached_property
    def peak(self) -> int:
        return max(self.live)

    @cached_property
    def peak_outside(self) -> int:
        return max(self.steps.outside)

    @cached_property
    def seconds(self) -> tuple[float, float]:
        """Alone, from both queues idle to the end of its last step: with a patient queue, and with another."""
        return seconds_of(self.steps.seconds, self.jobs)


def seconds_of(steps: Sequence[float], jobs: Sequence[Job]) -> tuple[float, float]:
    """With a patient queue, and with another."""
    if not steps:
        return 0.0, 0.0
    found: list[float] = []
    orders: list[list[int]] = []
    for patient in (True, False):
        order = queue(steps, jobs, patient=patient)
        if order in orders:
            return found[0], found[0]
        orders.append(order)
        found.append(line(steps, [jobs[number] for number in order])[0][-1])
    return found[0], found[1]


class Parts:
    """The parts of one problem's settings; remembers them."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.vision_steps = lru_cache(maxsize=None)(self._vision_steps)
        self.text_steps = lru_cache(maxsize=None)(self._text_steps)
        self.vision = lru_cache(maxsize=None)(self._vision)
        self.prefill = lru_cache(maxsize=None)(self._prefill)
        self.decode = lru_cache(maxsize=None)(self._decode)
        self.repeats = max(problem.workload.max_new_tokens - 1, 0)

    # --- vision -------------------------------------------------------------------------------------------------

    def groups(self, together: bool) -> list[tuple[int, ...]]:
        everything = tuple(range(len(self.problem.workload.images)))
        if not everything:
            return []
        return [everything] if together else [(i,) for i in everything]

    def _vision_steps(self, together: bool, tiles: Tiles) -> Steps:
        problem, model, workload = self.problem, self.problem.model, self.problem.workload
        shape, groups = model.vision, self.groups(together)
        sizes = problem.unit_sizes(model.text.vocabulary)
        block: list[tuple[Kind, int]] = []
        for index in range(shape.depth):
            full = index in shape.full_attention_blocks
            block.append(
                ("full_attn" if full else "window_attn", sizes[f"visual/blocks.{index}.attn"])
            )
            block.append(("vision_mlp", sizes[f"visual/blocks.{index}.mlp"]))
        kinds: list[tuple[Kind, int]] = [
            ("patch_embed", sizes["visual/patch_embed"]),
            *block,
            ("merger", sizes["visual/merger"]),
        ]
        out = buffers.residual(model, workload.prompt_tokens, model.text.hidden).size_bytes
        x = max(
            (
                buffers.residual(
                    model, sum(workload.images[i].patches for i in group), shape.hidden
                ).size_bytes
                for group in groups
            ),
            default=0,
        )
        scratch = {
            kind: max(
                (problem.scratch(kind, "vision", tiles, group).size_bytes for group in groups),
                default=0,
            )
            for kind in {kind for kind, _ in kinds}
        }
        found = Steps([], [], [], [])
        for number, group in enumerate(groups):
            for kind, size in kinds:
                held = out if number or kind == "merger" else 0
                found.seconds.append(problem.seconds(kind, "vision", tiles, group, 0))
                found.live.append(x + held + scratch[kind])
                found.outside.append(peak_bytes(problem.outside(kind, "vision", tiles, group)))
                found.units.append(size)
        return found

    def _vision(
        self, together: bool, residency: PhaseResidency, depth: int, first: bool, tiles: Tiles
    ) -> Part:
        """`first`: all residents come before the first step (the order `all_first`)."""
        steps = self.vision_steps(together, tiles)
        count, blocks = len(steps.seconds), self.problem.model.vision.depth
        if not count:
            return Part(steps, [], [], [], [])
        attn, mlp = residency.positions((blocks, blocks))[:2]
        per_group = 2 * blocks + 2
        own = {0, per_group - 1, *(2 * i + 1 for i in attn), *(2 * i + 2 for i in mlp)}
        weights = _Weights(self.problem, steps, count)
        for unit in sorted(own):
            after = -1
            if unit == per_group - 1 and not first:
                after = max(unit - 1 - LOOKAHEAD, -1)  # the merger need not wait in memory
            last = count - per_group + unit
            weights.own(0 if first else unit, after, unit, last + 1, again=False)
        streamed = [need for need in range(count) if need % per_group not in own]
        weights.streamed(streamed, depth, again_from=per_group)
        return weights.part()

    # --- text ---------------------------------------------------------------------------------------------------

    def _text_steps(self, phase: Phase, tiles: Tiles) -> Steps:
        problem, model, workload = self.problem, self.problem.model, self.problem.workload
        text, decode = model.text, phase == "decode"
        sizes = problem.unit_sizes(tiles.vocabulary_rows)
        heads = [size for unit, size in sizes.items() if unit.startswith("text/lm_head[")]
        rows = 1 if decode else workload.prompt_tokens
        head_rows = min(tiles.vocabulary_rows, text.vocabulary)
        x = buffers.residual(model, rows, text.hidden).size_bytes
        kv = buffers.kv_cache(model, workload.context_tokens).size_bytes
        hidden, logits = buffers.hidden(model).size_bytes, buffers.logits(model).size_bytes
        kinds: list[tuple[Kind, int]] = [("embed_tokens", 0)]
        for layer in range(text.layers):
            kinds.append(("self_attn", sizes[f"text/layers.{layer}.self_attn"]))
            kinds.append(("text_mlp", sizes[f"text/layers.{layer}.mlp"]))
        kinds.append(("norm", sizes["text/norm"]))
        kinds += [("lm_head", size) for size in heads]
        kinds.append(("sample", 0))
        scratch = {
            kind: problem.scratch(kind, phase, tiles, ()).size_bytes
            for kind in ("self_attn", "text_mlp")
        }
        found = Steps([], [], [], [])
        layers = text.layers if decode else 0
        for kind, size in kinds:
            if kind == "self_attn" and not decode:
                layers += 1
            live = (layers if self.repeats or kind == "self_attn" else 0) * kv
            if not self.repeats and kind == "self_attn":
                live = kv  # nobody reads it again
            live += x if kind not in ("lm_head", "sample") else 0
            live += scratch.get(kind, 0)
            live += hidden if kind in ("norm", "lm_head") else 0
            live += logits if kind in ("lm_head", "sample") else 0
            found.seconds.append(problem.seconds(kind, phase, tiles, (), head_rows))
            found.live.append(live)
            found.outside.append(peak_bytes(problem.outside(kind, phase, tiles, ())))
            found.units.append(size)
        return found

    def _own(self, found: Sequence[frozenset[int]]) -> set[int]:
        layers = self.problem.model.text.layers
        attn, mlp, head = found
        return {
            *(2 * i + 1 for i in attn),
            *(2 * i + 2 for i in mlp),
            2 * layers + 1,  # the norm
            *(2 * layers + 2 + i for i in head),
        }

    def _totals(self, steps: Steps) -> tuple[int, int, int]:
        layers = self.problem.model.text.layers
        return layers, layers, len(steps.units) - 2 * layers - 3

    def _prefill(
        self,
        residency: PhaseResidency,
        within: PhaseResidency,
        depth: int,
        tiles: Tiles,
    ) -> Part:
        """Steps are counted from the end of the vision tower."""
        steps = self.text_steps("prefill", tiles)
        count = len(steps.seconds)
        own = self._own(residency.positions(self._totals(steps), within))
        weights = _Weights(self.problem, steps, count)
        for unit in sorted(own):
            death = count if self.repeats else unit + 1
            weights.own(unit, -1, unit, death, again=False)
        streamed = [need for need in range(count) if steps.units[need] and need not in own]
        weights.streamed(streamed, depth, again_from=count)
        return weights.part()

    def _decode(
        self,
        residency: PhaseResidency,
        prefill: PhaseResidency,
        depth: int,
        tiles: Tiles,
    ) -> tuple[Loop, int]:
        """Seconds of the loop, and the most arena bytes alive in it."""
        steps = self.text_steps("decode", tiles)
        count, totals = len(steps.seconds), self._totals(steps)
        own = self._own(residency.positions(totals))
        before = self._own(prefill.positions(totals, residency))
        weights = _Weights(self.problem, steps, count)
        for unit in sorted(own):
            weights.own(unit, -1, unit, count, again=True, brought=unit in before)
        streamed = [need for need in range(count) if steps.units[need] and need not in own]
        weights.streamed(streamed, depth, again_from=0, looped=True)
        part = weights.part()
        return loop(steps.seconds, part.jobs, self.repeats), part.peak


class _Weights:
    """Collects the copies of a part and what they hold."""

    def __init__(self, problem: Problem, steps: Steps, count: int) -> None:
        self.costs, self.cached = problem.costs, problem.cached
        self.steps = steps
        self.change = [0] * (count + 1)
        self.found: list[tuple[Job, int, bool]] = []
        self.once = False

    def _job(self, need: int, after: int, size: int, again: bool, fresh: bool) -> Job:
        seconds = self.costs.copy(size, first=not again, cached=self.cached, fresh=fresh)
        return Job(need, after, seconds, self.costs.stolen(size, fresh=fresh))

    def own(
        self, need: int, after: int, unit: int, death: int, *, again: bool, brought: bool = False
    ) -> None:
        size = self.steps.units[unit]
        self.change[after + 1] += size
        self.change[death] -= size
        if not brought:
            job = self._job(need, after, size, again, True)
            self.found.append((job._replace(once=again), size, True))

    def streamed(
        self, needs: Sequence[int], depth: int, *, again_from: int, looped: bool = False
    ) -> None:
        slots = [0] * depth
        found = list(refills(needs, depth, loop=looped))
        for need, (slot, _, _) in zip(needs, found, strict=True):
            slots[slot] = max(slots[slot], self.steps.units[need])
        if looped:
            self.change[0] += sum(slots)
        touched: set[int] = set()
        for need, (slot, start, wraps) in zip(needs, found, strict=True):
            size, after = self.steps.units[need], -1 if start is None else start
            # a slot's pages are new to its first unit; in a loop that is one of many
            fresh = not looped and slot not in touched
            touched.add(slot)
            job = self._job(need, after, size, need >= again_from, fresh)
            self.found.append((job._replace(wraps=wraps), size, False))
            if not looped:
                self.change[after + 1] += slots[slot]
                self.change[need + 1] -= slots[slot]

    def part(self) -> Part:
        self.found.sort(key=lambda entry: entry[0].need)
        total, live = 0, []
        for change, held in zip(self.change, self.steps.live, strict=False):
            total += change
            live.append(total + held)
        jobs = [job for job, _, _ in self.found]
        sizes = [size for _, size, _ in self.found]
        early = [number for number, (_, _, own) in enumerate(self.found) if own]
        return Part(self.steps, jobs, sizes, early, live)


# --- the whole ----------------------------------------------------------------------------------------------------


class Worked(NamedTuple):
    """Seconds of a setting, the most arena bytes alive, and the most bytes outside the arena."""

    seconds: float
    live: int
    outside: int


def worked(parts: Parts, choice: Choice) -> Worked:
    """Seconds and bytes of one setting, exactly as its program and timeline have them."""
    first = choice.order == "all_first"
    vision = parts.vision(choice.images_together, choice.vision, choice.depth, first, choice.tiles)
    prefill = parts.prefill(choice.prefill, choice.decode, choice.depth, choice.tiles)
    rest, rest_live, rest_outside = 0.0, 0, 0
    if parts.repeats:
        found, rest_live = parts.decode(choice.decode, choice.prefill, choice.depth, choice.tiles)
        rest = found.seconds(parts.repeats)
        rest_outside = max(parts.text_steps("decode", choice.tiles).outside)
    live_ = [*vision.live, *prefill.live]
    outside = max([rest_outside, prefill.peak_outside, *vision.steps.outside])
    if choice.order == "vision_then_llm" or not (first or vision.live):
        pairs = zip(vision.seconds, prefill.seconds, strict=True)
        return Worked(min(v + p for v, p in pairs) + rest, max(rest_live, *live_), outside)
    count = len(vision.live)
    sizes = [prefill.sizes[number] for number in prefill.early]
    if first:
        starts = [0] * len(sizes)
    else:
        capacity = max(rest_live, *live_)
        starts = early_starts([capacity - held for held in vision.live], sizes)
    jobs = [job._replace(need=job.need + count, after=job.after + count) for job in prefill.jobs]
    change = [0] * (count + 1)
    for number, start, size in zip(prefill.early, starts, sizes, strict=True):
        need = 0 if first else jobs[number].need
        jobs[number] = jobs[number]._replace(need=need, after=start - 1)
        change[start] += size
    held = 0
    for index in range(count):
        held += change[index]
        live_[index] += held
    steps = [*vision.steps.seconds, *prefill.steps.seconds]
    together = [*vision.jobs, *jobs]
    together.sort(key=lambda job: job.need)
    seconds = min(seconds_of(steps, together))
    return Worked(seconds + rest, max(rest_live, *live_), outside)


def early_starts(free: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """From which step on each of these, arriving in this order, fits into the bytes that are free from there to the end."""
    room = list(free)
    for index in range(len(room) - 2, -1, -1):
        room[index] = min(room[index], room[index + 1])
    starts, start, held = [], 0, 0
    for size in sizes:
        held += size
        while start < len(room) and room[start] < held:
            start += 1
        starts.append(start)
    return starts
