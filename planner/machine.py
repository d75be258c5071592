"""The card that is here, and what is free on it: `--device auto` and `--vram auto`.

NVML tells both without torch and without a context on the card; the package nvidia-ml-py (extra `cuda`) brings its
Python side. Where it or the driver is missing, the machine has no card that could be used, and the CPU is meant.
"""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from planner.errors import InputError
from planner.profile import DeviceProfile, list_profiles, load_profile
from planner.units import MIB, format_gib

MEMINFO = Path("/proc/meminfo")
CARD_MARGIN_BYTES = 256 * MIB  # a desktop's windows come and go
HOST_MARGIN_BYTES = 512 * MIB  # so do other programs' pages
SAME_MEMORY = 0.06  # nvidia-smi's total beside a profile's: ECC and the driver's version move it


class Card(NamedTuple):
    """What NVML says of one card."""

    number: int
    name: str
    total_bytes: int
    free_bytes: int


def cards() -> tuple[list[Card], str]:
    """The cards that CUDA would use, in NVML's order; none, and the reason, where there are none."""
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return [], "nvidia-ml-py is not installed (pip install 'stowplan[cuda]')"
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return [], f"NVML finds no driver ({error})"
    try:
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name, memory = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetMemoryInfo(handle)
            # versions before 11.515 answer in bytes
            text = name.decode() if isinstance(name, bytes) else name
            uuid = nvml.nvmlDeviceGetUUID(handle)
            if _visible(index, uuid.decode() if isinstance(uuid, bytes) else uuid):
                found.append(Card(index, text, int(memory.total), int(memory.free)))
    except nvml.NVMLError as error:
        return [], f"NVML does not answer ({error})"
    finally:
        nvml.nvmlShutdown()
    return found, "" if found else "NVML shows no card that CUDA_VISIBLE_DEVICES leaves visible"


def _visible(index: int, uuid: str) -> bool:
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return True
    words = [word.strip() for word in wanted.split(",") if word.strip()]
    return any(word == str(index) or (len(word) > 4 and uuid.startswith(word)) for word in words)


def device_auto() -> tuple[DeviceProfile, str]:
    """The profile of the first card here, or the CPU's, and where that is known from; InputError where no profile is known for the card."""
    found, reason = cards()
    if not found:
        return load_profile("cpu"), f"--device auto: cpu: {reason}"
    profile = match(found[0])
    note = f"--device auto: {profile.id}: {found[0].name}"
    if len(found) > 1:
        note += f", the first of {len(found)} cards; CUDA_VISIBLE_DEVICES chooses another"
    return profile, note


def vram_auto(device: DeviceProfile) -> tuple[int, str]:
    """Bytes free on that device now, less a margin, and how they come about; InputError where the device is not here."""
    if device.kind == "cpu":
        free = _available_bytes()
        margin, what = HOST_MARGIN_BYTES, "available (MemAvailable)"
    else:
        found, reason = cards()
        same = [card for card in found if _matches(card, device)]
        if not same:
            here = ", ".join(card.name for card in found) or reason
            raise InputError(
                f"--vram auto: wanted {device.id} in this machine, found {here}; "
                "give --vram a size, or --device auto"
            )
        free, what = same[0].free_bytes, f"free on {same[0].name}"
        margin = CARD_MARGIN_BYTES
    if free <= margin:
        raise InputError(
            f"--vram auto: wanted more than the margin of {format_gib(margin)}, found {format_gib(free)} "
            f"{what}; close other programs, or give --vram a size"
        )
    # whole MiB: the plan's command stays readable
    budget = (free - margin) // MIB * MIB
    note = f"--vram auto: {format_gib(budget)}: {format_gib(free)} {what}, less a margin of {format_gib(margin)}"
    return budget, note


def _available_bytes() -> int:
    try:
        text = MEMINFO.read_text()
    except OSError as error:
        raise InputError(
            f"--vram auto: wanted {MEMINFO} to see what memory is available, found {error.strerror}; "
            "give --vram a size"
        ) from None
    line = re.search(r"^MemAvailable:\s+([0-9]+) kB$", text, re.MULTILINE)
    if line is None:
        raise InputError(
            f"--vram auto: wanted MemAvailable in {MEMINFO}, found none; give --vram a size"
        )
    return int(line[1]) * 1024


# --- names --------------------------------------------------------------------------------------------------------

_NOISE = {"nvidia", "geforce", "tesla", "quadro", "generation", "gpu", "graphics", "device"}
# NVML's names beside the profiles': the H100 and H200 modules say what memory they have, not that they are modules
_ALSO = {"hbm3": "sxm5", "hbm3e": "sxm"}
_MODULES = {"sxm", "sxm5"}


def _words(name: str) -> frozenset[str]:
    """What identifies a card in its name; sizes of memory are compared as bytes."""
    words = (_ALSO.get(word, word) for word in re.findall(r"[a-z0-9]+", name.lower()))
    return frozenset(word for word in words if word not in _NOISE and not word.endswith("gb"))


def _matches(card: Card, profile: DeviceProfile) -> bool:
    """Same words and about the same memory; of a module's word it is enough that one of the names lacks it."""
    difference = _words(card.name) ^ _words(profile.name)
    apart = abs(card.total_bytes - profile.memory_total_bytes)
    same = not difference or (len(difference) == 1 and difference <= _MODULES)
    return same and apart <= SAME_MEMORY * profile.memory_total_bytes


def match(card: Card) -> DeviceProfile:
    """The profile of a card; InputError names the nearest ones where none is known."""
    profiles = [p for known in list_profiles() if (p := load_profile(known)).kind == "cuda"]
    for profile in profiles:
        if _matches(card, profile):
            return profile
    mine = _words(card.name)
    profiles.sort(
        key=lambda p: (-len(mine & _words(p.name)), abs(p.memory_total_bytes - card.total_bytes))
    )
    raise InputError(
        f"--device auto: wanted a profile of {card.name} with {format_gib(card.total_bytes)}, found none; "
        f"the nearest are {', '.join(p.id for p in profiles[:3])}; take one with --device, "
        "or measure this card: execute --probe --out FILE"
    )
