"""Predicted beside recorded peaks on the CPU, over models, images and budgets; prints a Markdown table.

    python benchmarks/predicted_against_recorded.py CHECKPOINT... [--sizes 448x448 ...] [--budgets 4 | --vram SIZE] [--out FILE]

Each cell plans with `plan` and runs with `execute`, in processes of their own. Budgets go from just above the stated
minimum to unlimited. A run is over if it passes the plan's bound; it is off if expected and recorded peaks differ by
more than 1 % and by more than 8 MiB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from planner.plan import Plan
from planner.units import MIB, parse_bytes

PHOTO = Path(__file__).parent.parent / "examples" / "earth_3840x2160.jpg"
PROMPT = "Describe this image."
TOLERANCE = 0.01
TOLERANCE_BYTES = 8 * MIB


def main() -> int:
    """0 where no run is over or off."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["448x448", "1920x1080"])
    parser.add_argument("--budgets", type=int, default=4)
    parser.add_argument("--vram", help="one budget, in place of --budgets")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--check", action="store_true", help="watch every step")
    parser.add_argument("--out", type=Path, help="append one JSON line a run")
    options = parser.parse_args()
    print("| checkpoint | image | budget | expected | bound | recorded | error |", flush=True)
    print("|---|---|---:|---:|---:|---:|---:|", flush=True)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for checkpoint in options.checkpoints:
            for size in options.sizes:
                image = _image(size, Path(folder))
                for budget in _budgets(checkpoint, image, options):
                    bad += _run(checkpoint, image, size, budget, options, Path(folder))
    print(f"\nover the bound or off: {bad}")
    return 1 if bad else 0


def _image(size: str, folder: Path) -> Path:
    width, height = (int(part) for part in size.split("x"))
    path = folder / f"{size}.jpg"
    if not path.exists():
        with Image.open(PHOTO) as photo:
            photo.resize((width, height)).save(path, quality=90)
    return path


def _command(
    checkpoint: Path, image: Path, budget: int | None, options: argparse.Namespace
) -> list[str]:
    command = ["--model", str(checkpoint), "--image", str(image), "--prompt", PROMPT]
    command += ["--max-new-tokens", str(options.new_tokens), "--device", "cpu"]
    return command + (["--vram", f"{budget}B"] if budget else [])


def _plan(checkpoint: Path, image: Path, budget: int | None, options: argparse.Namespace) -> Plan:
    command = [sys.executable, "-m", "planner.cli", *_command(checkpoint, image, budget, options)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return Plan.loads(done.stdout)


def _budgets(checkpoint: Path, image: Path, options: argparse.Namespace) -> list[int | None]:
    """From 1 MiB above the minimum to unlimited, evenly between; or the one that was asked for."""
    if options.vram:
        return [parse_bytes(options.vram, what="--vram")]
    free = _plan(checkpoint, image, None, options).prediction
    low = free.smallest_budget_bytes + MIB
    steps = max(options.budgets - 1, 1)
    between = [low + (free.bound_peak_bytes - low) * i // steps for i in range(options.budgets - 1)]
    return [*between, None]


def _run(
    checkpoint: Path,
    image: Path,
    size: str,
    budget: int | None,
    options: argparse.Namespace,
    folder: Path,
) -> int:
    plan = _plan(checkpoint, image, budget, options)
    plan_file, record_file = folder / "plan.json", folder / "record.json"
    plan.save(plan_file)
    command = [sys.executable, "-m", "executor.cli", str(plan_file), "--model", str(checkpoint)]
    command += ["--image", str(image), "--prompt", PROMPT, "--record", str(record_file), "--quiet"]
    done = subprocess.run(
        command + (["--check"] if options.check else []),
        capture_output=True,
        text=True,
        check=False,
    )
    said = "unlimited" if budget is None else f"{budget / MIB:.0f} MiB"
    if done.returncode:
        print(f"| {checkpoint.name} | {size} | {said} | {done.stderr.strip()} |", flush=True)
        return 1
    record = json.loads(record_file.read_text())
    expected, bound = plan.prediction.expected_peak_bytes, plan.prediction.bound_peak_bytes
    recorded = record["peak_bytes"]
    difference = recorded - expected
    off = abs(difference) > max(TOLERANCE * expected, TOLERANCE_BYTES)
    over = recorded > bound
    row = [expected, bound, recorded]
    flag = " over" if over else " off" if off else ""
    print(
        f"| {checkpoint.name} | {size} | {said} | "
        + " | ".join(f"{value / MIB:.1f}" for value in row)
        + f" | {difference / MIB:+.1f} MiB, {100 * difference / expected:+.2f} %{flag} |",
        flush=True,
    )
    if options.out:
        phases = {p.phase: [p.expected_peak_bytes, p.seconds] for p in plan.prediction.phases}
        found = {p["phase"]: [p["peak_bytes"], p["seconds"]] for p in record["phases"]}
        with options.out.open("a", encoding="utf-8") as file:
            line = {"checkpoint": checkpoint.name, "size": size, "budget": budget}
            line |= {"expected": expected, "bound": bound, "recorded": recorded}
            line |= {"context": [plan.device.context_bytes, record["context_bytes"]]}
            file.write(json.dumps(line | {"phases": phases, "recorded_phases": found}) + "\n")
    return int(over or off)


if __name__ == "__main__":
    sys.exit(main())
