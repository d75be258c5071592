"""Whole settings worked out by index: seconds of both queues over all parts, and the most bytes that are alive or held.

With vision before the language model the parts do not overlap: seconds are the sum of theirs, and the peak is the
highest of theirs. Otherwise copies for prefill lie beside vision's steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from operator import add
from typing import NamedTuple

from planner.parts import Parts
from planner.queues import Beside, Job, line, queue
from planner.schedule import Choice


def both(steps: Sequence[float], jobs: Sequence[Job], beside: Beside) -> tuple[float, float]:
    """Seconds from both queues idle to the end of the last step: with a patient queue, and with another."""
    if not steps:
        return 0.0, 0.0
    patient, other = (queue(steps, jobs, patient=patient) for patient in (True, False))
    first = line(steps, [jobs[number] for number in patient], beside)[0][-1]
    if patient == other:
        return first, first
    return first, line(steps, [jobs[number] for number in other], beside)[0][-1]


class Worked(NamedTuple):
    """Seconds of a setting, the most arena bytes alive, and the most bytes that are at least held (the CPU: with its steps' blocks)."""

    seconds: float
    live: int
    held: int


def plain_bytes(parts: Parts, choice: Choice) -> tuple[int, int]:
    """The most arena bytes alive, and the most bytes at least held, with vision before the language model."""
    tiles = choice.tiles
    frames = parts.frames(choice, first=False)
    live = [held for phase, frame in frames.items() for held in parts.live(phase, frame, tiles)]
    return max(live), max(parts.held(phase, frame, tiles) for phase, frame in frames.items())


def worked(parts: Parts, choice: Choice) -> Worked:
    """Seconds and bytes of one setting, exactly as its program and timeline have them."""
    tiles, first = choice.tiles, choice.order == "all_first"
    frames = parts.frames(choice, first=first)
    vision, prefill = frames["vision"], frames["prefill"]
    live = parts.live("vision", vision, tiles)
    peak = max([*live, *parts.live("prefill", prefill, tiles)])
    held = max(parts.held("vision", vision, tiles), parts.held("prefill", prefill, tiles))
    rest = 0.0
    if parts.repeats:
        decode = frames["decode"]
        peak = max(peak, *parts.live("decode", decode, tiles))
        held = max(held, parts.held("decode", decode, tiles))
        loop_ = parts.looped(choice.decode, choice.prefill, choice.depth, tiles)
        rest = loop_.seconds(parts.repeats)
    beside = parts.problem.costs.beside
    vision_steps = parts.seconds("vision", vision.bare, tiles)
    prefill_steps = parts.seconds("prefill", prefill.bare, tiles)
    if choice.order == "vision_then_llm" or not (first or live):
        pairs = zip(
            both(vision_steps, vision.jobs, beside),
            both(prefill_steps, prefill.jobs, beside),
            strict=True,
        )
        return Worked(min(v + p for v, p in pairs) + rest, peak, held)
    room = peak - choice.spare_bytes
    count, sizes = len(live), [prefill.sizes[number] for number in prefill.early]
    starts = [0] * len(sizes) if first else early_starts([room - held for held in live], sizes)
    jobs = [job._replace(need=job.need + count, after=job.after + count) for job in prefill.jobs]
    change = [0] * (count + 1)
    for number, start, size in zip(prefill.early, starts, sizes, strict=True):
        need = 0 if first else jobs[number].need
        jobs[number] = jobs[number]._replace(need=need, after=start - 1)
        change[start] += size
    arrived = list(accumulate(change[:count]))
    peak = max([peak, *map(add, live, arrived)])
    if parts.problem.on_cpu:
        beside_early = replace(
            vision,
            live=list(map(add, vision.live, arrived)),
            held=list(map(add, vision.held, arrived)),
        )
        held = max(held, parts.held("vision", beside_early, tiles))
    everything = sorted([*vision.jobs, *jobs], key=lambda job: job.need)
    return Worked(min(both([*vision_steps, *prefill_steps], everything, beside)) + rest, peak, held)


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
