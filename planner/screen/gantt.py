"""Which queue of a plan is busy when, and how many bytes are alive: what the screen draws small.

The plan is walked once more from its own fields: a step starts when the step before it and the copies it waits for
have ended, a copy when the copy before it and the step it comes after have. On the CPU both are slower while both run,
by how much the device's profile knows; without it each phase is stretched to its predicted seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from planner.plan import Plan
from planner.plan.program import Copy, Step
from planner.queues import APART, Beside, Job, walked

ITERATIONS = 3  # of decode: the first, and two more for the period of a steady one


class Span(NamedTuple):
    """From `start` to `stop`, in seconds; `value` is a share of that time, or bytes."""

    start: float
    stop: float
    value: float


@dataclass(frozen=True, slots=True)
class Gantt:
    """`phases` are (name, start, stop) in seconds since the process began; `alive` are device bytes."""

    phases: tuple[tuple[str, float, float], ...]
    compute: tuple[Span, ...]
    copies: tuple[Span, ...]
    alive: tuple[Span, ...]

    @property
    def busy(self) -> tuple[float, float]:
        """Seconds for which the compute queue and the copy queue are busy."""
        first, second = (
            sum((s.stop - s.start) * s.value for s in row) for row in (self.compute, self.copies)
        )
        return first, second


def gantt(plan: Plan, beside: Beside = APART) -> Gantt:
    """The two queues and the bytes of a plan over its predicted seconds; `beside`: how fast each queue is while both run."""
    loop = [step for step in plan.steps if step.phase == "decode"]
    first = len(plan.steps) - len(loop)
    # one iteration more, so that copies for the next lie beside the last that counts
    iterations = min(ITERATIONS + 1, plan.decode_repeats) if loop else 0
    seconds = [step.seconds for step in [*plan.steps[:first], *loop * iterations]]
    jobs, once = _jobs(plan, first, iterations)
    front = sum(copy.phase != "decode" for copy in plan.copies)
    compute, copies = _spans(seconds[:first], jobs[:front], beside)
    # the loop begins anew, as in the prediction: both queues idle, and the reader rested
    begin = compute[-1][1]
    looped = [job._replace(need=job.need - first, after=job.after - first) for job in jobs[front:]]
    later = _spans(seconds[first:], looped, beside)
    for queue, more in zip((compute, copies), later, strict=True):
        queue += [(begin + start, begin + stop) for start, stop in more]
    # where all weights come first, the phases begin when they have landed
    loaded = compute[0][0] if plan.levers.order == "all_first" else 0.0
    marks = {"load": (0.0, loaded)}
    for step, (_, end) in zip(plan.steps[:first], compute, strict=False):
        start, _ = marks.get(step.phase, (max(stop for _, stop in marks.values()), 0.0))
        marks[step.phase] = (start, end)
    rows = [[Span(start, stop, 1.0) for start, stop in row] for row in (compute, copies)]
    if iterations:
        ends = [compute[first - 1 + number * len(loop)][1] for number in range(iterations + 1)]
        ends = ends[: ITERATIONS + 1]
        before, last = ends[-2], ends[-1]
        moved = sum(job.seconds for job in jobs[once:]) / max(1, iterations - 1)
        period = max(last - before, moved)  # what the first iterations had in hand does not last
        stop = ends[1] + (plan.decode_repeats - 1) * period
        marks["decode"] = (ends[0], stop)
        for number, (row, drawn) in enumerate(zip(rows, (first + len(loop), once), strict=True)):
            inside = sum(max(0.0, min(s.stop, last) - max(s.start, before)) for s in row)
            share = moved if number and beside == APART else inside
            del row[drawn:]
            if plan.decode_repeats > 1:
                row.append(Span(ends[1], stop, min(1.0, share / period)))
    return _stretched(plan, marks, rows, [end for _, end in compute[:first]])


def _spans(
    seconds: Sequence[float], jobs: Sequence[Job], beside: Beside
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """When each step begins and ends, and each copy that lands by then."""
    ends, lands = walked(seconds, jobs, beside)
    copies: list[tuple[float, float]] = []
    landed = [0.0] * len(seconds)  # when what a step waits for is there
    before = 0.0
    for job, land in zip(jobs, lands, strict=False):
        copies.append((max(before, ends[job.after] if job.after >= 0 else 0.0), land))
        landed[job.need] = before = land
    compute = [
        (max(start, there), end)
        for start, there, end in zip([0.0, *ends], landed, ends, strict=False)
    ]
    return compute, copies


def _jobs(plan: Plan, first: int, iterations: int) -> tuple[list[Job], int]:
    """The copies as a queue over the steps with the loop written out, and how many of them run up to its first iteration."""
    index = {step.id: number for number, step in enumerate(plan.steps)}
    need: dict[str, int] = {}
    for number, step in enumerate(plan.steps):
        for name in step.waits:
            need.setdefault(name, number)

    def job(copy: Copy, shift: int) -> Job:
        after = -1 if copy.after is None else index[copy.after]
        if copy.phase == "decode":
            # the loop begins with both queues idle
            after = max(after + shift - (len(plan.steps) - first if copy.wraps else 0), first - 1)
        return Job(need[copy.id] + shift, after, copy.seconds)

    jobs = [job(copy, 0) for copy in plan.copies if copy.phase != "decode"]
    once = len(jobs)
    for number in range(iterations):
        shift = number * (len(plan.steps) - first)
        jobs += [
            job(copy, shift)
            for copy in plan.copies
            if copy.phase == "decode" and not (copy.once and number)
        ]
        once = once if number else len(jobs)
    return jobs, once


def _stretched(
    plan: Plan,
    marks: dict[str, tuple[float, float]],
    rows: Sequence[Sequence[Span]],
    ends: Sequence[float],
) -> Gantt:
    """Walked seconds moved to where the prediction has them, phase by phase."""
    phases, origin = [], 0.0
    for row in plan.prediction.phases:
        phases.append((row.phase, origin, origin + row.seconds))
        origin += row.seconds
    # what is walked begins when the process has started
    marks = marks | {"load": (marks["load"][1] - phases[0][2], marks["load"][1])}

    def moved(spans: Iterable[Span]) -> tuple[Span, ...]:
        found = []
        for start, stop, value in spans:
            for name, first, last in phases:
                low, high = marks[name]
                a, b = max(start, low), min(stop, high)
                if a < b:
                    scale = (last - first) / (high - low)
                    found.append(Span(first + (a - low) * scale, first + (b - low) * scale, value))
        return tuple(found)

    # before the first step a card's arena is there and empty
    first = plan.prediction.phases[0].expected_peak_bytes
    if plan.device.kind == "cuda":
        first = plan.device.context_bytes
    alive = [Span(marks["load"][0], marks["load"][1], first)]
    now = marks["load"][1]
    for step, end in zip(plan.steps, ends, strict=False):  # up to decode
        alive.append(Span(now, end, alive_bytes(plan, step)))
        now = end
    if "decode" in marks:
        most = max(alive_bytes(plan, step) for step in plan.steps if step.phase == "decode")
        alive.append(Span(now, marks["decode"][1], most))
    return Gantt(tuple(phases), moved(rows[0]), moved(rows[1]), moved(alive))


def alive_bytes(plan: Plan, step: Step) -> int:
    """Device bytes in use during a step. On a card the arena is held throughout: what of it is alive says more."""
    if plan.device.kind == "cpu":
        return step.expected_bytes
    return plan.device.context_bytes + step.live_bytes + step.outside_bytes


# --- as text ------------------------------------------------------------------------------------------------------

BLOCKS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
LETTERS = " .:-=+*%#"


def columns(
    spans: Sequence[Span], start: float, stop: float, width: int, *, most: bool = False
) -> list[float]:
    """`width` equal parts of `[start, stop)`: the mean of the spans' values over each, or the largest one."""
    found = []
    for number in range(width):
        low = start + (stop - start) * number / width
        high = start + (stop - start) * (number + 1) / width
        inside = [
            (min(s.stop, high) - max(s.start, low), s.value)
            for s in spans
            if s.start < high and low < s.stop
        ]
        if most:
            found.append(max((value for _, value in inside), default=0.0))
        else:
            found.append(sum(length * value for length, value in inside) / (high - low))
    return found


def bar(values: Sequence[float], full: float, *, blocks: bool) -> str:
    """One glyph per value, eight heights of `full`; only nothing is drawn as nothing."""
    glyphs = BLOCKS if blocks else LETTERS
    levels = [min(8, max(1, round(8 * v / full))) if v > full * 1e-4 else 0 for v in values]
    return "".join(glyphs[level] for level in levels)


def widths(seconds: Sequence[float], names: Sequence[str], total: int) -> list[int]:
    """Columns of each phase: enough for its name, and the rest by its seconds."""
    least = [len(name) + 1 for name in names]
    free, whole = max(0, total - sum(least)), sum(seconds)
    found = [low + int(free * s / whole) for low, s in zip(least, seconds, strict=True)]
    found[max(range(len(found)), key=found.__getitem__)] += total - sum(found)
    return found
