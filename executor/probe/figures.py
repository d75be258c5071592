"""A profile with measured figures put in: tables, the roofline read off them, what the system says of itself, each with its source."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from executor.probe.rates import Rates
from planner.errors import InputError
from planner.plan.words import Kernel
from planner.profile import DeviceProfile, Kernels, Measured, load_profile
from planner.units import GIB, MIB


def base_profile(device: str) -> DeviceProfile:
    """The profile that this machine's figures go into."""
    if device == "cpu":
        return load_profile("cpu")
    name = torch.cuda.get_device_name()
    memory_gb = round(torch.cuda.get_device_properties(0).total_memory / 2**30)
    for wanted in (f"{name} {memory_gb}GB", name):
        with suppress(InputError):
            return load_profile(wanted)
    major, minor = torch.cuda.get_device_capability()
    like = {7: "t4-16gb", 9: "h100-pcie-80gb", 8: "rtx-4090-24gb"}.get(major, "rtx-5080-16gb")
    return load_profile(like).model_copy(
        update={"name": name, "compute_capability": f"{major}.{minor}"}
    )


def attention_kernel(base: DeviceProfile) -> Kernel:
    if base.kind == "cpu":
        return "cpu_flash"
    return "flash" if float(base.compute_capability or 0) >= 8 else "efficient"


def measured_profile(
    base: DeviceProfile, measured: Measured, rates: Rates, device: str
) -> DeviceProfile:
    """The base with everything measured put in, and the roofline's figures read off the tables."""
    said = measured_by()
    half, whole = measured.bits16, measured.float32
    changes: dict[str, Any] = {
        "id": re.sub(r"-probed$", "", base.id) + "-probed",
        "name": _processor() if device == "cpu" else base.name,
        "note": f"{_processor()}, {torch.get_num_threads()} threads"
        if device == "cpu"
        else base.note,
        "measured": measured,
        "matmul_flops_per_s": {"bits16": _products(half), "float32": _products(whole)},
        "attention_flops_per_s": {"bits16": _attention(half), "float32": _attention(whole)},
        "bandwidth_bytes_per_s": _bandwidth(half),
        "launch_s": min(half.passes["add"][0][1], whole.passes["add"][0][1]),
        "host_to_device_bytes_per_s": rates.host_to_device,
        "page_cache_bytes_per_s": rates.page_cache,
    }
    sources = dict(base.sources)
    sources |= {
        "bandwidth_bytes_per_s": f"{said}: 16-bit weights of one-row products, far apart",
        "matmul_flops_per_s": f"{said}: the largest weights; all of them in `measured`",
        "attention_flops_per_s": f"{said}: no mask, the largest heads and most keys; all of them in `measured`",
        "launch_s": f"{said}: the smallest addition",
        "page_cache_bytes_per_s": f"{said}: preadv in pieces of 64 MiB, threads: {rates.readers}, the file in memory. "
        "On a CPU weights count as in the page cache where twice their bytes fit in usable_bytes",
        "host_to_device_bytes_per_s": f"{said}: as page_cache_bytes_per_s"
        if device == "cpu"
        else f"{said}: pinned; {(rates.pageable or 0) / 1e9:.1f} GB/s where it is not pinned",
        "measured": f"{said}: median of repeated calls of the executor's own functions",
    }
    if rates.disk is not None:
        changes["disk_bytes_per_s"] = rates.disk
        sources["disk_bytes_per_s"] = f"{said}: preadv of a file put out of the page cache before"
    if device == "cpu":
        total = _total_bytes()
        changes |= {
            "threads": torch.get_num_threads(),
            "amx": _has_amx(),
            **({"memory_total_bytes": total, "usable_bytes": total - 2 * GIB} if total else {}),
        }
        if total:
            sources["memory_total_bytes"] = f"{said}: MemTotal of the system"
    else:
        free, total = torch.cuda.mem_get_info()
        properties = torch.cuda.get_device_properties(0)
        changes |= {
            "usable_bytes": min(total, base.memory_total_bytes),
            "sm_count": properties.multi_processor_count,
        }
        if total > base.memory_total_bytes:
            changes |= {"memory_total_bytes": total, "usable_bytes": total}
        ask = getattr(torch.backends.cuda, "cublas_workspace_size", None)  # torch 2.13
        if ask is not None:
            changes["workspace_bytes"] = ask()
            sources["workspace_bytes"] = f"{said}: torch's own figure"
        sources["usable_bytes"] = f"{said}: the driver's total ({free} bytes of it free then)"
        sources["sm_count"] = f"{said}: the driver's"
    return DeviceProfile.model_validate(
        {**base.model_dump(), **_plain(changes), "sources": sources}
    )


def _plain(changes: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.model_dump() if hasattr(value, "model_dump") else value
        for key, value in changes.items()
    }


def _products(found: Kernels) -> tuple[tuple[int, int], ...]:
    """(rows, FLOP/s) of the largest weights, never falling: beyond a dip more rows would be cut into fewer."""
    grid, weights = found.product, found.product.second[-1]
    one = found.vector.seconds[-1][-1]
    points = [(1, 2 * weights / one)]
    points += [
        (rows, 2 * rows * weights / row[-1])
        for rows, row in zip(grid.first, grid.seconds, strict=True)
    ]
    return _rising(points)


def _attention(found: Kernels) -> tuple[tuple[int, int], ...]:
    head = found.attention[-1]
    keys = head.full.second[-1]
    cached, seconds = head.decode[-1]
    points = [(1, 4 * cached * head.head_dim / seconds)]
    points += [
        (rows, 4 * rows * keys * head.head_dim / row[-1])
        for rows, row in zip(head.full.first, head.full.seconds, strict=True)
    ]
    return _rising(points)


def _rising(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, int], ...]:
    best, found = 1.0, []
    for rows, rate in points:
        best = max(best, rate)
        found.append((rows, round(best)))
    return tuple(found)


def _bandwidth(found: Kernels) -> int:
    grid = found.vector
    return max(1, round(2 * grid.second[-1] / grid.seconds[-1][-1]))


def summary(profile: DeviceProfile) -> Any:
    """A table of the figures that people ask for first."""
    from rich import box
    from rich.table import Table

    table = Table(title=profile.name, box=box.SIMPLE_HEAD, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = (
        ("memory read by one-row products", f"{profile.bandwidth_bytes_per_s / 1e9:.1f} GB/s"),
        *(
            (f"products of {count} rows, {name}", f"{rate / 1e12:.2f} TFLOP/s")
            for name, points in (
                ("16 bits", profile.matmul_flops_per_s.bits16),
                ("float32", profile.matmul_flops_per_s.float32),
            )
            for count, rate in (points[0], points[-1])
        ),
        *(
            (f"attention of {count} rows, {name}", f"{rate / 1e12:.2f} TFLOP/s")
            for name, points in (
                ("16 bits", profile.attention_flops_per_s.bits16),
                ("float32", profile.attention_flops_per_s.float32),
            )
            for count, rate in (points[0], points[-1])
        ),
        ("smallest call", f"{profile.launch_s * 1e6:.1f} us"),
        ("copies to the device", f"{profile.host_to_device_bytes_per_s / 1e9:.1f} GB/s"),
        ("page cache", f"{profile.page_cache_bytes_per_s / 1e9:.1f} GB/s"),
        ("disk, cold", f"{profile.disk_bytes_per_s / 1e9:.2f} GB/s"),
        ("start-up", f"{profile.start_s:.2f} s"),
        ("context", f"{profile.context_bytes / MIB:.0f} MiB"),
    )
    for row in rows:
        table.add_row(*row)
    return table


def measured_by() -> str:
    return (
        f"measured {time.strftime('%Y-%m-%d')} by execute --probe, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )


def _processor() -> str:
    """The processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "CPU"


def _has_amx() -> bool:
    with suppress(OSError):
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return False


def _total_bytes() -> int | None:
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    return None
