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
from collections.abc import Iterator
from itertools import combinations, product
from operator import le
from typing import NamedTuple

from everything_bytes import Bytes
from everything_parts import Combinations, Part, Vector, Vectors, slower
from everything_seconds import Seconds, arrived

from planner.footprint import SMALL_BYTES
from planner.parts import Frame
from planner.plan.words import Order, Phase
from planner.problem import Problem
from planner.schedule import Choice, PhaseResidency
from planner.space import DEPTHS, Space
from planner.variants import evaluate_ordered

EQUAL = 1e-9

ORDERS: tuple[Order, ...] = ("vision_then_llm", "prefetch", "all_first")


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
            looped = max(
                (corner.bytes.bytes_held("decode", frame, ()) for frame in frames), default=0
            )
            for mine in corner.tiles.every("vision"):
                held = max(corner.bytes.bytes_held("vision", vision, mine), looped)
                for other in corner.tiles.every("prefill"):
                    if corner.bytes.fits(
                        max(held, corner.bytes.bytes_held("prefill", prefill, other)), (mine, other)
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
        self.budget = everything.budget
        self.depth, self.rows, self.cap, self.together = depth, rows, cap, together
        vision, prefill = (
            {kind: [o for o in found if o.outside <= cap] for kind, found in options.items()}
            for options in (everything.space.vision[together], everything.space.prefill)
        )
        self.tiles = Combinations(vision, prefill, rows)
        footprint = everything.space.footprint
        self.bytes = Bytes(self.problem, self.parts, footprint, self.tiles, rows, cap, together)
        self.seconds = Seconds(self.problem, self.parts, self.tiles)
        self.numbered = 0
        self.pointed: dict[int, list[Point]] = {}

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
                    bound = self.seconds.first(order, tower, text)
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
                    least = self.seconds.bound(order, tower, text, each)
                    if least < below:
                        heapq.heappush(heap, self._entry(least, order, tower, text, each))
                continue
            if choice is None and self.bytes.may_fit(order, tower, text, vectors):
                self.all.timed += 1
                seconds = self.seconds.timed(order, tower, text, vectors)
                assert seconds >= bound * (1 - EQUAL), (seconds, entry)
                if seconds < below:
                    choice = self._choice(entry)
                    heapq.heappush(heap, entry._replace(bound=seconds, choice=choice))
                continue
            if choice is not None and self._fits(choice):
                return bound, choice
            for each in self.tiles.slower(vectors):
                key = tower.number, text.number, order, each
                if key not in seen:
                    seen.add(key)
                    least = self.seconds.bound(order, tower, text, each)
                    if least < below:
                        heapq.heappush(heap, self._entry(least, order, tower, text, each))
        return None

    def _entry(
        self, bound: float, order: Order, tower: Part, text: Part, vectors: Vectors | None = None
    ) -> Entry:
        self.all.settings += 1
        return Entry(bound, self.all.settings, order, tower, text, vectors, None)

    def _fitting_both(self, tower: Part, text: Part, below: float) -> Iterator[Vectors]:
        """The combinations of tiles that may fit in both parts and may be below so many seconds, none slower in all than another."""
        found: list[Vector] = []
        fastest = list(product(tower.vectors, text.vectors))
        if all(self.bytes.may_fit("vision_then_llm", tower, text, vectors) for vectors in fastest):
            yield from fastest  # all others are slower
            return
        budget = self.budget
        seconds = below - text.rest
        visions = self._points("vision", tower)
        none = self.bytes.besides(self.bytes.least) if self.problem.on_cpu else 0
        small = not self.problem.on_cpu and self.bytes.room <= SMALL_BYTES
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
            options = self.tiles.options(phase)
            bare = part.frame.bare
            steps = self.parts.seconds(phase, bare, self.tiles.start)
            fixed = sum(s for s, k in zip(steps, bare.kinds, strict=True) if k not in options)
            found = []
            for vector in self.tiles.every(phase):
                chosen = zip(options.values(), vector, strict=True)
                compute = fixed + sum(each[number].seconds for each, number in chosen)
                held = self.bytes.bytes_held(phase, part.frame, vector)
                if max(held, part.looped) <= self.bytes.left(phase, vector):
                    found.append(
                        Point(compute, held, self.bytes.beside_least(phase, vector), vector)
                    )
            self.pointed[part.number] = sorted(found)
        return self.pointed[part.number]

    def _fits(self, choice: Choice) -> bool:
        budget = self.budget
        self.all.built += 1
        return budget is None or evaluate_ordered(self.problem, choice).bound_bytes <= budget

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
            self.tiles.both(entry.vectors),
        )

    def _fitting(self, phase: Phase, frame: Frame, least: int = 0) -> tuple[Vector, ...]:
        """The combinations of tiles with which a part fits by itself and that are not slower in all than another such; `least`: bytes held in any case."""
        by_kind = self.tiles.options(phase)
        options = list(by_kind.values())
        first = []
        for kind, each in by_kind.items():
            alone = (n for n, option in enumerate(each) if self.bytes.has_room(frame, kind, option))
            first.append(next(alone, -1))
        found: list[Vector] = []
        level = {tuple(first)} if -1 not in first else set()
        while level:
            following: set[Vector] = set()
            for vector in sorted(level):
                if any(all(map(le, other, vector)) for other in found):
                    continue
                left = self.bytes.left(phase, vector)
                if least <= left and self.bytes.bytes_held(phase, frame, vector) <= left:
                    found.append(vector)
                else:
                    following.update(slower(vector, options))
            level = following
        return tuple(found)

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
                steps = self.parts.seconds("vision", frame.bare, self.tiles.of("vision", vector))
                yield Part(
                    self._number(),
                    frame,
                    residency,
                    vectors,
                    self.seconds.apart(steps, frame.jobs),
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
                    looped = self.bytes.bytes_held("decode", loop, ())
                    if looped > self.bytes.room:
                        break
                    peak = max(parts.live("decode", loop, self.tiles.start))
                    rest = parts.looped(decode, prefill, self.depth, self.tiles.start).seconds(
                        repeats
                    )
                frame = parts.prefill(prefill, decode, self.depth, self.rows)
                vectors = self._fitting("prefill", frame, looped)
                if not vectors:
                    continue
                vector = tuple(map(min, zip(*vectors, strict=True)))
                steps = parts.seconds("prefill", frame.bare, self.tiles.of("prefill", vector))
                yield Part(
                    self._number(),
                    frame,
                    prefill,
                    vectors,
                    self.seconds.apart(steps, frame.jobs),
                    sum(steps),
                    frame.copy_seconds,
                    rest,
                    decode,
                    looped,
                    min(self.seconds.apart(steps, arrived(frame))),
                    sum(frame.jobs[n].seconds for n in frame.early),
                    sum(frame.sizes[n] for n in frame.early),
                    peak=peak,
                    like=(*inner, parts.pinned(decode, self.rows)),
                )


def subsets(units: frozenset[int] | range) -> list[frozenset[int]]:
    found = sorted(units)
    return [frozenset(c) for n in range(len(found) + 1) for c in combinations(found, n)]
