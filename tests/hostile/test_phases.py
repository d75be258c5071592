"""The record of a phase holds the copies that the plan counts to it, and none of the next phase's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, groupby

import torch
from safetensors.torch import load_file

from executor.arena import complement
from executor.device import Chunk, Range
from executor.files import Files
from executor.host_tier import Move
from executor.record import Record
from executor.run import run
from planner.plan import Plan
from planner.plan.program import Copy
from tests.hostile.device import HostileDevice
from tests.hostile.lab import Answer, Lab
from tests.hostile.scheduler import EXTREMES, Scheduler, at_random, by_rank


class Counting(HostileDevice):
    """Holds what copies bring from the moment they may land until it is given back, as pages of the CPU's arena are."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(scheduler)
        self.scheduler = scheduler
        self._held = torch.zeros(0, dtype=torch.bool)
        self._peak = 0
        self.given_back_from: list[int] = []

    def allocate_arena(self, size_bytes: int) -> torch.Tensor:
        self._held = torch.zeros(size_bytes, dtype=torch.bool)
        return super().allocate_arena(size_bytes)

    def fill(self, chunk: Chunk, files: Files) -> None:
        self._bring(chunk.targets)
        super().fill(chunk, files)

    def move(self, moves: Sequence[Move]) -> None:
        self._bring([move.target for move in moves])
        super().move(moves)

    def _bring(self, ranges: Sequence[Range]) -> None:
        # behind what the copy waits for
        self._hostile.copy.put(partial(self._count, ranges))

    def _count(self, ranges: Sequence[Range]) -> None:
        for start, stop in ranges:
            self._held[start:stop] = True
        self._peak = max(self._peak, self.held_bytes())

    def release(self, ranges: Sequence[Range]) -> None:
        # so does giving back
        self.scheduler.pause()
        self.given_back_from.append(self.held_bytes())
        for start, stop in ranges:
            self._held[start:stop] = False

    def held_bytes(self) -> int:  # type: ignore[override]  # here it is told
        return int(self._held.sum())

    def reset_peak(self) -> None:
        self._peak = self.held_bytes()

    def peak_bytes(self) -> int:  # type: ignore[override]
        # reading it takes time, in which copies go on that may
        self.scheduler.pause()
        return self._peak


def recorded(lab: Lab, name: str, device: HostileDevice, scheduler: Scheduler) -> Record:
    """The record of a run that gives the plain CPU's answer."""
    request = lab.request(name, poison=True)
    with scheduler.threads():
        record = run(lab.plan(name), request, device).record
    assert request.save_outputs is not None
    assert Answer(load_file(request.save_outputs)).equals(lab.expected(name))
    return record


def first_steps(plan: Plan) -> list[tuple[Copy, int]]:
    """Every copy, and the number of the first step beside which it may land, the copies before it having begun."""
    at = {step.id: number for number, step in enumerate(plan.steps)}
    loop = next(number for number, step in enumerate(plan.steps) if step.phase == "decode")
    own = [
        loop if copy.wraps else 0 if copy.after is None else at[copy.after] + 1
        for copy in plan.copies
    ]
    return list(zip(plan.copies, accumulate(own, max), strict=True))


def planned(plan: Plan) -> dict[str, tuple[int, int]]:
    """Of every phase before decode: bytes that copies bring in it, and the most of all that copies brought and is still held.

    To `load` belong, where all weights come first, those that the first step waits for.
    """
    units = {unit.id: unit for unit in plan.units}
    buffers = {buffer.name: buffer for buffer in plan.buffers}
    firsts = first_steps(plan)
    held = torch.zeros(plan.prediction.arena_bytes, dtype=torch.bool)
    loaded = plan.steps[0].waits if plan.levers.order == "all_first" else ()
    sizes = {unit.id: sum(tensor.size_bytes for tensor in unit.tensors) for unit in plan.units}
    load = sum(sizes[copy.unit] for copy in plan.copies if copy.id in loaded)
    found = {"load": (load, load)}
    for phase, steps in groupby(enumerate(plan.steps), lambda step: step[1].phase):
        numbers = [number for number, _ in steps]
        alive = [
            (b.offset_bytes, b.offset_bytes + b.size_bytes)
            for b in plan.buffers
            if any(birth <= numbers[0] < death for birth, death in b.lifetimes)
        ]
        for start, stop in complement(alive, len(held)):
            held[start:stop] = False
        brought = 0
        for copy, first in firsts:
            for tensor in units[copy.unit].tensors if first in numbers else ():
                start = buffers[copy.buffer].offset_bytes + tensor.offset_bytes
                held[start : start + tensor.size_bytes] = True
                brought += tensor.size_bytes if copy.id not in loaded else 0
        found[str(phase)] = brought, int(held.sum())
    del found["decode"]
    return found


def copied(record: Record) -> dict[str, int]:
    """Bytes brought by phase."""
    return {str(phase.phase): phase.copied_bytes for phase in record.phases}


def test_a_phase_holds_what_the_plan_counts_to_it_and_its_peak_no_copies_of_the_next(
    lab: Lab, setting: str
) -> None:
    wanted = planned(lab.plan(setting))
    for extreme in ("copies early, compute late", "compute early, copies late"):
        scheduler = Scheduler(by_rank(*EXTREMES[extreme]))
        record = recorded(lab, setting, Counting(scheduler), scheduler)
        peaks = {phase.phase: phase.peak_bytes for phase in record.phases}
        if extreme.startswith("copies early"):
            found = {phase: (copied(record)[phase], peaks[phase]) for phase in wanted}  # type: ignore[index]
            assert found == wanted
        for phase, (_, most) in wanted.items():
            assert peaks[phase] <= most, (extreme, phase)  # type: ignore[index,operator]


def test_what_a_phase_gives_back_is_gone_before_the_next_ones_copies_land(
    lab: Lab, setting: str
) -> None:
    wanted = planned(lab.plan(setting))
    # the host last: copies go on in each of its calls
    scheduler = Scheduler(by_rank("reader", "copy", "compute", "main"))
    device = Counting(scheduler)
    recorded(lab, setting, device, scheduler)
    # priming gave back before
    assert device.given_back_from[-2:] == [wanted["vision"][1], wanted["prefill"][1]]


def test_what_copies_bring_is_counted_to_no_earlier_phase_where_none_is_held_back(
    lab: Lab, setting: str
) -> None:
    # as on a card, which holds the arena whole: the copy queue goes on at once
    for policy in (by_rank(*EXTREMES["copies early, compute late"]), at_random(1)):
        scheduler = Scheduler(policy)
        found = copied(recorded(lab, setting, HostileDevice(scheduler), scheduler))
        early = most = 0
        wanted = planned(lab.plan(setting))
        # nor is one of the tower held back until the first step
        load = wanted.pop("load")[0]
        wanted["vision"] = wanted["vision"][0] + load, 0
        found["vision"] += found.pop("load")
        for phase, (brought, _) in wanted.items():
            early, most = early + found[phase], most + brought
            assert early <= most, phase


def test_copies_wait_for_a_phases_record_only_where_they_add_to_it(lab: Lab) -> None:
    name = "all streamed, 2 slots"
    moved: dict[type, list[int]] = {Watched: [], WatchedCounting: []}
    for sort, found in moved.items():
        scheduler = Scheduler(by_rank(*EXTREMES["copies early, compute late"]))
        device = sort(scheduler)
        recorded(lab, name, device, scheduler)
        found += device.moved
    plan = lab.plan(name)
    last = max(number for number, step in enumerate(plan.steps) if step.phase == "vision")
    # the host waits after priming, and at the ends of load and of vision
    counted = sum(first <= last for _, first in first_steps(plan))
    assert moved[WatchedCounting][2] == counted < moved[Watched][2]


class Watched(HostileDevice):
    """Notes how many copies it has seen whenever the host has waited for everything."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(scheduler)
        self.moved: list[int] = []

    def synchronize(self) -> None:
        super().synchronize()
        self.moved.append(self._counts.get("copy", -1) + 1)


class WatchedCounting(Watched, Counting):
    """The same of a device that tells peaks."""
