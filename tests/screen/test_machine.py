"""NVML by a small stand-in: what a machine with that card would answer."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from planner import machine
from planner.errors import InputError
from planner.machine import Card, cards, device_auto, match, vram_auto
from planner.profile import load_profile
from planner.units import GIB, MIB

TOTAL, FREE = 16303 * MIB, 15 * GIB


def nvml(*names: str | bytes, total: int = TOTAL, free: int = FREE) -> ModuleType:
    """A module that answers as pynvml does."""

    class NVMLError(Exception):
        pass

    made = ModuleType("pynvml")
    made.__dict__.update(
        NVMLError=NVMLError,
        opened=0,
        nvmlInit=lambda: setattr(made, "opened", made.opened + 1),  # type: ignore[attr-defined]
        nvmlShutdown=lambda: setattr(made, "opened", made.opened - 1),  # type: ignore[attr-defined]
        nvmlDeviceGetCount=lambda: len(names),
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetName=lambda handle: names[handle],
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}a2b-77",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=total, free=free, used=0),
    )
    return made


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = nvml("NVIDIA GeForce RTX 5080")
    monkeypatch.setitem(sys.modules, "pynvml", made)
    return made


@pytest.mark.parametrize(
    ("name", "mib", "profile"),
    [
        ("NVIDIA GeForce RTX 5080", 16303, "rtx-5080-16gb"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, "rtx-4090-laptop-16gb"),
        ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090-24gb"),
        ("NVIDIA RTX 6000 Ada Generation", 49140, "rtx-6000-ada-48gb"),
        ("NVIDIA A100-SXM4-80GB", 81920, "a100-sxm4-80gb"),
        ("NVIDIA A100-SXM4-40GB", 40960, "a100-sxm4-40gb"),
        ("NVIDIA A100 80GB PCIe", 81920, "a100-pcie-80gb"),
        ("NVIDIA H100 80GB HBM3", 81559, "h100-sxm5-80gb"),
        ("NVIDIA H100 PCIe", 81559, "h100-pcie-80gb"),
        ("NVIDIA H200", 143771, "h200-sxm-141gb"),
        ("Tesla T4", 15360, "t4-16gb"),
    ],
)
def test_a_card_is_matched_by_its_name_and_its_memory(name: str, mib: int, profile: str) -> None:
    assert match(Card(0, name, mib * MIB, 0)).id == profile


@pytest.mark.parametrize(
    ("name", "mib", "near"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", 8188, "rtx-4060-ti-16gb"),  # the sister with half the memory
        ("NVIDIA GeForce RTX 3080", 12288, "rtx-3080-10gb"),
        ("NVIDIA GeForce GTX 1080", 8192, "rtx-3070-8gb"),
    ],
)
def test_an_unknown_card_is_refused_with_the_nearest_profiles_and_the_probe(
    name: str, mib: int, near: str
) -> None:
    with pytest.raises(InputError, match="execute --probe --out FILE") as error:
        match(Card(0, name, mib * MIB, 0))
    assert near in str(error.value)
    assert name in str(error.value)


def test_device_auto_takes_the_card_and_the_recorded_command_names_it(
    run: Any, card: ModuleType
) -> None:
    outcome = run("--device", "auto", "--vram", "auto", "--image", "none", "--json")
    assert outcome.code == 0, outcome.err
    assert "--device auto: rtx-5080-16gb: NVIDIA GeForce RTX 5080\n" in outcome.err
    said = " ".join(outcome.err.split())
    assert "15.00 GiB free on NVIDIA GeForce RTX 5080, less a margin of 0.25 GiB" in said
    assert max(map(len, outcome.err.splitlines())) <= 80
    plan = json.loads(outcome.out)
    assert plan["device"]["profile"] == "rtx-5080-16gb"
    assert plan["device"]["budget_bytes"] == FREE - 256 * MIB
    assert "auto" not in plan["request"]
    assert card.opened == 0  # type: ignore[attr-defined]
    again = run(*shlex.split(plan["request"])[1:], "--json")
    assert again.out == outcome.out


def test_bytes_of_an_older_library_are_a_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(b"NVIDIA GeForce RTX 5080"))
    assert device_auto()[0].id == "rtx-5080-16gb"


def test_without_the_library_the_cpu_is_meant_and_that_is_said(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    outcome = run("--device", "auto", "--model", "3b", "--image", "none", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["device"]["profile"] == "cpu"
    assert "--device auto: cpu: nvidia-ml-py is not installed" in outcome.err


def test_without_a_driver_the_cpu_is_meant_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, card: ModuleType
) -> None:
    def refuse() -> None:
        raise card.NVMLError("Driver Not Loaded")  # type: ignore[attr-defined]

    card.nvmlInit = refuse  # type: ignore[attr-defined]
    profile, note = device_auto()
    assert profile.id == "cpu"
    assert "no driver (Driver Not Loaded)" in note


@pytest.mark.parametrize(
    ("visible", "numbers"),
    [("1", [1]), ("0,1", [0, 1]), ("", []), ("-1", []), ("GPU-1a2b", [1]), ("7", [])],
)
def test_cards_that_cuda_would_not_see_do_not_count(
    monkeypatch: pytest.MonkeyPatch, visible: str, numbers: list[int]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml("Tesla T4", "Tesla T4"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found, reason = cards()
    assert [card.number for card in found] == numbers
    assert bool(reason) == (not numbers)


def test_of_several_cards_the_first_is_taken_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(
        sys.modules, "pynvml", nvml("NVIDIA GeForce RTX 5080", "NVIDIA GeForce RTX 5080")
    )
    assert "the first of 2 cards" in device_auto()[1]


def test_vram_auto_wants_the_card_that_was_named(card: ModuleType) -> None:
    with pytest.raises(InputError, match="wanted rtx-4090-24gb in this machine"):
        vram_auto(load_profile("rtx-4090-24gb"))
    assert vram_auto(load_profile("rtx-5080-16gb"))[0] == FREE - 256 * MIB


def test_a_card_that_is_full_has_no_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml("NVIDIA GeForce RTX 5080", free=100 * MIB))
    with pytest.raises(InputError, match="close other programs"):
        vram_auto(load_profile("rtx-5080-16gb"))


def test_vram_auto_on_the_cpu_is_what_the_kernel_calls_available_less_a_margin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  20000000 kB\nMemAvailable:    8388608 kB\nBuffers: 1 kB\n")
    monkeypatch.setattr(machine, "MEMINFO", meminfo)
    budget, note = vram_auto(load_profile("cpu"))
    assert budget == 8 * GIB - 512 * MIB
    assert "8.00 GiB available (MemAvailable), less a margin of 0.50 GiB" in note
    meminfo.write_text("MemTotal:  20000000 kB\n")
    with pytest.raises(InputError, match="give --vram a size"):
        vram_auto(load_profile("cpu"))
    meminfo.unlink()
    with pytest.raises(InputError, match="give --vram a size"):
        vram_auto(load_profile("cpu"))
