"""Seconds of the settings of `everything.py`: exactly, and what they are not below."""

from __future__ import annotations

from collections.abc import Sequence

from everything_parts import Combinations, Part, Vector, Vectors

from planner.parts import Frame, Parts
from planner.plan.words import Order, Phase
from planner.problem import Problem
from planner.queues import Job
from planner.worked import both, early_starts


class Seconds:
    """Seconds of the settings with one set of tiles to choose from."""

    def __init__(self, problem: Problem, parts: Parts, tiles: Combinations) -> None:
        self.problem, self.parts, self.tiles = problem, parts, tiles
        self.fronts: dict[tuple[object, ...], float] = {}
        self.stepped: dict[tuple[Phase, Vector], list[float]] = {}
        self.lonely: dict[tuple[int, Vector], tuple[float, float]] = {}
        self.there: dict[tuple[object, ...], float] = {}
        self.alive: dict[tuple[int, Vector], list[int]] = {}

    def first(self, order: Order, tower: Part, text: Part) -> float:
        """No more than the seconds with any tiles."""
        if order == "vision_then_llm":
            return min(v + p for v, p in zip(tower.seconds, text.seconds, strict=True)) + text.rest
        if order == "all_first":
            return text.brought + tower.compute + text.there + text.rest
        return max(min(tower.seconds) + text.there, tower.copied + text.copied) + text.rest

    def bound(self, order: Order, tower: Part, text: Part, vectors: Vectors) -> float:
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

    def timed(self, order: Order, tower: Part, text: Part, vectors: Vectors) -> float:
        """Seconds, exactly."""
        steps = [
            self.steps("vision", tower, vectors[0]),
            self.steps("prefill", text, vectors[1]),
        ]
        if order == "vision_then_llm":
            return self.bound(order, tower, text, vectors)
        first = order == "all_first"
        frame = tower.loaded if first and tower.loaded else tower.frame
        sizes = [text.frame.sizes[number] for number in text.frame.early]
        starts = [0] * len(sizes)
        if not first:
            live = self.live("vision", tower, vectors[0])
            peak = max(*live, *self.live("prefill", text, vectors[1]), text.peak)
            starts = early_starts([peak - size for size in live], sizes)
        key = tower.number, text.like, vectors, first, tuple(starts)
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
                phase, part.frame.bare, self.tiles.of(phase, vector)
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
            tiles = self.tiles.of(phase, vector)
            self.alive[key] = self.parts.live(phase, part.frame, tiles)
        return self.alive[key]


def arrived(frame: Frame) -> list[Job]:
    """A phase's copies, those of residents that may come before it done."""
    early = set(frame.early)
    return [j._replace(seconds=0.0) if n in early else j for n, j in enumerate(frame.jobs)]
