"""A conversation about two sets of images, held in a session and, for comparison, as runs of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from executor.device import Device
from executor.image import ArrayPixels
from executor.record import Record
from executor.run import Session, run
from planner.plan import Plan
from tests.hostile.device import HostileDevice
from tests.hostile.lab import SETTINGS, Lab
from tests.hostile.scheduler import Policy, Scheduler


class Turn(NamedTuple):
    """One request: its own tokens behind the images, and which images."""

    question: tuple[int, ...]
    images: int
    new_tokens: int = 4
    before: int = 5  # tokens before the first image


# a question as long as the plan's, a shorter one, the shortest; other images; an answer that ends at once
TURNS = (
    Turn(tuple(range(40, 47)), 0),
    Turn((301, 302, 303), 0),
    Turn(tuple(range(60, 66)), 0),
    Turn((301, 302, 303), 1),
    Turn(tuple(range(70, 77)), 1, 1),
    Turn((90,), 1),
    Turn(tuple(range(40, 47)), 0),
)


class Said(NamedTuple):
    """What came of one turn."""

    tokens: tuple[int, ...]
    logits: torch.Tensor
    record: Record


@dataclass
class Talks:
    """The hostile lab's plans, in conversations."""

    lab: Lab
    _alone: dict[tuple[str, Turn], Said] = field(default_factory=dict)
    _held: dict[str, list[Said]] = field(default_factory=dict)

    def ids(self, name: str, turn: Turn) -> tuple[int, ...]:
        whole = self.lab.ids(self.lab.checkpoint(self.lab.settings[name].tied))
        return (*whole[5 - turn.before : -7], *turn.question)

    def images(self, name: str, number: int) -> tuple[ArrayPixels, ...]:
        """Fresh objects of the same values for the same number."""
        checkpoint = self.lab.checkpoint(self.lab.settings[name].tied)
        draws = torch.Generator().manual_seed(number)
        values = checkpoint.shape.vision.patch_values
        return tuple(
            ArrayPixels(torch.randn(image.patches, values, generator=draws), image)
            for image in self.lab.workload(checkpoint).images
        )

    def alone(self, name: str, turn: Turn) -> Said:
        """A run of its own on the CPU."""
        if (name, turn) not in self._alone:
            path = self.lab.folder / "alone.safetensors"
            request = replace(
                self.lab.request(name),
                images=self.images(name, turn.images),
                prompt=self.ids(name, turn),
                max_new_tokens=turn.new_tokens,
                save_outputs=path,
            )
            result = run(self.lab.plan(name), request)
            self._alone[name, turn] = Said(result.tokens, load_file(path)["logits"], result.record)
        return self._alone[name, turn]

    def held(
        self,
        name: str,
        device: Device | None = None,
        *,
        plan: Plan | None = None,
        turns: tuple[Turn, ...] = TURNS,
        stop: tuple[int, ...] = (),
    ) -> list[Said]:
        """All turns in one session, dead ranges full of NaN."""
        images = [self.images(name, number) for number in (0, 1)]
        path = self.lab.folder / "held.safetensors"
        said = []
        request = replace(self.lab.request(name, poison=True), save_outputs=None, stop=stop)
        with Session(plan or self.lab.plan(name), request, device) as session:
            for turn in turns:
                result = session.ask(
                    self.ids(name, turn),
                    images[turn.images],
                    max_new_tokens=turn.new_tokens,
                    save_outputs=path,
                )
                said.append(Said(result.tokens, load_file(path)["logits"], result.record))
        return said

    def on_cpu(self, name: str) -> list[Said]:
        if name not in self._held:
            self._held[name] = self.held(name)
        return self._held[name]

    def hostile(
        self,
        name: str,
        policy: Policy,
        turns: tuple[Turn, ...] = TURNS,
        *,
        stop: tuple[int, ...] = (),
    ) -> list[Said]:
        scheduler = Scheduler(policy)
        with scheduler.threads():
            return self.held(name, HostileDevice(scheduler), turns=turns, stop=stop)


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Talks:
    return Talks(Lab(tmp_path_factory.mktemp("sessions")))


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> str:
    """Each setting's name in turn."""
    return str(request.param)
