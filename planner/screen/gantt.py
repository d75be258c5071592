"""Which queue of a plan is busy when, and how many bytes are alive: what the screen draws small.

The plan is walked once more from its own fields: a step starts when the step before it and the copies it waits for
have ended, a copy when the copy before it and the step it comes after have. Each phase is then stretched to its
predicted seconds, which know of more than queues (on the CPU steps and copies slow one another down).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from planner.plan import Copy, Plan, Step

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


class _Walk:
    """Both queues, walked in order; `compute` and `copies` are (start, end) of what ran."""

    def __init__(self, plan: Plan) -> None:
        self.index = {step.id: number for number, step in enumerate(plan.steps)}
        self.now = self.copying = 0.0
        self.ends: dict[int, float] = {}  # of steps, in this iteration or before the loop
        self.landed: dict[str, float] = {}
        self.compute: list[tuple[float, float]] = []
        self.copies: list[tuple[float, float]] = []

    def run(
        self, steps: Sequence[tuple[int, Step]], queue: Sequence[Copy], before: dict[int, float]
    ) -> None:
        """Steps in order; copies as far as what they come after has ended. `before`: ends in the iteration before."""
        begin, position = self.now, 0
        for number, step in steps:
            while position < len(queue):
                copy = queue[position]
                after = -1 if copy.after is None else self.index[copy.after]
                if after >= 0 and not copy.wraps and after not in self.ends:
                    break
                ready = before.get(after, begin) if copy.wraps else self.ends.get(after, 0.0)
                start = max(self.copying, ready)
                self.copying = self.landed[copy.id] = start + copy.seconds
                self.copies.append((start, self.copying))
                position += 1
            start = max([self.now, *(self.landed[w] for w in step.waits if w in self.landed)])
            self.now = self.ends[number] = start + step.seconds
            self.compute.append((start, self.now))


def gantt(plan: Plan) -> Gantt:
    """The two queues and the bytes of a plan over its predicted seconds."""
    numbered = list(enumerate(plan.steps))
    loop = [(number, step) for number, step in numbered if step.phase == "decode"]
    walk = _Walk(plan)
    once = numbered[: len(numbered) - len(loop)]
    walk.run(once, [copy for copy in plan.copies if copy.phase != "decode"], {})
    # where all weights come first, the phases begin when they have landed
    loaded = walk.compute[0][0] if plan.levers.order == "all_first" else 0.0
    marks = {"load": (0.0, loaded)}
    for number, step in once:
        start, _ = marks.get(step.phase, (max(stop for _, stop in marks.values()), 0.0))
        marks[step.phase] = (start, walk.ends[number])
    busy: list[tuple[Span, ...]] = []
    if loop:
        begin = walk.now
        first, period, shares = _loop(plan, walk, loop)
        marks["decode"] = (begin, begin + first + (plan.decode_repeats - 1) * period)
        busy = [
            (Span(begin + first, marks["decode"][1], share),) if plan.decode_repeats > 1 else ()
            for share in shares
        ]
    rows = [[Span(start, stop, 1.0) for start, stop in row] for row in (walk.compute, walk.copies)]
    for row, steady in zip(rows, busy, strict=False):
        row += steady
    return _stretched(plan, marks, rows, walk)


def _loop(
    plan: Plan, walk: _Walk, loop: Sequence[tuple[int, Step]]
) -> tuple[float, float, tuple[float, float]]:
    """Seconds of the first iteration and of a steady one, and the shares of a steady one that both queues are busy. Only the first stays drawn."""
    copies = [copy for copy in plan.copies if copy.phase == "decode"]
    again = [copy for copy in copies if not copy.once]
    ends = [walk.now]
    drawn = len(walk.compute), len(walk.copies)
    before: dict[int, float] = {}
    for iteration in range(min(ITERATIONS, plan.decode_repeats)):
        for number, _ in loop:
            walk.ends.pop(number, None)
        walk.run(loop, again if iteration else copies, before)
        before = {number: walk.ends[number] for number, _ in loop}
        ends.append(walk.now)
        if not iteration:
            drawn = len(walk.compute), len(walk.copies)
    del walk.compute[drawn[0] :], walk.copies[drawn[1] :]
    first, period = ends[1] - ends[0], ends[-1] - ends[-2]
    moved = sum(copy.seconds for copy in again)
    return first, period, (sum(step.seconds for _, step in loop) / period, min(1, moved / period))


def _stretched(
    plan: Plan,
    marks: dict[str, tuple[float, float]],
    rows: Sequence[Sequence[Span]],
    walk: _Walk,
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
    for number, step in enumerate(plan.steps):
        if step.phase != "decode":
            alive.append(Span(now, walk.ends[number], alive_bytes(plan, step)))
            now = walk.ends[number]
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
