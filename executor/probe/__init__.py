"""Measure this machine and write it down as a device profile that `plan --device FILE` accepts.

    kernels · rates of memory and files, beside: of both together · host: images, new products · runs of small models → figures: the profile

Where a figure cannot be measured it keeps what the profile that comes with the package says, and its source says so.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from executor import memory
from executor.cuda import lacking
from executor.probe.bench import FULL, SHORT, Bench, Busy, buffer
from executor.probe.figures import attention_kernel, base_profile, measured_profile, summary
from executor.probe.host import create_s, image_pixels_per_s, pixel_values_per_s
from executor.probe.kernels import kernels, sampling
from executor.probe.rates import measured_rates
from executor.probe.runs import KINDS, told, with_steps, with_told
from planner.errors import RunFailed
from planner.plan import write_text
from planner.profile import DeviceProfile, Kernels, Measured, dumps
from planner.units import MIB

__all__ = ["base_profile", "probe", "run_probe"]

TELLS_DISTURBED = 0.1  # of the cores, taken by others: then the figures are worth little
ROUNDS = 3  # over all tables: a machine that is slow for a second has its figures outvoted

Say = Callable[[str], None]


def probe(
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    short: bool = False,
    folder: Path | None = None,
    on_progress: Say = lambda what: None,
) -> DeviceProfile:
    """The profile of this machine. `folder` lies on the disk that checkpoints are read from; `short` takes seconds and is for tests."""
    sizes = SHORT if short else FULL
    base = base_profile(device)
    memory.fix_malloc_thresholds()
    busy = Busy()
    where = torch.device(device)
    synchronize = torch.cuda.synchronize if device == "cuda" else _nothing
    with torch.inference_mode():
        space, keep = buffer(sizes.buffer_bytes, where)
        bench = Bench(space, sizes, attention_kernel(base), synchronize, on_progress)
        dtypes = torch.bfloat16 if base.bf16 else torch.float16, torch.float32
        rounds = [
            [kernels(bench, dtype).model_dump() for dtype in dtypes]
            for _ in range(1 if short else ROUNDS)
        ]
        half, whole = (Kernels.model_validate(each) for each in _medians(rounds))
        on_progress("memory and files")
        rates = measured_rates(bench, folder, 8 * MIB if short else 256 * MIB)
        create = create_s(bench, (97, 161, 225, 289, 353), 640)
        wide = 0.0 if short or device != "cpu" else create_s(bench, (524, 540, 556), 5120)
        opening = image_pixels_per_s(folder, 256 if short else 1536)
        drawn = sampling((640, 4096) if short else (640, 4096, 151_936), sizes.seconds)
        pixels = pixel_values_per_s(112 if short else 448)
        del bench, space, keep
    measured = Measured(
        bits16=half,
        float32=whole,
        pixel_values_per_s=pixels,
        sample=drawn,
        step_s=dict.fromkeys(KINDS, (20e-6, 20e-6)),
        copy_s=50e-6,
        first_touch_bytes_per_s=rates.first_touch,
        create_s=create,
        create_wide_s=wide,
        image_pixels_per_s=opening,
        beside=(rates.beside.compute, rates.beside.copy),
        favoured=rates.beside.favoured,
    )
    found = measured_profile(base, measured, rates, device)
    if device == "cpu":
        on_progress("runs of small models")
        bare = with_steps(found, dict.fromkeys(KINDS, (0.0, 0.0)))
        repeats = 1 if short else 5
        near = told(bare, "tiny", folder, repeats)
        far = near if short else told(bare, "mini", folder, repeats)
        found = with_told(found, near, far)
    others = busy.of_others()
    if others is not None and others[0] > TELLS_DISTURBED * others[1]:
        share = others[0] / others[1]
        note = f"{found.note}; other processes took {share:.0%} of the cores meanwhile: measure again on a quiet machine"
        found = found.model_copy(update={"note": note})
    return DeviceProfile.model_validate(found.model_dump())


def run_probe(
    out: Path | None,
    *,
    device: str | None = None,
    folder: Path | None = None,
    short: bool = False,
    quiet: bool = False,
) -> DeviceProfile:
    """Measure, then write the profile to `out` or stdout, with a summary on stderr."""
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet, highlight=False)
    why_not = lacking()
    chosen = device or ("cpu" if why_not else "cuda")
    if chosen == "cuda" and why_not:
        raise RunFailed(f"--probe --device cuda: {why_not}, or probe with --device cpu")
    begun = time.perf_counter()
    with console.status("probing") as status:
        profile = probe(
            device="cuda" if chosen == "cuda" else "cpu",
            short=short,
            folder=folder or (out.parent if out else None),
            on_progress=lambda what: status.update(f"probing: {what}"),
        )
    text = dumps(profile)
    if out is None:
        sys.stdout.write(text)
    else:
        write_text(out, text)
    console.print(summary(profile))
    console.print(
        f"{time.perf_counter() - begun:.0f} s"
        + (
            f"; plan with: plan --device {out}"
            if out
            else "; keep it with: execute --probe --out FILE"
        )
    )
    return profile


def _medians(found: Sequence[Any]) -> Any:
    """Of tables of equal shape, one with the median of each figure."""
    first = found[0]
    if isinstance(first, dict):
        return {key: _medians([each[key] for each in found]) for key in first}
    if isinstance(first, list | tuple):
        return [_medians(column) for column in zip(*found, strict=True)]
    return statistics.median(found)


def _nothing() -> None:
    pass
