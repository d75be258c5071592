"""Tiny checkpoints, plans that cover every lever, and runs of them on the CPU and on the hostile device."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from executor import make_checkpoint
from executor.device import Device
from executor.generate import Sampling
from executor.image import ArrayPixels
from executor.order import problems
from executor.prepare import Request as RunRequest
from executor.random_files import SPECS
from executor.run import run
from executor.weights import Reader
from planner import search
from planner.checkpoint import spec
from planner.errors import StowplanError
from planner.plan import Plan
from planner.plan.program import Copy, HostUnit
from planner.plan.shapes import TensorLocation, Workload
from planner.plan.tiles import Tiles
from planner.plan.words import Order
from planner.profile import DeviceProfile, load_profile
from planner.schedule import Choice, PhaseResidency
from planner.workload import parse_image
from tests.hostile.device import HostileDevice
from tests.hostile.scheduler import Blocked, Policy, Scheduler, policies
from tests.hostile.waits import Mutant
from tests.tiles import LARGER, ONE_WINDOW
from tests.tiles import ODD as UNEVEN

NEW_TOKENS = 4  # three rounds of decode: as many as executor.order unrolls
PIXELS = {"min_pixels": 3136, "max_pixels": 12845056}
WHOLE = LARGER.model_copy(update={"query_heads": 4, "prompt_heads": 2, "vocabulary_rows": 640})
ODD = UNEVEN.model_copy(update={"vocabulary_rows": 250})
SMALLEST = ONE_WINDOW.model_copy(update={"vocabulary_rows": 160})
MIDDLE = SMALLEST.model_copy(update={"prompt_rows": 16, "prompt_mlp_rows": 16})


class Setting(NamedTuple):
    """One setting of the levers; residency as (attention, MLP) and (attention, MLP, lm_head) counts."""

    order: Order
    together: bool
    depth: int
    vision: tuple[int, int]
    prefill: tuple[int, int, int]
    decode: tuple[int, int, int]
    tiles: Tiles
    tied: bool = False
    kept: bool = False  # what prefill and decode both bring stays in host memory


NONE, ALL = (0, 0, 0), (3, 3, 9)
SETTINGS = {
    "all resident, first": Setting("all_first", True, 1, (3, 3), ALL, ALL, WHOLE),
    "all resident, in turn": Setting("vision_then_llm", True, 1, (3, 3), ALL, ALL, ODD),
    "all streamed, 1 slot": Setting("vision_then_llm", True, 1, (0, 0), NONE, NONE, SMALLEST),
    "all streamed, 2 slots": Setting("vision_then_llm", False, 2, (0, 0), NONE, NONE, ODD),
    "all streamed, 3 slots": Setting("vision_then_llm", True, 3, (0, 0), NONE, NONE, WHOLE),
    "streamed, tied, lm_head in tiles": Setting(
        "vision_then_llm", True, 2, (0, 0), (3, 0, 0), (3, 0, 0), MIDDLE, tied=True
    ),
    "vision streamed, LLM prefetched": Setting("prefetch", True, 2, (0, 0), ALL, ALL, WHOLE),
    "half prefetched, grows after prefill": Setting(
        "prefetch", False, 2, (0, 2), (1, 1, 0), (2, 2, 3), ODD
    ),
    "half of each, all first": Setting("all_first", False, 3, (2, 1), (1, 2, 1), (1, 2, 1), MIDDLE),
    "all streamed, kept in host memory": Setting(
        "vision_then_llm", True, 2, (0, 0), NONE, NONE, MIDDLE, kept=True
    ),
    "nothing in prefill, all in decode": Setting(
        "vision_then_llm", True, 3, (3, 0), NONE, ALL, ODD
    ),
}


def drawn(seed: int) -> Setting:
    """A setting of which every lever is drawn; no more is resident in prefill than in decode."""
    draws = random.Random(seed)
    tiles = draws.choice((WHOLE, ODD, MIDDLE))
    units = (3, 3, -(-640 // tiles.vocabulary_rows))
    decode = tuple(draws.randint(0, most) for most in units)
    attn, mlp, head = (draws.randint(0, most) for most in decode)
    return Setting(
        order=draws.choice(("all_first", "vision_then_llm", "prefetch")),
        together=draws.random() < 0.5,
        depth=draws.randint(1, 3),
        vision=(draws.randint(0, 3), draws.randint(0, 3)),
        prefill=(attn, mlp, head),
        decode=(decode[0], decode[1], decode[2]),
        tiles=tiles,
        tied=draws.random() < 0.3,
        kept=draws.random() < 0.3,
    )


def _kept(plan: Plan) -> Plan:
    """The plan with every unit that both prefill and decode bring kept in host memory from the first copy on."""
    brought = [{c.unit for c in plan.copies if c.phase == phase} for phase in ("prefill", "decode")]
    places, end = [], 0
    for unit in plan.units:
        if unit.id in brought[0] & brought[1]:
            places.append(HostUnit(unit=unit.id, offset_bytes=end, size_bytes=unit.size_bytes))
            end += unit.size_bytes
    names = {place.unit for place in places}
    copies = tuple(
        copy.model_copy(update={"source": "host"})
        if copy.phase == "decode" and copy.unit in names
        else copy
        for copy in plan.copies
    )
    return plan.model_copy(update={"copies": copies, "host_units": tuple(places)})


class Answer(NamedTuple):
    """What a run gave, by name: features, logits, tokens; `error` where it ended with one."""

    tensors: dict[str, torch.Tensor]
    error: BaseException | None = None

    def equals(self, other: Answer) -> bool:
        """Bit for bit."""
        if self.error is not None or self.tensors.keys() != other.tensors.keys():
            return False
        return all(torch.equal(tensor, other.tensors[n]) for n, tensor in self.tensors.items())


class Seen(NamedTuple):
    """The policy that showed it; the error that the run ended with, None where it gave another answer."""

    policy: str
    error: BaseException | None


@dataclass
class Lab:
    """The checkpoints lie in `folder`; plans and answers are kept. Plans are for the profile's device."""

    folder: Path
    profile: DeviceProfile = field(default_factory=lambda: load_profile("cpu"))
    dtype: str = "float32"
    settings: dict[str, Setting] = field(default_factory=lambda: dict(SETTINGS))
    _checkpoints: dict[bool, spec.Checkpoint] = field(default_factory=dict)
    _plans: dict[str, Plan] = field(default_factory=dict)
    _answers: dict[str, Answer] = field(default_factory=dict)

    def checkpoint(self, tied: bool) -> spec.Checkpoint:
        """Three blocks and three layers."""
        if tied not in self._checkpoints:
            name = "hostile-tied" if tied else "hostile"
            SPECS[name] = SPECS["tiny"]._replace(
                layers=3, vision_depth=3, full_attention_blocks=(1,), tied=tied
            )
            try:
                make_checkpoint.make_random_checkpoint(name, self.folder / name, dtype=self.dtype)
            finally:
                del SPECS[name]
            self._checkpoints[tied] = spec.read_checkpoint(self.folder / name)
        return self._checkpoints[tied]

    def workload(self, checkpoint: spec.Checkpoint) -> Workload:
        images = tuple(parse_image(size, **PIXELS) for size in ("56x84", "140x112"))
        rows = len(self.ids(checkpoint))
        return Workload(
            images=images,
            **PIXELS,
            prompt_tokens=rows,
            prompt_is_bound=False,
            max_new_tokens=NEW_TOKENS,
            context_tokens=rows + NEW_TOKENS,
        )

    def ids(self, checkpoint: spec.Checkpoint) -> list[int]:
        """Text, two images of 6 and 20 tokens, text."""
        special = checkpoint.shape.token_ids
        ids = list(range(10, 15))
        for tokens in (6, 20):
            ids += [special.vision_start, *[special.image] * tokens, special.vision_end]
        return [*ids, *range(40, 47)]

    def plan(self, name: str) -> Plan:
        """The plan of a setting; the executor finds nothing wrong with its order."""
        if name not in self._plans:
            setting = self.settings[name]
            checkpoint = self.checkpoint(setting.tied)
            request = search.Request(checkpoint, self.workload(checkpoint), None)
            heads = -(-640 // setting.tiles.vocabulary_rows)
            choice = Choice(
                order=setting.order,
                images_together=setting.together,
                depth=setting.depth,
                vision=PhaseResidency(*setting.vision),
                prefill=PhaseResidency(*setting.prefill[:2], min(heads, setting.prefill[2])),
                decode=PhaseResidency(*setting.decode[:2], min(heads, setting.decode[2])),
                tiles=setting.tiles,
            )
            plan = search.build(request, self.profile, choice)
            plan = _kept(plan) if setting.kept else plan
            assert problems(plan) == []
            self._plans[name] = plan
        return self._plans[name]

    def expected(self, name: str) -> Answer:
        """The plain device's answer under the right plan."""
        if name not in self._answers:
            self._answers[name] = self._run(name, self.plan(name), None)
        return self._answers[name]

    def locations(self, name: str) -> dict[str, TensorLocation]:
        return dict(self.checkpoint(self.settings[name].tied).tensors)

    def hostile(self, name: str, policy: Policy, mutant: Mutant | None = None) -> Answer:
        """What the hostile device answers under a policy, with every wait or without one."""
        scheduler = Scheduler(policy)
        device = HostileDevice(scheduler, without=mutant.without if mutant else ())
        plan = (mutant.plan if mutant else None) or self.plan(name)
        with scheduler.threads(), _lacking(mutant):
            try:
                return self._run(name, plan, device)
            except (StowplanError, Blocked) as error:
                return Answer({}, error)

    def seen(
        self,
        name: str,
        mutant: Mutant,
        *,
        seeds: int,
        every_rank: bool = False,
        stops: Sequence[int] = (),
    ) -> Seen | None:
        """How the mutant first gives another answer or none; None where it gives the same under every policy."""
        for policy_name, policy in policies(seeds, every_rank=every_rank, stops=stops):
            answer = self.hostile(name, policy, mutant)
            if not answer.equals(self.expected(name)):
                return Seen(policy_name, answer.error)
        return None

    def run(self, name: str, device: HostileDevice, scheduler: Scheduler) -> Answer:
        """The right plan on a device of the caller's."""
        with scheduler.threads():
            return self._run(name, self.plan(name), device)

    def _run(self, name: str, plan: Plan, device: Device | None) -> Answer:
        request = self.request(name, poison=device is not None)
        run(plan, request, device)
        assert request.save_outputs is not None
        return Answer(load_file(request.save_outputs))

    def request(self, name: str, *, poison: bool = False) -> RunRequest:
        checkpoint = self.checkpoint(self.settings[name].tied)
        draws = torch.Generator().manual_seed(5)
        shape = checkpoint.shape.vision
        pixels = [
            ArrayPixels(torch.randn(image.patches, shape.patch_values, generator=draws), image)
            for image in self.workload(checkpoint).images
        ]
        return RunRequest(
            locations=checkpoint.tensors,
            images=tuple(pixels),
            prompt=tuple(self.ids(checkpoint)),
            device=self.profile.kind,
            stop=(),
            sampling=Sampling(),
            save_outputs=self.folder / "outputs.safetensors",
            poison=poison,
        )


@contextmanager
def _lacking(mutant: Mutant | None) -> Iterator[None]:
    """The executor runs a plan that it would refuse, and its reader leaves out the mutant's rounds."""
    if mutant is None:
        yield
        return
    skipped = mutant.rounds

    class RoundsReader(Reader):
        def _after(self, copy: Copy, iteration: int) -> tuple[str | None, int]:
            if (copy.id, iteration > 0) in skipped:
                return None, 0
            return super()._after(copy, iteration)

    with patch("executor.prepare.check_order"), patch("executor.run.Reader", RoundsReader):
        yield
