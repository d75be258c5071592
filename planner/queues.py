"""Seconds of two queues, by the indexes of steps alone: no names, no buffers, so that thousands of settings can be timed.

The compute queue runs steps in order; a step waits for the copies that it needs. The copy queue runs *jobs* in order;
a job waits for the step it comes after. On the CPU both use the same cores: while both run, each is slower (`Beside`).
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

MOMENT = 1e-12  # seconds, less than which is none
ITERATIONS = 3  # of the decode loop: first, steady, and one more to measure the steady period


class Job(NamedTuple):
    """One copy. `after`: the step that must have ended (-1: none). `wraps`: meant in the iteration before. `once`: in the first alone."""

    need: int
    after: int
    seconds: float
    wraps: bool = False
    once: bool = False


class Loop(NamedTuple):
    first: float
    period: float

    def seconds(self, repeats: int) -> float:
        return self.first + (repeats - 1) * self.period if repeats else 0.0


class Beside(NamedTuple):
    """How fast each queue is while both run, in proportion to itself alone.

    A system that shares its cores fairly leaves steps `compute` in the long run. What they had beyond that, because
    nothing was copied, the reader may take back at once, up to `credit_s`; meanwhile steps run at `favoured`, below
    zero where they lose more than the time that it takes. `serial_s`: of each step what one thread does, while
    the other cores are free for the reader.
    """

    compute: float = 1.0
    copy: float = 1.0
    favoured: float = 1.0
    credit_s: float = 0.0
    serial_s: float = 0.0

    def least(self, compute_s: float, copy_s: float, steps: int) -> float:
        """No order of so many steps and of copies, of so many seconds alone, ends sooner."""
        # what one thread does of steps while something is copied; then all that both queues do at a time, or nothing
        serial = min(steps * self.serial_s, compute_s, copy_s / self.copy)
        both = max(min(copy_s / self.copy - serial, (compute_s - serial) / self.compute), 0.0)
        saved = serial * self.copy + max(both * (self.compute + self.copy - 1.0), 0.0)
        return compute_s + copy_s - saved


APART = Beside()


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


def line(
    steps: Sequence[float], jobs: Sequence[Job], beside: Beside = APART
) -> tuple[list[float], float]:
    """When each step ends, and when the first begins; `jobs` in the order of their queue."""
    if beside != APART:
        ends, lands = walked(steps, jobs, beside)
        first = (land for job, land in zip(jobs, lands, strict=False) if not job.need)
        return ends, max(first, default=0.0)
    ends = []
    landed = [0.0] * len(steps)
    begin = compute = copying = 0.0
    position, count = 0, len(jobs)
    for index, seconds in enumerate(steps):
        # the queue stops at the first job that comes after a step not yet run
        while position < count and jobs[position].after < index:
            need, after, duration, _, _ = jobs[position]
            if after >= 0 and ends[after] > copying:
                copying = ends[after]
            copying += duration
            if copying > landed[need]:
                landed[need] = copying
            position += 1
        if landed[index] > compute:
            compute = landed[index]
        if not index:
            begin = compute
        compute += seconds
        ends.append(compute)
    return ends, begin


def walked(
    steps: Sequence[float], jobs: Sequence[Job], beside: Beside = APART
) -> tuple[list[float], list[float]]:
    """When each step ends, and when each job that lands until then does, from event to event: where both queues run they slow one another down."""
    # how many jobs must have ended before each step
    needed = [0] * len(steps)
    for number, job in enumerate(jobs):
        needed[job.need] = number + 1
    ends: list[float] = []
    lands: list[float] = []
    now, credit = 0.0, beside.credit_s
    landed, left = 0, [seconds for _, _, seconds, *_ in jobs]
    for index, seconds in enumerate(steps):
        serial = min(seconds, beside.serial_s)
        rest = seconds - serial
        while True:
            copies = landed < len(jobs) and jobs[landed].after < index
            computes = landed >= needed[index]
            if not computes:
                assert copies, f"step {index} waits for a copy that waits for it"
                now += left[landed]
                landed += 1
                lands.append(now)
                continue
            span = serial + rest
            if span <= MOMENT:
                break
            if not copies:
                now += span
                credit = min(credit + span * (1.0 - beside.compute), beside.credit_s)
                break
            one_thread = serial > MOMENT
            if one_thread:
                share, until = 1.0, serial
            elif credit > MOMENT:
                share, until = beside.favoured, credit / (beside.compute - beside.favoured)
                if share > 0.0:
                    until = min(until, rest / share)
            else:
                share, until = beside.compute, rest / beside.compute
            copy_s = left[landed] / beside.copy
            span = min(copy_s, until)
            now += span
            if one_thread:
                serial -= span
            else:
                rest -= span * share
                credit += span * (share - beside.compute)
            if copy_s <= until:
                landed += 1
                lands.append(now)
            else:
                left[landed] -= span * beside.copy
        ends.append(now)
    return ends, lands


def loop(steps: Sequence[float], jobs: Sequence[Job], repeats: int, beside: Beside = APART) -> Loop:
    """Seconds of the first iteration and of a steady one of a loop that begins with both queues idle; `jobs` by need."""
    iterations = min(ITERATIONS, repeats)
    if beside == APART:
        marks = [0.0, *_walked(steps, jobs, iterations)]
    else:
        # one more, so that copies for the next lie beside the last that counts
        written = _unrolled(steps, jobs, min(iterations + 1, repeats), beside)
        marks = [0.0, *written[:iterations]]
    if len(marks) < 3:
        return Loop(marks[-1], 0.0)
    # what the first iterations had in hand does not last
    copied = sum(job.seconds for job in jobs if not job.once)
    return Loop(marks[1], max(marks[-1] - marks[-2], copied))


def _walked(steps: Sequence[float], jobs: Sequence[Job], iterations: int) -> list[float]:
    """When each iteration ends."""
    compute = copying = 0.0
    marks: list[float] = []
    previous = [0.0] * len(steps)
    for iteration in range(iterations):
        ends: list[float] = []
        landed = [0.0] * len(steps)
        current = [job for job in jobs if not job.once] if iteration else jobs
        position, count = 0, len(current)
        for index, seconds in enumerate(steps):
            while position < count:
                need, after, duration, wraps, _ = current[position]
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
                position += 1
            if landed[index] > compute:
                compute = landed[index]
            compute += seconds
            ends.append(compute)
        previous = ends
        marks.append(compute)
    return marks


def _unrolled(
    steps: Sequence[float], jobs: Sequence[Job], iterations: int, beside: Beside
) -> list[float]:
    """The same with the loop written out."""
    count = len(steps)
    written = []
    for number in range(iterations):
        start = number * count
        for job in jobs:
            if job.once and number:
                continue
            after = -1
            if job.after >= 0:
                after = start + job.after - (count if job.wraps else 0)
            written.append(Job(start + job.need, max(after, -1), job.seconds))
    ends, _ = walked([*steps] * iterations, written, beside)
    return [ends[(number + 1) * count - 1] for number in range(iterations)] if steps else []
