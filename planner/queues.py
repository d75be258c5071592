"""Seconds of two queues, by the indexes of steps alone: no names, no buffers, so that thousands of settings can be timed.

The compute queue runs steps in order; a step waits for the copies that it needs. The copy queue runs *jobs* in order;
a job waits for the step it comes after. On the CPU both use the same cores: what a copy steals is paid by the step
beside which it ends.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

ITERATIONS = 3  # of the decode loop: first, steady, and one more to measure the steady period


class Job(NamedTuple):
    """One copy. `after`: the step that must have ended (-1: none). `wraps`: meant in the iteration before. `once`: in the first alone."""

    need: int
    after: int
    seconds: float
    stolen: float = 0.0
    wraps: bool = False
    once: bool = False


class Loop(NamedTuple):
    first: float
    period: float

    def seconds(self, repeats: int) -> float:
        return self.first + (repeats - 1) * self.period if repeats else 0.0


def queue(steps: Sequence[float], jobs: Sequence[Job], *, patient: bool) -> list[int]:
    """Indexes of the jobs in the order of a queue that takes, of those that may start, the one needed first.

    A `patient` queue rather stays idle than take a job that would make the next refill of a staging slot late, where
    that refill is needed first. Found by walking both queues; being the order of a walk that ended, it cannot deadlock.
    """
    waiting: dict[int, list[tuple[int, int]]] = {}
    for number, job in enumerate(jobs):
        waiting.setdefault(job.after, []).append((job.need, number))
    for found in waiting.values():
        found.sort()
    released = waiting.pop(-1, [])  # may start, by need
    upcoming = deque(sorted(waiting))
    order: list[int] = []
    before = [0.0]  # seconds of all steps before each
    for seconds in steps:
        before.append(before[-1] + seconds)
    compute = copying = 0.0
    for index, seconds in enumerate(steps):
        landed = 0.0
        while released and released[0][0] <= index:
            number = released.pop(0)[1]
            copying += jobs[number].seconds
            landed = copying
            order.append(number)
        compute = (landed if landed > compute else compute) + seconds
        while upcoming and upcoming[0] < index:
            upcoming.popleft()
        if released and copying < compute:
            refill, latest = len(steps), float("inf")
            if patient and upcoming:
                refill, number = waiting[upcoming[0]][0]
                idle = before[refill] - before[index + 1]
                latest = compute + idle - jobs[number].seconds
            while released and copying < compute:
                need, number = released[0]
                if need > refill and copying + jobs[number].seconds > latest:
                    break
                released.pop(0)
                copying += jobs[number].seconds
                order.append(number)
        if index in waiting:
            if compute > copying:
                copying = compute
            for entry in waiting[index]:
                insort(released, entry)
    return order + [number for _, number in released]


def line(steps: Sequence[float], jobs: Sequence[Job]) -> tuple[list[float], float]:
    """When each step ends, and when the first begins; `jobs` in the order of their queue."""
    ends: list[float] = []
    landed = [0.0] * len(steps)
    landing: deque[tuple[float, float]] = deque()  # (end, stolen) of jobs no step has paid for
    begin = compute = copying = 0.0
    position, count = 0, len(jobs)
    for index, seconds in enumerate(steps):
        # the queue stops at the first job that comes after a step not yet run
        while position < count and jobs[position].after < index:
            need, after, duration, stolen, _, _ = jobs[position]
            if after >= 0 and ends[after] > copying:
                copying = ends[after]
            copying += duration
            if copying > landed[need]:
                landed[need] = copying
            if stolen:
                landing.append((copying, stolen))
            position += 1
        if landed[index] > compute:
            compute = landed[index]
        if not index:
            begin = compute
        compute = _paid(landing, compute, seconds) if landing else compute + seconds
        ends.append(compute)
    return ends, begin


def loop(steps: Sequence[float], jobs: Sequence[Job], repeats: int) -> Loop:
    """Seconds of the first iteration and of a steady one of a loop that begins with both queues idle; `jobs` by need."""
    compute = copying = 0.0
    marks = [0.0]
    previous = [0.0] * len(steps)
    landing: deque[tuple[float, float]] = deque()
    for iteration in range(min(ITERATIONS, repeats)):
        ends: list[float] = []
        landed = [0.0] * len(steps)
        current = [job for job in jobs if not job.once] if iteration else jobs
        position, count = 0, len(current)
        for index, seconds in enumerate(steps):
            while position < count:
                need, after, duration, stolen, wraps, _ = current[position]
                if wraps:
                    ready = previous[after]
                elif after < 0:
                    ready = 0.0
                elif after < index:
                    ready = ends[after]
                else:
                    break
                if ready > copying:
                    copying = ready
                copying += duration
                landed[need] = copying
                if stolen:
                    landing.append((copying, stolen))
                position += 1
            if landed[index] > compute:
                compute = landed[index]
            compute = _paid(landing, compute, seconds) if landing else compute + seconds
            ends.append(compute)
        previous = ends
        marks.append(compute)
    if len(marks) < 3:
        return Loop(marks[-1], 0.0)
    # what the first iterations had in hand does not last
    copied = sum(job.seconds for job in jobs if not job.once)
    return Loop(marks[1], max(marks[-1] - marks[-2], copied))


def _paid(landing: deque[tuple[float, float]], begin: float, seconds: float) -> float:
    """The end of a step of so many seconds, later by what jobs that land beside it steal."""
    while landing and landing[0][0] <= begin:
        landing.popleft()  # landed while nothing ran
    end = begin + seconds
    while landing and landing[0][0] <= end:
        end += landing.popleft()[1]
    return end
