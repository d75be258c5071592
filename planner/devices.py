"""`plan devices`: the devices a plan can be made for, as a table or JSON; one by name with every figure's source."""

from __future__ import annotations

import json
import sys
from typing import Any

from planner.arguments import Parser
from planner.files import reaching_stdout
from planner.lines import wrapped
from planner.profile import FIGURES, DeviceProfile, list_profiles, load_profile
from planner.units import GIB

MEASURABLE = ("bandwidth_bytes_per_s", "matmul_flops_per_s", "host_to_device_bytes_per_s")


def main(arguments: list[str]) -> int:
    """The exit code of `plan devices [NAME] [--json]`."""
    parser = Parser(
        prog="plan devices",
        description="The devices a plan can be made for; NAME shows one with every figure's source.",
    )
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="a device's id or name, or a .json file"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    if options.name is not None:
        profile = load_profile(options.name)
        with reaching_stdout():
            if options.json:
                sys.stdout.write(json.dumps(profile.model_dump(mode="json"), indent=1) + "\n")
            else:
                _print_one(profile)
        return 0
    profiles = [load_profile(known) for known in list_profiles()]
    profiles.sort(key=lambda p: (p.kind, p.memory_total_bytes, p.id))
    with reaching_stdout():
        if options.json:
            sys.stdout.write(json.dumps([_row(profile) for profile in profiles], indent=1) + "\n")
        else:
            _print_all(profiles)
    return 0


def rates_from(profile: DeviceProfile) -> str:
    """Where the rates behind predicted seconds come from: `measured`, `data sheets`, or `partly measured`."""
    measured = sum("measured" in profile.sources.get(name, "") for name in MEASURABLE)
    if measured == len(MEASURABLE):
        return "measured"
    return "partly measured" if measured else "data sheets"


def _row(profile: DeviceProfile) -> dict[str, Any]:
    """What the table shows of a device, in bytes and FLOP/s."""
    return {
        "id": profile.id,
        "name": profile.name,
        "kind": profile.kind,
        "compute_capability": profile.compute_capability,
        "memory_total_bytes": profile.memory_total_bytes,
        "usable_bytes": profile.usable_bytes,
        "bandwidth_bytes_per_s": profile.bandwidth_bytes_per_s,
        "matmul_bits16_flops_per_s": profile.matmul_flops_per_s.bits16[-1][1],
        "host_to_device_bytes_per_s": profile.host_to_device_bytes_per_s,
        "rates": rates_from(profile),
    }


def _print_all(profiles: list[DeviceProfile]) -> None:
    wide = max(len(profile.id) for profile in profiles)
    head = f"{'id':{wide}}  {'memory':>7} {'usable':>7} {'bandw.':>7} {'16-bit':>8} {'link':>6}  {'cc':>4}  rates from"
    units = f"{'':{wide}}  {'GiB':>7} {'GiB':>7} {'GB/s':>7} {'TFLOP/s':>8} {'GB/s':>6}"
    print(head, units, sep="\n")
    for profile in profiles:
        row = _row(profile)
        print(
            f"{profile.id:{wide}}  {profile.memory_total_bytes / GIB:7.2f} {profile.usable_bytes / GIB:7.2f} "
            f"{profile.bandwidth_bytes_per_s / 1e9:7.0f} {row['matmul_bits16_flops_per_s'] / 1e12:8.1f} "
            f"{profile.host_to_device_bytes_per_s / 1e9:6.1f}  {profile.compute_capability or '-':>4}  {row['rates']}"
        )
    print('\nRates are sustained ones. --device takes an id, or a name: "RTX 4060 Ti 16GB".')
    print("One device, and where each of its figures comes from: plan devices NAME")


def _print_one(profile: DeviceProfile) -> None:
    print(f"{profile.name} ({profile.id}), {profile.kind}; rates: {rates_from(profile)}")
    if profile.note:
        print(wrapped(profile.note, "  ", "  "))
    for name in FIGURES:
        print(wrapped(f"{name}: {_figure(getattr(profile, name))}", "", "  "))
        print(wrapped(profile.sources[name], "    ", "    "))


def _figure(value: Any) -> str:
    """A figure in full; a table of rates as FLOP/s by rows."""
    if not hasattr(value, "bits16"):
        return "none" if value is None else str(value)
    parts = []
    for label, points in (("16 bits", value.bits16), ("float32", value.float32)):
        parts.append(f"{label} " + ", ".join(f"{r / 1e12:g}e12 at {n} rows" for n, r in points))
    return "; ".join(parts)
