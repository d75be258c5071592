"""The canonical space of a request, taken apart from coarse to fine, each part with a lower bound on its seconds.

    Root      staging depth x lm_head tiles
    ├─ Decoding  residents of decode: for so many MLP halves and lm_head tiles the most attention halves that fit
    │  └─ Filling   the cap on kernels' blocks outside the arena; residents of prefill, likewise, beside its tiles
    │     └─ Setting   the vision tower's residents and the order of phases: every lever set

A bound never exceeds the seconds of any setting below it, so that the first setting that a search in order of bounds
has worked out in full is the fastest.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from operator import le
from typing import NamedTuple

from planner.bounds import Bounds
from planner.footprint import Footprint
from planner.fronts import (
    START,
    VOCABULARY_ROWS,
    Option,
    Options,
    Taken,
    caps,
    fastest,
    fastest_held,
    least_seconds,
    prefill_options,
    vision_options,
)
from planner.parts import Frame, Parts
from planner.plan.program import Outside
from planner.plan.tiles import Tiles
from planner.plan.words import Kind, Order, Phase
from planner.problem import Problem
from planner.queues import Beside, line
from planner.schedule import Anchor, Choice, PhaseResidency, spread
from planner.stack import TALL, UNLIMITED, Decoding, Root, Stack, head_tiles, residency_of
from planner.worked import both, early_starts

ANCHORS: tuple[Anchor, ...] = ("late", "early", "middle")
DEPTHS = (1, 2, 3)
GB = 10**9
VISION_SHARES = 2  # residents of the vision tower are counted in halves of it


Blocks = tuple[tuple[Outside, ...], ...]  # outside the arena, of each group of images
Alike = tuple[Blocks, list[Option]]  # options with equal blocks, the fastest first


class Filling(NamedTuple):
    """Residents of prefill among those of decode; `anchor` None: not worked out yet, nor under which cap on bytes outside the arena."""

    decoding: Decoding
    attn: int
    mlp: int
    head: int
    anchor: Anchor | None = None
    cap: float = UNLIMITED

    def residency(self) -> PhaseResidency:
        return residency_of(self.attn, self.mlp, self.head, self.anchor or "late")


@dataclass(frozen=True, eq=False)
class Tower:
    """A setting of the vision tower, and its seconds where nothing else is under way; both kinds with what its tiles add to the start."""

    together: bool
    residency: PhaseResidency
    tiles: dict[str, int]
    frame: Frame
    seconds: tuple[float, float]
    compute_seconds: float

    @property
    def copy_seconds(self) -> float:
        return self.frame.copy_seconds


@dataclass(frozen=True, eq=False)
class Prompt:
    """A setting of prefill: seconds alone, and at least with its residents there already, with what its tiles add to the `start`."""

    tiles: dict[str, int]
    frame: Frame
    steps: list[float]
    start: float
    seconds_filled: float
    resident_copy_seconds: float
    beside: Beside

    @cached_property
    def seconds(self) -> tuple[float, float]:
        patient, other = both(self.steps, self.frame.jobs, self.beside)
        return self.start + patient, self.start + other


class Space:
    """The canonical space of one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.parts = problem, Parts(problem)
        self.repeats = self.parts.repeats
        self.prefill = prefill_options(problem)
        images = len(problem.workload.images)
        self.modes = [True, False] if images > 1 else [True]
        self.vision = {
            together: vision_options(problem, self.parts.groups(together))
            for together in self.modes
        }
        self.caps = caps(problem, self.prefill, *self.vision.values())
        options = [self.prefill, *self.vision.values()]
        self.footprint = Footprint(problem, self.parts, options)
        self.prompt_compute = least_seconds(self.prefill, self.caps[0])
        self.towers = lru_cache(maxsize=None)(self._towers)
        self.stack = lru_cache(maxsize=None)(Stack)
        self.points = lru_cache(maxsize=None)(self._points)
        self.prompt = lru_cache(maxsize=None)(self._prompt)
        self.prompted = lru_cache(maxsize=None)(self._prompted)
        self.tower_live = lru_cache(maxsize=None)(self._tower_live)
        self.tower_held = lru_cache(maxsize=None)(self._tower_held)
        self.text_peaks = lru_cache(maxsize=4096)(self._text_peaks)
        self.loaded = lru_cache(maxsize=None)(self._loaded)
        self.by_blocks = lru_cache(maxsize=None)(self._by_blocks)
        self.bounds = Bounds(self)
        layers = problem.model.text.layers
        # as many slots as units of a class may stage all of them
        self.short = layers <= max(DEPTHS)
        self.anchors: tuple[Anchor, ...] = ("early",) if layers > TALL else ANCHORS
        # new pages for a resident take longer to clear than it saves: as few as may be count too, not only as many as fit
        saved = self.repeats * self.copied(GB, first=False)
        self.dear = problem.costs.touch(GB) > saved
        self.ways = lru_cache(maxsize=None)(self._ways)

    def _ways(self, attn: int, mlp: int, among: tuple[int, int]) -> list[Anchor]:
        """The anchors that differ for so many residents among so many."""
        if attn in (0, among[0]) and mlp in (0, among[1]):
            return [ANCHORS[0]]
        ways: dict[tuple[frozenset[int], frozenset[int]], Anchor] = {}
        for anchor in self.anchors:
            ways.setdefault((spread(attn, among[0], anchor), spread(mlp, among[1], anchor)), anchor)
        return list(ways.values())

    def options(self, phase: Phase, together: bool) -> Options:
        """The tiles of a phase, of each kind of step that has some to choose."""
        if phase == "decode":
            return {}
        return self.vision[together] if phase == "vision" else self.prefill

    def started(self, options: Options, tiles: Mapping[str, int]) -> float:
        """By how many seconds these tiles of a phase start the run later than those that start it soonest."""
        chosen = ({key: tiles[key] for key in found[0].tiles} for found in options.values())
        return sum(
            next(o.start for o in found if o.tiles == mine)
            for found, mine in zip(options.values(), chosen, strict=True)
        )

    def start(self, tiles: Tiles) -> float:
        """The same of all tiles; products that two kinds of steps share are made once."""
        return self.problem.start_s(tiles) - self.soonest

    @cached_property
    def soonest(self) -> float:
        """Seconds of the start with the tiles that start soonest, of each kind alone."""
        options = {**self.prefill, **self.vision[self.modes[0]]}
        tiles = {key: value for found in options.values() for key, value in found[0].tiles.items()}
        rows = self.vocabulary_rows()[0]
        chosen = START.model_copy(update=tiles | {"vocabulary_rows": rows})
        return (
            self.problem.start_s(chosen)
            - self.started(options, tiles)
            - self.stack(self, rows).start
        )

    def copied(self, size_bytes: float, *, first: bool) -> float:
        """At least so many seconds does a copy of so many bytes take."""
        problem, size = self.problem, max(int(size_bytes), 0)
        pinned = 0 if first else min(size, problem.pinned_bytes)
        seconds = problem.costs.from_host(pinned) if pinned else 0.0
        if size > pinned or not pinned:
            seconds += problem.costs.copy(size - pinned, first=first, cached=problem.cached)
        return seconds

    # --- roots ----------------------------------------------------------------------------------------------------

    def vocabulary_rows(self) -> list[int]:
        """Rows of an lm_head tile that may be."""
        problem = self.problem
        text, pinned = problem.model.text, problem.request.tiles
        choices = VOCABULARY_ROWS if pinned is None else (pinned.vocabulary_rows,)
        row = text.hidden * problem.costs.element
        rows = [min(r, text.vocabulary) for r in choices]
        rows = [r for r in rows if r * row <= problem.profile.max_tensor_bytes]
        return list(dict.fromkeys(rows))

    def roots(self, less: int = 0) -> Iterator[tuple[float, Root]]:
        """All combinations of staging depth and lm_head rows, with their bounds."""
        for depth, rows in product(DEPTHS, self.vocabulary_rows()):
            root = Root(depth, rows, less)
            stack = self.stack(self, rows)
            room = self.room(root, self.caps[-1]) - stack.fixed_decode
            streamed = max(stack.total - room, 0) if self.repeats else 0
            if room >= 0:
                everything = stack.layers, stack.layers
                rest = stack.rest_bound(depth, streamed)
                yield self.bounds.decoding(root, streamed, rest, everything), root

    def room(self, root: Root, cap: float) -> float:
        """Bytes of the arena (on the CPU: of all that is held at a step) under a cap on bytes outside it."""
        return self.footprint.room(cap) - root.less

    def fitting(
        self, options: Options, frame: Frame, room: float, cap: float, fixed: Taken | None = None
    ) -> dict[str, int] | None:
        """The fastest tiles of a part with which all its steps have room; None where there are none."""
        if self.problem.on_cpu:
            return fastest_held(options, frame.still, room, fixed)
        if fixed and any(
            base + fixed[kind][0] > room for kind, base in frame.base.items() if kind in fixed
        ):
            return None
        return fastest(options, frame.base, room, cap)

    # --- vision ---------------------------------------------------------------------------------------------------

    def _towers(self, depth: int, cap: float, room: float) -> list[Tower]:
        """Settings of the vision tower that fit, the fastest first."""
        if not self.problem.workload.images:
            frame = self.parts.vision(True, PhaseResidency(0, 0), depth, False)
            return [Tower(True, PhaseResidency(0, 0), {}, frame, (0.0, 0.0), 0.0)]
        found: dict[tuple[object, ...], Tower] = {}
        tall = self.problem.model.vision.depth > TALL
        for together, options in self.vision.items():
            for residency in self.vision_residencies(together):
                frame = self.parts.vision(together, residency, depth, False)
                # blocks of several sizes may take more than the largest: the prompt's tiles and these need not share a cap
                for mine in (cap,) if tall else self.caps:
                    tiles = self.fitting(options, frame, room, mine)
                    key = together, residency, *(tiles or {}).values()
                    if tiles is None or key in found:
                        continue
                    steps = self.parts.seconds("vision", frame.bare, START.model_copy(update=tiles))
                    start = self.started(options, tiles)
                    patient, other = both(steps, frame.jobs, self.problem.costs.beside)
                    seconds = start + patient, start + other
                    compute = start + sum(steps)
                    found[key] = Tower(together, residency, tiles, frame, seconds, compute)
        towers = list(found.values())
        # of equally fast ones that which stages least
        towers.sort(key=lambda t: -t.residency.attn - t.residency.mlp)
        towers.sort(key=lambda t: float(f"{min(t.seconds):.8e}"))
        return towers

    def vision_residencies(self, together: bool) -> list[PhaseResidency]:
        """How many attention and MLP halves may be resident, spread in each way."""
        blocks = self.problem.model.vision.depth
        step = max(blocks // VISION_SHARES, 1)
        counts = sorted({*range(0, blocks + 1, step), blocks})
        found = []
        once = together and blocks > TALL  # every unit is used once
        for attn, mlp in zip(counts, counts, strict=True) if once else product(counts, counts):
            anchors = self.ways(attn, mlp, (blocks, blocks))
            found += [PhaseResidency(attn, mlp, 0, anchor) for anchor in anchors]
        return found

    # --- decode ---------------------------------------------------------------------------------------------------

    def decodings(self, root: Root) -> Iterator[tuple[float, Decoding]]:
        """Residents of decode with their bounds; of attention halves the most that may fit."""
        stack = self.stack(self, root.vocabulary_rows)
        layers, everything = stack.layers, stack.head_numbers[-1]
        if not self.repeats:
            yield self._decoding(root, layers, layers, everything)
            return
        for mlp in range(layers, -1, -1):
            if (yield from self._fewer_heads(root, mlp, everything)) == everything:
                break  # fewer MLP halves would only leave room
        if self.dear:
            yield self._decoding(root, 0, 0, 0)

    def _fewer_heads(
        self, root: Root, mlp: int, most: int
    ) -> Generator[tuple[float, Decoding], None, int | None]:
        """With so many MLP halves; the set of lm_head tiles beside which all attention halves may fit, if any."""
        stack = self.stack(self, root.vocabulary_rows)
        room = self.room(root, self.caps[-1]) - stack.fixed_decode
        for head in reversed(stack.head_numbers):
            if head > most:
                continue
            attn = stack.most_attn(root.depth, room, mlp, head, stack.layers)
            if attn is not None:
                yield self._decoding(root, attn, mlp, head)
                if attn == stack.layers:
                    return head  # fewer lm_head tiles would only leave room
        return None

    def _fewer_others(self, root: Root, mlp: int, head: int) -> Iterator[tuple[float, Decoding]]:
        """What was left out because all attention halves might fit beside so many others, which they do not after all."""
        everything = self.stack(self, root.vocabulary_rows).head_numbers[-1]
        yield from self._fewer_heads(root, mlp, head - 1)
        while head == everything and mlp:
            mlp -= 1
            if (yield from self._fewer_heads(root, mlp, everything)) == everything:
                break

    def _decoding(self, root: Root, attn: int, mlp: int, head: int) -> tuple[float, Decoding]:
        stack = self.stack(self, root.vocabulary_rows)
        streamed = stack.streamed(attn, mlp, head)
        rest = stack.rest_bound(root.depth, streamed, attn, mlp, head)
        bound = self.bounds.decoding(root, streamed, rest, (attn, mlp))
        return bound, Decoding(root, attn, mlp, head)

    def worked_decodings(self, decoding: Decoding) -> Iterator[tuple[float, Decoding]]:
        """The same residents spread in each way, with the exact seconds of their loop; and fewer, where that admits more."""
        root, (_, attn, mlp, head, _) = decoding.root, decoding
        if not self.repeats:
            yield self._decoding(root, attn, mlp, head)[0], decoding._replace(anchor="late")
            return
        stack = self.stack(self, root.vocabulary_rows)
        least, most = self.room(root, self.caps[0]), self.room(root, self.caps[-1])
        fitting = False
        while not fitting:
            left = 2 * stack.layers + stack.heads - attn - mlp - head_tiles(head)[0]
            streamed = stack.streamed(attn, mlp, head)
            everywhere = True  # it fits under the largest cap too
            for anchor in self.ways(attn, mlp, (stack.layers, stack.layers)):
                anchored = Decoding(root, attn, mlp, head, anchor)
                peak = stack.decode_peak(anchored.residency(), root.depth, most)
                # with as many slots as units they could as well be resident
                if peak <= most and (not left or left > root.depth):
                    fitting = True
                    rest = self.rest(anchored, None)
                    yield self.bounds.decoding(root, streamed, rest, (attn, mlp)), anchored
                everywhere &= peak <= least
            if attn == stack.layers and not (fitting and everywhere):
                yield from self._fewer_others(root, mlp, head)
            if not attn:
                return
            attn -= 1
        if not everywhere:
            yield self._decoding(root, attn, mlp, head)

    def rest(
        self, decoding: Decoding, filling: Filling | None, prompt: Prompt | None = None
    ) -> float:
        """Seconds of decode, exactly; at least so many where the prompt's tiles, whose heads it shares, are not known."""
        if not self.repeats:
            return 0.0
        residency = decoding.residency()
        before = filling.residency() if filling else residency
        tiles = self.stack(self, decoding.root.vocabulary_rows).fastest
        if prompt:
            tiles = tiles.model_copy(update={"prompt_heads": prompt.tiles["prompt_heads"]})
        return self.parts.looped(residency, before, decoding.root.depth, tiles).seconds(
            self.repeats
        )

    def estimate(self, room: int) -> tuple[float, int] | None:
        """(seconds, bytes) of the least bound of all settings with so much room, and what it fills of that; None where none fits."""
        best: tuple[float, int] | None = None
        for depth, rows in product(DEPTHS, self.vocabulary_rows()):
            root, stack = Root(depth, rows), self.stack(self, rows)
            left = room - stack.fixed_decode
            for mlp, head in product(range(stack.layers + 1), (0, stack.head_numbers[-1])):
                attn = stack.most_attn(depth, left, mlp, head, stack.layers)
                if attn is None:
                    continue
                bound, _ = self._decoding(root, attn, mlp, head)
                if best is None or bound < best[0]:
                    peak = stack.decode_peak(residency_of(attn, mlp, head, "late"), depth)
                    best = bound, min(peak, room)
        return best

    # --- prefill --------------------------------------------------------------------------------------------------

    def _points(self, cap: float) -> list[tuple[int, float]]:
        """(bytes, seconds) of the prompt's tiles: more bytes, fewer seconds."""
        points: list[tuple[int, float]] = []
        for size, seconds in sorted(self._prompt_sizes(cap)):
            if not points or seconds < points[-1][1]:
                points.append((size, seconds))
        return points

    def _prompt_sizes(self, cap: float) -> Iterator[tuple[int, float]]:
        """(bytes, seconds) of combinations of prompt tiles: at least so many are held beside what is there without weights."""
        found = [[o for o in each if o.outside <= cap] for each in self.prefill.values()]
        if not self.problem.on_cpu:
            for size in {o.bytes for each in found for o in each}:
                within = [[o.seconds for o in each if o.bytes <= size] for each in found]
                if all(within):
                    yield size, sum(map(min, within))
            return
        frame = self.parts.prefill_bare
        beside = self.stack(self, self.vocabulary_rows()[0]).most_prefill
        kinds = list(self.prefill)
        for chosen in product(*found):
            option = dict(zip(kinds, chosen, strict=True))
            size = max(
                held + option[before].bytes + option[kind].outside
                for (before, kind, _), held in frame.still.items()
                if before in option and kind in option
            )
            yield size - beside, sum(o.seconds for o in chosen)

    def fillings(self, decoding: Decoding) -> Iterator[tuple[float, Filling]]:
        """For each cap and choice of prompt tiles: residents of prefill, of attention halves the most that may fit; with bounds."""
        root = decoding.root
        stack = self.stack(self, root.vocabulary_rows)
        rest = self.rest(decoding, None)
        peak = stack.decode_peak(decoding.residency(), root.depth) if self.repeats else 0
        if self.short:
            fewer = [
                n
                for n in stack.head_numbers
                if n <= decoding.head and (decoding.head % 2 or n % 2 == 0)
            ]
            compute, cap = self.prompt_compute, self.caps[0]
            for residents in product(range(decoding.attn + 1), range(decoding.mlp + 1), fewer):
                bound = self.bounds.filling(decoding, residents, compute, cap, rest)
                yield bound, Filling(decoding, *residents)
            return
        found: dict[tuple[int, int, int], float] = {}
        for cap in self.caps:
            room = self.room(root, cap)
            if peak > room:
                continue
            for size, seconds in reversed(self.points(cap)):
                keys = list(stack.fillings(decoding, room - stack.fixed_prefill - size))
                if self.dear:
                    keys.append((0, 0, 0))
                for key in keys:
                    bound = self.bounds.filling(decoding, key, seconds, cap, rest)
                    found[key] = min(found.get(key, UNLIMITED), bound)
                if decoding[1:4] in keys:
                    break  # everything stays: slower tiles bring nothing
        for key, bound in found.items():
            yield bound, Filling(decoding, *key)

    def worked_fillings(self, filling: Filling) -> Iterator[tuple[float, Filling]]:
        """The same residents spread in each way, under each cap, with the fastest prompt tiles that fit and exact seconds; and fewer residents where some cap admits none, or slower tiles than without."""
        decoding, root = filling.decoding, filling.decoding.root
        everywhere = True
        stack = self.stack(self, root.vocabulary_rows)
        peak = stack.decode_peak(decoding.residency(), root.depth) if self.repeats else 0
        for anchor in self.ways(*filling[1:3], decoding[1:3]):
            seen: set[tuple[int, ...]] = set()
            # with equal tiles a smaller cap leaves more room
            for cap in reversed(self.caps):
                if peak > self.room(root, cap):
                    break
                anchored = filling._replace(anchor=anchor, cap=cap)
                towers = self.towers(root.depth, cap, self.room(root, cap))
                prompt = self.prompt(anchored)
                if prompt is None or not towers:
                    everywhere = everywhere and not towers
                    continue
                if stack.lax and prompt.tiles != self.quickest(cap):
                    everywhere = False
                key = (*towers[0].tiles.values(), *prompt.tiles.values())
                if key in seen:
                    continue
                seen.add(key)
                images = self.problem.workload.images
                front = self._joined(towers, prompt) if images else min(prompt.seconds)
                yield front + self.rest(decoding, anchored, prompt), anchored
        if everywhere or self.short or not filling.attn + filling.mlp:
            return
        fewer = (filling.attn - 1, filling.mlp, filling.head)
        if not filling.attn:
            fewer = (decoding.attn, filling.mlp - 1, filling.head)
        compute, rest = self.prompt_compute, self.rest(decoding, None)
        bound = self.bounds.filling(decoding, fewer, compute, self.caps[0], rest)
        yield bound, Filling(decoding, *fewer)

    def quickest(self, cap: float) -> dict[str, int] | None:
        """The fastest prompt tiles where room is no matter."""
        return fastest(self.prefill, dict.fromkeys(self.prefill, 0), UNLIMITED, cap)

    def _prompt(self, filling: Filling) -> Prompt | None:
        root = filling.decoding.root
        residency, within = filling.residency(), filling.decoding.residency()
        frame = self.parts.prefill(residency, within, root.depth, root.vocabulary_rows)
        stack = self.stack(self, root.vocabulary_rows)
        room = self.room(root, filling.cap)
        tiles = self.fitting(self.prefill, frame, room, filling.cap, stack.prefill_taken)
        if tiles is None:
            return None
        return self.prompted(frame, root.vocabulary_rows, tuple(tiles.items()))

    def _prompted(
        self, frame: Frame, vocabulary_rows: int, tiles: tuple[tuple[str, int], ...]
    ) -> Prompt:
        chosen = self.stack(self, vocabulary_rows).tiles.model_copy(update=dict(tiles))
        steps = self.parts.seconds("prefill", frame.bare, chosen)
        early = set(frame.early)
        # what is staged keeps its order
        staged = [job for number, job in enumerate(frame.jobs) if number not in early]
        beside = self.problem.costs.beside
        least = beside.least(sum(steps), sum(job.seconds for job in staged), len(steps))
        start = self.started(self.prefill, dict(tiles)) + self.stack(self, vocabulary_rows).start
        return Prompt(
            dict(tiles),
            frame,
            steps,
            start,
            start + max(line(steps, staged)[0][-1], least),
            sum(frame.jobs[number].seconds for number in early),
            beside,
        )

    # --- settings -------------------------------------------------------------------------------------------------

    def towers_of(self, filling: Filling) -> list[Tower]:
        """Those that fit beside nothing, the fastest first."""
        root = filling.decoding.root
        return self.towers(root.depth, filling.cap, self.room(root, filling.cap))

    def orders(self, filling: Filling, number: int) -> Iterator[tuple[float, Order]]:
        """Orders of phases with the tower of that number (the fastest is 0), and their bounds; the plain order's is exact, the others' hold for slower towers too."""
        towers = self.towers_of(filling)
        if number >= len(towers):
            return
        tower, prompt = towers[number], self.prompt(filling)
        assert prompt is not None
        rest = self.rest(filling.decoding, filling, prompt)
        yield (
            min(v + p for v, p in zip(tower.seconds, prompt.seconds, strict=True)) + rest,
            "vision_then_llm",
        )
        if not self.problem.workload.images or not filling.attn + filling.mlp + filling.head:
            return
        yield self._joined(towers[number:], prompt) + rest, "prefetch"
        compute = min(t.compute_seconds for t in towers[number:])
        yield prompt.resident_copy_seconds + compute + prompt.seconds_filled + rest, "all_first"

    def _joined(self, towers: Sequence[Tower], prompt: Prompt) -> float:
        """Vision by one of these towers, the fastest first, and prefill take at least so long where weights of one come beside the other."""
        compute = min(t.compute_seconds for t in towers) + sum(prompt.steps) + prompt.start
        copied = min(tower.copy_seconds for tower in towers) + prompt.frame.copy_seconds
        steps = max(len(tower.frame.bare.units) for tower in towers) + len(prompt.steps)
        together = self.problem.costs.beside.least(compute, copied, steps)
        return max(min(towers[0].seconds) + prompt.seconds_filled, together)

    def following(self, filling: Filling, number: int, order: Order, *, soon: bool = False) -> int:
        """The number of the next slower tower that may bring something where those up to that number do not fit, or have residents of prefill wait."""
        towers, prompt = self.towers_of(filling), self.prompt(filling)
        assert prompt is not None
        sizes = [prompt.frame.sizes[early] for early in prompt.frame.early]
        if order != "vision_then_llm" and self.problem.model.vision.depth > TALL and not soon:
            return number + 1  # there are few
        text = self.text_peaks(filling, prompt)
        known: list[tuple[Tower, int, list[int]]] = []
        for n, tower in enumerate(towers):
            if order == "vision_then_llm":
                peak, starts = max(text[1], self.tower_held(tower)), []
            elif order == "prefetch":
                live = self.tower_live(tower)
                peak = max(text[0], *live)
                starts = early_starts([peak - size for size in live], sizes)
            else:
                peak, starts = self.loaded(tower, filling.decoding.root.depth) + sum(sizes), []
                if peak > self.room(filling.decoding.root, filling.cap):
                    continue
            if n > number and not any(
                before.tiles == tower.tiles
                and size <= peak
                and (
                    order == "vision_then_llm"
                    or (
                        before.copy_seconds <= tower.copy_seconds
                        and before.compute_seconds <= tower.compute_seconds
                        and (not any(other) or before.together == tower.together)
                        and all(map(le, other, starts))
                    )
                )
                for before, size, other in known
            ):
                return n
            known.append((tower, peak, starts))
        return len(towers)

    def lacking(self, filling: Filling, choice: Choice) -> int:
        """How much less room these tiles leave than was thought; 0 where the closed form cannot tell."""
        limit = self.footprint.limit(choice)
        return (
            max(int(self.room(filling.decoding.root, filling.cap) - limit), 0)
            if limit < UNLIMITED
            else 0
        )

    def _text_peaks(self, filling: Filling, prompt: Prompt) -> tuple[int, int]:
        """The most arena bytes alive in prefill and decode, and the most held."""
        root = filling.decoding.root
        rows, parts = root.vocabulary_rows, self.parts
        tiles = self.stack(self, rows).tiles.model_copy(update=prompt.tiles)
        peak = max(parts.live("prefill", prompt.frame, tiles))
        held = parts.held("prefill", prompt.frame, tiles)
        if self.repeats:
            residents = filling.decoding.residency(), filling.residency()
            loop = parts.decode(*residents, root.depth, rows)
            peak = max(peak, *parts.live("decode", loop, tiles))
            held = max(held, parts.held("decode", loop, tiles))
        return peak, held

    def _tower_held(self, tower: Tower) -> int:
        return self.parts.held("vision", tower.frame, START.model_copy(update=tower.tiles))

    def _tower_live(self, tower: Tower) -> list[int]:
        """Arena bytes alive at each step of the tower."""
        return self.parts.live("vision", tower.frame, START.model_copy(update=tower.tiles))

    def _loaded(self, tower: Tower, depth: int) -> int:
        """The most bytes held where all the tower's residents come before the first step."""
        frame = self.parts.vision(tower.together, tower.residency, depth, True)
        return self.parts.held("vision", frame, START.model_copy(update=tower.tiles))

    def _by_blocks(self, phase: Phase, together: bool) -> dict[Kind, list[Alike]]:
        """Of each kind of step of vision or prefill its options, together where their blocks outside the arena are equal."""
        groups = self.parts.groups(together) if phase == "vision" else [()]
        found: dict[Kind, list[Alike]] = {}
        for kind, options in self.options(phase, together).items():
            alike: dict[Blocks, list[Option]] = {}
            for option in options:
                tiles = START.model_copy(update=dict(option.tiles))
                blocks = tuple(self.problem.outside(kind, phase, tiles, group) for group in groups)
                alike.setdefault(blocks, []).append(option)
            found[kind] = list(alike.items())
        return found

    def choice(self, filling: Filling, number: int, order: Order) -> Choice:
        """Every lever set."""
        decoding = filling.decoding
        root = decoding.root
        tower, prompt = self.towers_of(filling)[number], self.prompt(filling)
        assert prompt is not None
        tiles = self.stack(self, root.vocabulary_rows).tiles
        prefill = filling.residency()
        return Choice(
            order,
            tower.together,
            root.depth,
            tower.residency,
            prefill,
            decoding.residency() if self.repeats else prefill,
            tiles.model_copy(update=tower.tiles | prompt.tiles),
        )
