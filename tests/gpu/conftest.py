"""Devices to run the same tests on, and plans for them. What needs a card is marked `gpu` and skipped without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from executor.cpu import CpuDevice
from executor.device import Device
from executor.probe import base_profile
from planner.checkpoint import spec
from planner.profile import DeviceProfile, load_profile
from tests.hostile.device import HostileDevice
from tests.hostile.lab import SETTINGS, Answer, Lab
from tests.hostile.scheduler import Scheduler, at_random

NO_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA card")
CARD = (pytest.mark.gpu, NO_CARD)
ON_CARD = pytest.param("cuda", marks=CARD)
Open = Callable[[], AbstractContextManager[Device]]


@contextmanager
def _hostile() -> Iterator[Device]:
    scheduler = Scheduler(at_random(3))
    with scheduler.threads(), closing(HostileDevice(scheduler)) as device:
        yield device


def open_device(kind: str) -> AbstractContextManager[Any]:
    """A device of that kind, closed at the end."""
    if kind == "hostile":
        return _hostile()
    if kind == "cpu":
        return closing(CpuDevice())
    from executor.cuda import CudaDevice

    return closing(CudaDevice())


@pytest.fixture(params=["cpu", "hostile", ON_CARD])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Each device in turn: the plain CPU, one whose queues run late, a card."""
    with open_device(request.param) as opened:
        yield opened


@pytest.fixture(params=["cpu", ON_CARD])
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of device that plans are made for."""
    return str(request.param)


def profile_of(kind: str) -> DeviceProfile:
    """The CPU's, or the card's that is here."""
    return load_profile("cpu") if kind == "cpu" else base_profile("cuda")


class Widened(Lab):
    """The same weights as another lab's, stored in float32."""

    source: Lab

    def checkpoint(self, tied: bool) -> spec.Checkpoint:
        if tied not in self._checkpoints:
            name = "hostile-tied" if tied else "hostile"
            self.source.checkpoint(tied)
            (self.folder / name).mkdir()
            for file in (self.source.folder / name).iterdir():
                target = self.folder / name / file.name
                if file.suffix == ".safetensors":
                    wide = {n: t.float() for n, t in load_file(file).items()}
                    save_file(wide, target, {"format": "pt"})
                else:
                    text = file.read_text(encoding="utf-8")
                    target.write_text(text.replace(f'"{self.source.dtype}"', '"float32"'))
            self._checkpoints[tied] = spec.read_checkpoint(self.folder / name)
        return self._checkpoints[tied]


class Pair(NamedTuple):
    """Answers to compare: on the device, by the CPU in the same dtype, and in float32 with the same weights."""

    found: Answer
    same: Answer
    reference: Answer


@dataclass
class Labs:
    """One lab per kind of device and dtype, made when first asked for."""

    folder: Path
    _labs: dict[tuple[str, str], Lab]

    def lab(self, kind: str, dtype: str = "float32") -> Lab:
        if (kind, dtype) not in self._labs:
            folder = self.folder / f"{kind}-{dtype}"
            folder.mkdir()
            self._labs[kind, dtype] = Lab(folder, profile=profile_of(kind), dtype=dtype)
        return self._labs[kind, dtype]

    def wide(self, dtype: str) -> Lab:
        """The CPU's lab in float32 with that dtype's weights."""
        if ("wide", dtype) not in self._labs:
            folder = self.folder / f"wide-{dtype}"
            folder.mkdir()
            lab = Widened(folder)
            lab.source = self.lab("cpu", dtype)
            self._labs["wide", dtype] = lab
        return self._labs["wide", dtype]

    def pair(self, kind: str, dtype: str, setting: str) -> Pair:
        return Pair(
            self.lab(kind, dtype).expected(setting),
            self.lab("cpu", dtype).expected(setting),
            self.wide(dtype).expected(setting),
        )


@pytest.fixture(scope="session")
def labs(tmp_path_factory: pytest.TempPathFactory) -> Labs:
    return Labs(tmp_path_factory.mktemp("labs"), {})


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> str:
    return str(request.param)
