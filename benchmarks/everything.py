"""Every setting of the levers of one small problem, the fastest first: what `optimality.py` holds the search against.

Every subset of the units resident in vision, in decode, and in prefill a subset of decode's, with every combination of
tiles, order of phases, staging depth and way of handling images. Nothing is taken from the search: the lower bounds on
seconds only add up what parts take alone. Three arguments shorten the list, and lose nothing:

- tiles that are slower and take no less of anything are left out (`planner.fronts`), and of one setting of all else
  slower tiles are looked at only where none of the faster ones fit;
- bytes are judged by the closed form (`planner.footprint`), which is never more than what a plan worked out in full has;
  where that says they fit, the plan is worked out in full;
- what is not below the seconds that are to be beaten by its lower bound is not timed.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import combinations, product
from operator import le
from typing import NamedTuple

from planner.evaluate import card_bound
from planner.footprint import SMALL_BYTES, STEP_BYTES
from planner.fronts import START, Option, Options
from planner.parts import Bare, Frame, both, early_starts
from planner.plan.program import Outside
from planner.plan.tiles import Tiles
from planner.plan.words import Kind, Order, Phase
from planner.problem import Problem
from planner.queues import Job
from planner.schedule import Choice, PhaseResidency
from planner.space import DEPTHS, Space
from planner.variants import evaluate_ordered
from planner.workspace import gemm_shapes

EQUAL = 1e-9

Vector = tuple[int, ...]  # of each kind of step the number of its tiles, the fastest first
Vectors = tuple[Vector, Vector]  # of vision and of prefill
ORDERS: tuple[Order, ...] = ("vision_then_llm", "prefetch", "all_first")
Taken = dict[Kind, tuple[int, Mapping[tuple[int, ...], int]]]


class Part(NamedTuple):
    """Residents of a phase, and the fastest combinations of tiles that fit by themselves."""

    number: int
    frame: Frame
    residency: PhaseResidency
    vectors: tuple[Vector, ...]  # none is slower in all
    seconds: tuple[float, float]  # alone, with the fastest tiles of each kind
    compute: float
    copied: float
    rest: float = 0.0
    decode: PhaseResidency = PhaseResidency(0, 0)
    looped: int = 0  # bytes held in decode
    there: float = 0.0  # seconds with all residents there from the start
    brought: float = 0.0  # seconds of copying these
    early: int = 0  # bytes of these
    loaded: Frame | None = None  # with all residents there before the first step
    peak: int = 0  # bytes alive in decode
    like: tuple[object, ...] = ()  # equal where the frames are


class Point(NamedTuple):
    """Tiles of a part: seconds of all steps, bytes held, the bytes beside that any tiles of the other part have."""

    compute: float
    held: int
    beside: int
    vector: Vector


class Entry(NamedTuple):
    bound: float
    number: int
    order: Order
    tower: Part
    text: Part
    vectors: Vectors | None  # None: all that fit
    choice: Choice | None


class Everything:
    """All settings of a problem, in order of seconds."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.space = problem, Space(problem)
        self.parts, self.budget = self.space.parts, problem.request.budget_bytes
        self.timed = self.built = self.settings = 0

    def fastest(self, below: float, seconds: float = float("inf")) -> tuple[float, Choice | None]:
        """The fastest setting that fits, where one is below so many seconds; TimeoutError after so much processor time."""
        self.until = time.process_time() + seconds
        best: tuple[float, Choice | None] = below, None
        space = self.space
        for depth, rows, cap in product(DEPTHS, space.vocabulary_rows(), space.caps):
            for together in space.modes:
                corner = Corner(self, depth, rows, cap, together)
                best = corner.fastest(best[0] * (1 - EQUAL)) or best
        return best

    def any_fits(self) -> bool:
        """Whether any setting has its bytes, by the closed form, within the budget: one slot, nothing resident, any tiles."""
        self.until = float("inf")
        nothing = PhaseResidency.of((), ())
        for rows, together in product(self.space.vocabulary_rows(), self.space.modes):
            corner = Corner(self, 1, rows, self.space.caps[0], together)
            vision = self.parts.vision(together, nothing, 1, False)
            prefill = self.parts.prefill(nothing, nothing, 1, rows)
            frames = [self.parts.decode(nothing, nothing, 1, rows)] if self.parts.repeats else []
            looped = max((corner.bytes_held("decode", frame, ()) for frame in frames), default=0)
            for mine in corner.every("vision"):
                held = max(corner.bytes_held("vision", vision, mine), looped)
                for other in corner.every("prefill"):
                    if corner.fits(
                        max(held, corner.bytes_held("prefill", prefill, other)), (mine, other)
                    ):
                        return True
        return False

    def check(self) -> None:
        """TimeoutError where no time is left."""
        if time.process_time() > self.until:
            raise TimeoutError


class Corner:
    """The settings with one staging depth, lm_head tiling, way of handling images, and cap on blocks outside the arena."""

    def __init__(
        self, everything: Everything, depth: int, rows: int, cap: float, together: bool
    ) -> None:
        self.all, self.parts, self.problem = everything, everything.parts, everything.problem
        self.depth, self.rows, self.cap, self.together = depth, rows, cap, together
        self.footprint = everything.space.footprint
        self.start = START.model_copy(update={"vocabulary_rows": rows})
        self.vision, self.prefill = (
            {kind: [o for o in found if o.outside <= cap] for kind, found in options.items()}
            for options in (everything.space.vision[together], everything.space.prefill)
        )
        self.tiles = lru_cache(maxsize=None)(self._tiles)
        self.known: dict[tuple[int, Vector, bool], int] = {}
        self.numbered = 0
        self.pointed: dict[int, list[Point]] = {}
        self.fronts: dict[tuple[object, ...], float] = {}
        self.stepped: dict[tuple[Phase, Vector], list[float]] = {}
        self.lonely: dict[tuple[int, Vector], tuple[float, float]] = {}
        self.there: dict[tuple[object, ...], float] = {}
        self.alive: dict[tuple[int, Vector], list[int]] = {}
        self.bounds: dict[tuple[int, tuple[tuple[Outside, ...], ...]], int] = {}
        self.blocks = lru_cache(maxsize=None)(self._blocks)
        self.besides = lru_cache(maxsize=None)(self._besides)
        self._find_products()
        self.fixed = {
            "vision": self._fixed("vision", self.parts.bare_vision(together), self.vision),
            "prefill": self._fixed("prefill", self.parts.bare_text(False, rows), self.prefill),
            "decode": self._fixed("decode", self.parts.bare_text(True, rows), {}),
        }
        self.room = self.footprint.room(cap)
        self.left = lru_cache(maxsize=None)(self._left)
        self.least = self._least("vision"), self._least("prefill")

    def options(self, phase: Phase) -> Options:
        return self.vision if phase == "vision" else self.prefill

    def _fixed(self, phase: Phase, bare: Bare, options: Options) -> Taken:
        """Scratch and blocks outside the arena of kinds without options."""
        found: Taken = {}
        for kind, images in zip(bare.kinds, bare.images, strict=True):
            if kind not in options:
                size, outside = self.problem.taken(kind, phase, self.start, images)
                found[kind] = size, {images: outside}
        return found

    def _find_products(self) -> None:
        """On the CPU the products of each kind's options, and those of all others."""
        problem = self.problem
        self.products: dict[tuple[Kind, int], frozenset[tuple[int, int, int]]] = {}
        self.shapes: frozenset[tuple[int, int, int]] = frozenset()
        if not problem.on_cpu:
            return
        groups = self.parts.groups(self.together)
        model, rows = problem.model, problem.workload.prompt_tokens
        for kind, found in [*self.vision.items(), *self.prefill.items()]:
            images = [problem.images_of(g) for g in groups] if kind in self.vision else [()]
            for number, option in enumerate(found):
                tiles = self.start.model_copy(update=dict(option.tiles))
                self.products[kind, number] = frozenset[tuple[int, int, int]]().union(
                    *(gemm_shapes(kind, model, tiles, each, rows) for each in images)
                )
        for kind in ("self_attn", "text_mlp", "lm_head"):
            if kind == "lm_head":
                self.shapes |= gemm_shapes(kind, model, self.start, (), rows)
            self.shapes |= gemm_shapes(kind, model, self.start, (), rows, decode=True)

    def _least(self, phase: Phase) -> Vector:
        """The tiles for which least is taken beside what steps hold: on the CPU kept by its library, on a card by a kind's blocks."""
        options = list((self.vision if phase == "vision" else self.prefill).values())
        if not self.problem.on_cpu:
            return tuple(
                min(range(len(o)), key=[each.outside for each in o].__getitem__) for o in options
            )
        other = tuple(0 for _ in (self.prefill if phase == "vision" else self.vision))
        return min(
            product(*(range(len(found)) for found in options)),
            key=lambda v: self.besides((v, other) if phase == "vision" else (other, v)),
        )

    def _beside_least(self, phase: Phase, vector: Vector) -> int:
        """Bytes beside what the steps hold, with those tiles of the other phase for which they are fewest."""
        vision, prefill = self.least
        return self.besides((vector, prefill) if phase == "vision" else (vision, vector))

    def _left(self, phase: Phase, vector: Vector) -> float:
        """Bytes that a phase may hold with these tiles, the other phase's tiles being those for which least is taken beside."""
        budget = self.all.budget
        if budget is None:
            return float("inf")
        if not self.problem.on_cpu and self.room <= SMALL_BYTES:
            return self.room
        left = budget - self._beside_least(phase, vector)
        return min(self.room, left if self.problem.on_cpu else left // STEP_BYTES * STEP_BYTES)

    def fastest(self, below: float) -> tuple[float, Choice] | None:
        """The fastest that fits, if it is below so many seconds."""
        heap: list[Entry] = []
        towers = sorted(self._towers(), key=lambda t: min(t.seconds))
        for text in self._texts() if towers else ():
            self.all.check()
            for tower in towers:
                if min(tower.seconds) + text.there + text.rest >= below:
                    break
                for order in ORDERS if text.early and tower.number else ORDERS[:1]:
                    bound = self._first(order, tower, text)
                    if bound < below:
                        heap.append(self._entry(bound, order, tower, text))
        heapq.heapify(heap)
        seen: set[tuple[int, int, Order, Vectors]] = set()
        while heap:
            self.all.check()
            entry = heapq.heappop(heap)
            bound, _, order, tower, text, vectors, choice = entry
            if bound >= below:
                return None
            if vectors is None:
                for each in self._fitting_both(tower, text, below):
                    least = self._bound(order, tower, text, each)
                    if least < below:
                        heapq.heappush(heap, self._entry(least, order, tower, text, each))
                continue
            if choice is None and self._may_fit(order, tower, text, vectors):
                self.all.timed += 1
                seconds = self._timed(entry)
                assert seconds >= bound * (1 - EQUAL), (seconds, entry)
                if seconds < below:
                    choice = self._choice(entry)
                    heapq.heappush(heap, entry._replace(bound=seconds, choice=choice))
                continue
            if choice is not None and self._fits(choice):
                return bound, choice
            for each in self._slower(vectors):
                key = tower.number, text.number, order, each
                if key not in seen:
                    seen.add(key)
                    least = self._bound(order, tower, text, each)
                    if least < below:
                        heapq.heappush(heap, self._entry(least, order, tower, text, each))
        return None

    def _slower(self, vectors: Vectors) -> Iterator[Vectors]:
        """Each kind's next slower tiles."""
        vision, prefill = vectors
        for changed in slower(vision, list(self.vision.values())):
            yield changed, prefill
        for changed in slower(prefill, list(self.prefill.values())):
            yield vision, changed

    def _entry(
        self, bound: float, order: Order, tower: Part, text: Part, vectors: Vectors | None = None
    ) -> Entry:
        self.all.settings += 1
        return Entry(bound, self.all.settings, order, tower, text, vectors, None)

    def _first(self, order: Order, tower: Part, text: Part) -> float:
        """No more than the seconds with any tiles."""
        if order == "vision_then_llm":
            return min(v + p for v, p in zip(tower.seconds, text.seconds, strict=True)) + text.rest
        if order == "all_first":
            return text.brought + tower.compute + text.there + text.rest
        return max(min(tower.seconds) + text.there, tower.copied + text.copied) + text.rest

    def _timed(self, entry: Entry) -> float:
        """Seconds, exactly."""
        tower, text = entry.tower, entry.text
        assert entry.vectors is not None
        steps = [
            self.steps("vision", tower, entry.vectors[0]),
            self.steps("prefill", text, entry.vectors[1]),
        ]
        if entry.order == "vision_then_llm":
            return self._bound(entry.order, tower, text, entry.vectors)
        first = entry.order == "all_first"
        frame = tower.loaded if first and tower.loaded else tower.frame
        sizes = [text.frame.sizes[number] for number in text.frame.early]
        starts = [0] * len(sizes)
        if not first:
            live = self.live("vision", tower, entry.vectors[0])
            peak = max(*live, *self.live("prefill", text, entry.vectors[1]), text.peak)
            starts = early_starts([peak - size for size in live], sizes)
        key = tower.number, text.like, entry.vectors, first, tuple(starts)
        if key not in self.fronts:
            jobs = list(text.frame.jobs)
            count = len(steps[0])
            for number, job in enumerate(jobs):
                jobs[number] = job._replace(need=job.need + count, after=job.after + count)
            for number, start in zip(text.frame.early, starts, strict=True):
                need = 0 if first else jobs[number].need
                jobs[number] = jobs[number]._replace(need=need, after=start - 1)
            everything = sorted([*frame.jobs, *jobs], key=lambda job: job.need)
            self.fronts[key] = min(self.apart([*steps[0], *steps[1]], everything))
        return self.fronts[key] + text.rest

    def apart(self, steps: Sequence[float], jobs: Sequence[Job]) -> tuple[float, float]:
        return both(steps, jobs, self.problem.costs.beside)

    def steps(self, phase: Phase, part: Part, vector: Vector) -> list[float]:
        """Seconds of a part's steps."""
        key = phase, vector
        if key not in self.stepped:
            self.stepped[key] = self.parts.seconds(
                phase, part.frame.bare, self.tiles(phase, vector)
            )
        return self.stepped[key]

    def alone(self, phase: Phase, part: Part, vector: Vector) -> tuple[float, float]:
        """Seconds of a part with nothing else under way."""
        key = part.number, vector
        if key not in self.lonely:
            self.lonely[key] = self.apart(self.steps(phase, part, vector), part.frame.jobs)
        return self.lonely[key]

    def filled(self, text: Part, vector: Vector) -> float:
        """Seconds of prefill with all its residents there from the start."""
        key = text.like, vector
        if key not in self.there:
            steps = self.steps("prefill", text, vector)
            self.there[key] = min(self.apart(steps, arrived(text.frame)))
        return self.there[key]

    def live(self, phase: Phase, part: Part, vector: Vector) -> list[int]:
        key = part.number, vector
        if key not in self.alive:
            tiles = self.tiles(phase, vector)
            self.alive[key] = self.parts.live(phase, part.frame, tiles)
        return self.alive[key]

    def _fitting_both(self, tower: Part, text: Part, below: float) -> Iterator[Vectors]:
        """The combinations of tiles that may fit in both parts and may be below so many seconds, none slower in all than another."""
        found: list[Vector] = []
        fastest = list(product(tower.vectors, text.vectors))
        if all(self._may_fit("vision_then_llm", tower, text, vectors) for vectors in fastest):
            yield from fastest  # all others are slower
            return
        budget = self.all.budget
        seconds = below - text.rest
        visions = self._points("vision", tower)
        none = self.besides(self.least) if self.problem.on_cpu else 0
        small = not self.problem.on_cpu and self.room <= SMALL_BYTES
        for mine in self._points("prefill", text):
            self.all.check()
            least = max(text.there, mine.compute)
            for other in visions:
                if max(min(tower.seconds), other.compute) + least >= seconds:
                    break  # they come in order of seconds
                if budget is not None and not small:
                    held = max(mine.held, other.held, text.looped)
                    beside = max(mine.beside, other.beside)
                    if self.problem.on_cpu:
                        # what is kept for the products of both
                        beside = mine.beside + other.beside - none
                    if held + beside > budget:
                        continue
                vector = (*other.vector, *mine.vector)
                if not any(all(map(le, faster, vector)) for faster in found):
                    found.append(vector)
                    yield other.vector, mine.vector

    def _points(self, phase: Phase, part: Part) -> list[Point]:
        """A part's combinations of tiles, the fastest first."""
        if part.number not in self.pointed:
            options = self.options(phase)
            bare = part.frame.bare
            steps = self.parts.seconds(phase, bare, self.start)
            fixed = sum(s for s, k in zip(steps, bare.kinds, strict=True) if k not in options)
            found = []
            for vector in self.every(phase):
                chosen = zip(options.values(), vector, strict=True)
                compute = fixed + sum(each[number].seconds for each, number in chosen)
                held = self.bytes_held(phase, part.frame, vector)
                if max(held, part.looped) <= self.left(phase, vector):
                    found.append(Point(compute, held, self._beside_least(phase, vector), vector))
            self.pointed[part.number] = sorted(found)
        return self.pointed[part.number]

    def _fits(self, choice: Choice) -> bool:
        budget = self.all.budget
        self.all.built += 1
        return budget is None or evaluate_ordered(self.problem, choice).bound_bytes <= budget

    def _may_fit(self, order: Order, tower: Part, text: Part, vectors: Vectors) -> bool:
        """By the closed form of the bytes."""
        budget = self.all.budget
        if budget is None:
            return True
        held = max(self.held("vision", tower, vectors[0]), self.held("prefill", text, vectors[1]))
        held = max(held, text.looped)
        if order == "all_first":
            held = max(held, self.held("vision", tower, vectors[0], loaded=True) + text.early)
        return self.fits(held, vectors)

    def every(self, phase: Phase) -> Iterator[Vector]:
        """Every combination of a phase's tiles."""
        options = self.options(phase)
        return product(*(range(len(found)) for found in options.values()))

    def fits(self, held: int, vectors: Vectors) -> bool:
        """Whether so many bytes held fit the budget beside what these tiles take, by the closed form."""
        budget = self.all.budget
        assert budget is not None
        held = max(held, self.problem.decoding_bytes)
        if self.problem.on_cpu or held > SMALL_BYTES:
            whole = held if self.problem.on_cpu else -(-held // STEP_BYTES) * STEP_BYTES
            return whole + self.besides(vectors) <= budget
        key = held, self.blocks(vectors)
        if key not in self.bounds:
            self.bounds[key] = card_bound(self.problem, *key)
        return self.bounds[key] <= budget

    def _blocks(self, vectors: Vectors) -> tuple[tuple[Outside, ...], ...]:
        return tuple(self.footprint.blocks(self._both(vectors), self.together))

    def _besides(self, vectors: Vectors) -> int:
        """Bytes beside what the steps hold: on the CPU the context, on a card what is reserved beside a large arena."""
        if not self.problem.on_cpu:
            key = SMALL_BYTES, self.blocks(vectors)
            if key not in self.bounds:
                self.bounds[key] = card_bound(self.problem, *key)
            return self.bounds[key] - SMALL_BYTES
        shapes = self.shapes.union(
            *(
                self.products[kind, index]
                for options, vector in zip((self.vision, self.prefill), vectors, strict=True)
                for kind, index in zip(options, vector, strict=True)
            )
        )
        return self.problem.context_bytes(shapes) + self.problem.profile.context_error_bytes

    def held(self, phase: Phase, part: Part, vector: Vector, *, loaded: bool = False) -> int:
        """The most bytes held in a phase by the closed form."""
        key = part.number, vector, loaded
        known = self.known.get(key)
        if known is None:
            frame = part.loaded if loaded and part.loaded else part.frame
            known = self.known[key] = self.bytes_held(phase, frame, vector)
        return known

    def bytes_held(self, phase: Phase, frame: Frame, vector: Vector) -> int:
        if not frame.bare.kinds:
            return 0
        options = self.options(phase)
        taken = dict(self.fixed[phase])
        if vector:
            for (kind, found), number in zip(options.items(), vector, strict=True):
                taken[kind] = found[number].bytes, found[number].blocks
        if not self.problem.on_cpu:
            return max(base + taken[kind][0] for kind, base in frame.base.items())
        return max(
            held + taken[before][0] + taken[kind][1][images]
            for (before, kind, images), held in frame.still.items()
        )

    def _chosen(self, phase: Phase, vector: Vector) -> dict[str, int]:
        chosen: dict[str, int] = {}
        for index, found in zip(vector, self.options(phase).values(), strict=True):
            chosen.update(found[index].tiles)
        return chosen

    def _tiles(self, phase: Phase, vector: Vector) -> Tiles:
        return self.start.model_copy(update=self._chosen(phase, vector))

    def _both(self, vectors: Vectors) -> Tiles:
        tiles = self.tiles("vision", vectors[0])
        return tiles.model_copy(update=self._chosen("prefill", vectors[1]))

    def _choice(self, entry: Entry) -> Choice:
        tower, text = entry.tower, entry.text
        assert entry.vectors is not None
        return Choice(
            entry.order,
            self.together,
            self.depth,
            tower.residency,
            text.residency,
            text.decode,
            self._both(entry.vectors),
        )

    def _bound(self, order: Order, tower: Part, text: Part, vectors: Vectors) -> float:
        """No more than the seconds with these tiles."""
        vision = self.alone("vision", tower, vectors[0])
        if order == "vision_then_llm":
            prefill = self.alone("prefill", text, vectors[1])
            return min(v + p for v, p in zip(vision, prefill, strict=True)) + text.rest
        there = self.filled(text, vectors[1])
        if order == "all_first":
            compute = sum(self.steps("vision", tower, vectors[0]))
            return text.brought + compute + there + text.rest
        return max(min(vision) + there, tower.copied + text.copied) + text.rest

    def _fitting(self, phase: Phase, frame: Frame, least: int = 0) -> tuple[Vector, ...]:
        """The combinations of tiles with which a part fits by itself and that are not slower in all than another such; `least`: bytes held in any case."""
        by_kind = self.options(phase)
        options = list(by_kind.values())
        first = []
        for kind, each in by_kind.items():
            alone = (n for n, option in enumerate(each) if self._has_room(frame, kind, option))
            first.append(next(alone, -1))
        found: list[Vector] = []
        level = {tuple(first)} if -1 not in first else set()
        while level:
            following: set[Vector] = set()
            for vector in sorted(level):
                if any(all(map(le, other, vector)) for other in found):
                    continue
                left = self.left(phase, vector)
                if least <= left and self.bytes_held(phase, frame, vector) <= left:
                    found.append(vector)
                else:
                    following.update(slower(vector, options))
            level = following
        return tuple(found)

    def _has_room(self, frame: Frame, kind: Kind, option: Option) -> bool:
        """Whether these tiles fit where other kinds take nothing."""
        if not self.problem.on_cpu:
            return option.bytes <= self.room - frame.base[kind]
        return all(
            held + option.bytes + option.blocks[images] <= self.room
            for (before, after, images), held in frame.still.items()
            if before == after == kind
        )

    def _towers(self) -> Iterator[Part]:
        if not self.problem.workload.images:
            frame = self.parts.vision(True, PhaseResidency(0, 0), 1, False)
            yield Part(0, frame, PhaseResidency(0, 0), ((),), (0.0, 0.0), 0.0, 0.0)
            return
        every = subsets(range(self.problem.model.vision.depth))
        for attn, mlp in product(every, every):
            residency = PhaseResidency.of(attn, mlp)
            self.all.check()
            frame = self.parts.vision(self.together, residency, self.depth, False)
            vectors = self._fitting("vision", frame)
            if vectors:
                vector = tuple(map(min, zip(*vectors, strict=True)))
                steps = self.parts.seconds("vision", frame.bare, self.tiles("vision", vector))
                yield Part(
                    self._number(),
                    frame,
                    residency,
                    vectors,
                    self.apart(steps, frame.jobs),
                    sum(steps),
                    frame.copy_seconds,
                    loaded=self.parts.vision(self.together, residency, self.depth, True),
                )

    def _number(self) -> int:
        self.numbered += 1
        return self.numbered

    def _texts(self) -> Iterator[Part]:
        """Every (decode, prefill) with prefill's a subset of decode's."""
        layers, _, heads = self.parts.totals(self.rows)
        parts, repeats = self.parts, self.parts.repeats
        every = product(subsets(range(layers)), subsets(range(layers)), subsets(range(heads)))
        for outer in every:
            decode = PhaseResidency.of(*outer)
            inside = product(*map(subsets, outer)) if repeats else [outer]
            for inner in inside:
                self.all.check()
                prefill = PhaseResidency.of(*inner)
                rest, looped, peak = 0.0, 0, 0
                if repeats:
                    loop = parts.decode(decode, prefill, self.depth, self.rows)
                    looped = self.bytes_held("decode", loop, ())
                    if looped > self.room:
                        break
                    peak = max(parts.live("decode", loop, self.start))
                    rest = parts.looped(decode, prefill, self.depth, self.start).seconds(repeats)
                frame = parts.prefill(prefill, decode, self.depth, self.rows)
                vectors = self._fitting("prefill", frame, looped)
                if not vectors:
                    continue
                vector = tuple(map(min, zip(*vectors, strict=True)))
                steps = parts.seconds("prefill", frame.bare, self.tiles("prefill", vector))
                yield Part(
                    self._number(),
                    frame,
                    prefill,
                    vectors,
                    self.apart(steps, frame.jobs),
                    sum(steps),
                    frame.copy_seconds,
                    rest,
                    decode,
                    looped,
                    min(self.apart(steps, arrived(frame))),
                    sum(frame.jobs[n].seconds for n in frame.early),
                    sum(frame.sizes[n] for n in frame.early),
                    peak=peak,
                    like=(*inner, parts.pinned(decode, self.rows)),
                )


def arrived(frame: Frame) -> list[Job]:
    """A phase's copies, those of residents that may come before it done."""
    early = set(frame.early)
    return [j._replace(seconds=0.0) if n in early else j for n, j in enumerate(frame.jobs)]


def slower(vector: Vector, options: Sequence[Sequence[Option]]) -> Iterator[Vector]:
    """The same with the next slower tiles of one kind."""
    for place, (index, found) in enumerate(zip(vector, options, strict=True)):
        if index + 1 < len(found):
            yield (*vector[:place], index + 1, *vector[place + 1 :])


def subsets(units: frozenset[int] | range) -> list[frozenset[int]]:
    found = sorted(units)
    return [frozenset(c) for n in range(len(found) + 1) for c in combinations(found, n)]
