"""Predicted beside recorded seconds on the CPU, phase by phase, and how ten plans of one request rank; prints Markdown.

    python benchmarks/seconds.py CHECKPOINT... [--sizes 448x448 ...] [--budgets 3] [--rounds 3]
    python benchmarks/seconds.py CHECKPOINT --sizes 448x448 --ranking
    both: [--device cpu | FILE.json] [--out RUNS.jsonl [--stop-after SECONDS]]

Each run is an `execute` of its own; rounds go over all plans in turn, and the table has medians. Before each run the
checkpoint is read once, from the disk, and as much memory as the plan needs is touched and given back, so that neither a cold disk nor
a virtual machine's own paging is in it. A run beside which other processes took more than a twentieth of the cores is
dropped and counted. With --out runs are kept in a file and a later call goes on where this one stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from page_cache import drop, warm
from PIL import Image

from planner.checkpoint.spec import Checkpoint, read_checkpoint
from planner.errors import BudgetTooSmall
from planner.plan import Plan
from planner.plan.tiles import Tiles
from planner.profile import DeviceProfile, load_profile
from planner.schedule import Choice, PhaseResidency
from planner.search import Request, build, search
from planner.units import MIB
from planner.workload import make_workload, parse_image

PHOTO = Path(__file__).parent.parent / "examples" / "earth_3840x2160.jpg"
PROMPT = "Describe this image."
PHASES = ("load", "vision", "prefill", "decode")
DISTURBED = 0.05  # of the cores, taken by others
TOLERANCE = 0.15


@dataclass(frozen=True, slots=True)
class Cell:
    """One plan and what it is run on. `key` stands for the plan's steps, so that runs can be told apart."""

    checkpoint: Path
    size: str
    said: str
    image: Path
    plan: Plan

    @property
    def key(self) -> str:
        parts = (self.checkpoint.name, self.size, self.said, self.plan.levers.model_dump_json())
        return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]

    @property
    def predicted(self) -> dict[str, float]:
        return {phase.phase: phase.seconds for phase in self.plan.prediction.phases}


def main() -> int:
    """0 where every phase is within 15 %, or the ranking agrees with a tau of 0.8."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["448x448", "1920x1080"])
    parser.add_argument("--budgets", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ranking", action="store_true", help="ten plans of each request")
    parser.add_argument("--out", type=Path, help="keep runs here, one JSON line each")
    parser.add_argument("--stop-after", type=float, help="begin no run after so many seconds")
    options = parser.parse_args()
    end = time.monotonic() + (options.stop_after or 1e9)
    profile = load_profile(options.device)
    with tempfile.TemporaryDirectory() as folder:
        cells = [
            cell
            for checkpoint in options.checkpoints
            for size in options.sizes
            for cell in _cells(checkpoint, size, profile, options, Path(folder))
        ]
        runs = _load(options.out)
        for cell in _next(cells, runs, options.rounds):
            if time.monotonic() >= end:
                break
            found = _run(cell, Path(folder))
            runs.append(found)
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
        return _ranking(cells, runs) if options.ranking else _table(cells, runs)


# --- plans --------------------------------------------------------------------------------------------------------


def _cells(
    checkpoint: Path,
    size: str,
    profile: DeviceProfile,
    options: argparse.Namespace,
    folder: Path,
) -> Iterator[Cell]:
    found = read_checkpoint(checkpoint)
    image = _image(size, folder)
    bounds = {"min_pixels": found.min_pixels, "max_pixels": found.max_pixels}
    workload = make_workload(
        [parse_image(str(image), **bounds)],
        **bounds,
        text=PROMPT,
        tokenizer_json=found.tokenizer_json,
        max_new_tokens=options.new_tokens,
    )
    request = Request(found, workload, None)
    if options.ranking:
        for said, choice in _choices(found):
            plan = build(request, profile, choice)
            yield Cell(checkpoint, size, said, image, plan)
        return
    free = search(request, profile)
    low = free.prediction.smallest_budget_bytes + MIB
    high = free.prediction.bound_peak_bytes
    steps = max(options.budgets - 1, 1)
    for number in range(options.budgets - 1):
        budget = low + (high - low) * number // steps
        plan = search(replace(request, budget_bytes=budget), profile)
        yield Cell(checkpoint, size, f"{budget / MIB:.0f} MiB", image, plan)
    yield Cell(checkpoint, size, "unlimited", image, free)


def _image(size: str, folder: Path) -> Path:
    path = folder / f"{size}.jpg"
    if not path.exists():
        width, height = (int(part) for part in size.split("x"))
        with Image.open(PHOTO) as photo:
            photo.resize((width, height)).save(path, quality=90)
    return path


def _choices(checkpoint: Checkpoint) -> Iterator[tuple[str, Choice]]:
    """Ten settings that differ in residency, tiles, order and depth."""
    model = checkpoint.shape
    depth, layers = model.vision.depth, model.text.layers
    vocabulary = model.text.vocabulary

    def tiles(rows: int, heads: int, head_rows: int = vocabulary) -> Tiles:
        return Tiles(
            patch_rows=rows,
            window_rows=rows,
            query_rows=rows,
            query_heads=min(heads, model.vision.heads),
            vision_mlp_rows=rows,
            merger_rows=rows,
            prompt_rows=rows,
            prompt_heads=min(heads, model.text.kv_heads),
            prompt_mlp_rows=rows,
            vocabulary_rows=head_rows,
        )

    def text(share: float, head: int = 1) -> PhaseResidency:
        return PhaseResidency(round(layers * share), round(layers * share), head)

    nothing, tower = PhaseResidency(0, 0), PhaseResidency(depth, depth)
    wide = tiles(1024, 16)
    yield "all first, tiles of 1024", Choice("all_first", True, 1, tower, text(1), text(1), wide)
    yield (
        "resident, tiles of 1024",
        Choice("vision_then_llm", True, 1, tower, text(1), text(1), wide),
    )
    yield (
        "resident, tiles of 64",
        Choice("vision_then_llm", True, 1, tower, text(1), text(1), tiles(64, 1)),
    )
    yield (
        "resident, tiles of 256",
        Choice("vision_then_llm", True, 1, tower, text(1), text(1), tiles(256, 4)),
    )
    yield (
        "tower streamed, 2 slots",
        Choice("vision_then_llm", True, 2, nothing, text(1), text(1), wide),
    )
    yield (
        "tower streamed, 1 slot",
        Choice("vision_then_llm", True, 1, nothing, text(1), text(1), wide),
    )
    yield (
        "half of the layers streamed",
        Choice("vision_then_llm", True, 2, nothing, text(0.5), text(0.5), wide),
    )
    yield (
        "layers streamed, 3 slots",
        Choice("vision_then_llm", True, 3, nothing, text(0, 1), text(0, 1), wide),
    )
    yield (
        "layers streamed, 1 slot",
        Choice("vision_then_llm", True, 1, nothing, text(0, 1), text(0, 1), wide),
    )
    yield (
        "layers streamed, tiles of 128",
        Choice("vision_then_llm", True, 2, nothing, text(0, 1), text(0, 1), tiles(128, 2)),
    )


# --- runs ---------------------------------------------------------------------------------------------------------


def _load(path: Path | None) -> list[dict[str, object]]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _next(cells: Sequence[Cell], runs: list[dict[str, object]], rounds: int) -> Iterator[Cell]:
    """The cells in turn, until each has that many runs that count, or twice as many in all."""
    while True:
        left = []
        for number, cell in enumerate(cells):
            mine = [run for run in runs if run["key"] == cell.key]
            good = sum(not run["disturbed"] for run in mine)
            if good < rounds and len(mine) < 2 * rounds:
                left.append((len(mine), number))
        if not left:
            return
        yield cells[min(left)[1]]


def _run(cell: Cell, folder: Path) -> dict[str, object]:
    plan_file, record_file = folder / "plan.json", folder / "record.json"
    cell.plan.save(plan_file)
    _warm(cell)
    command = [sys.executable, "-m", "executor.cli", str(plan_file), "--quiet"]
    command += ["--model", str(cell.checkpoint), "--image", str(cell.image), "--prompt", PROMPT]
    busy, own, start = _busy(), _children(), time.monotonic()
    done = subprocess.run(
        [*command, "--record", str(record_file)], capture_output=True, text=True, check=False
    )
    wall = time.monotonic() - start
    others = max(0.0, _busy() - busy - (_children() - own)) / (wall * (os.cpu_count() or 1))
    if done.returncode not in (0, 4):
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    record = json.loads(record_file.read_text(encoding="utf-8"))
    return {
        "key": cell.key,
        "cell": [cell.checkpoint.name, cell.size, cell.said],
        "seconds": {phase["phase"]: phase["seconds"] for phase in record["phases"]},
        "copied": sum(copy["size_bytes"] for copy in record["copies"]),
        "copying": sum(copy["seconds"] for copy in record["copies"]),
        "others": round(others, 4),
        "disturbed": others > DISTURBED,
    }


def _warm(cell: Cell) -> None:
    """Read the checkpoint into the page cache, and touch as much memory as the plan needs.

    What lies there is dropped before: how quickly it is read depends on how it once came there.
    """
    files = sorted(cell.checkpoint.glob("*.safetensors"))
    for path in files:
        drop(path)
    warm(files)
    size = cell.plan.prediction.bound_peak_bytes
    with mmap.mmap(-1, size) as mapping:
        for start in range(0, size, mmap.PAGESIZE):
            mapping[start] = 1


def _busy() -> float:
    """Seconds that the cores were busy since the system started, whoever had them."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# --- tables -------------------------------------------------------------------------------------------------------


def _medians(cell: Cell, runs: Sequence[dict[str, object]]) -> tuple[dict[str, float], int, int]:
    """Median seconds of each phase, how many runs count, how many were dropped."""
    mine = [run for run in runs if run["key"] == cell.key]
    good = [run["seconds"] for run in mine if not run["disturbed"]]
    medians = {}
    for phase in PHASES:
        values = [found[phase] for found in good if isinstance(found, dict) and phase in found]
        if values:
            medians[phase] = statistics.median(values)
    return medians, len(good), len(mine) - len(good)


def _table(cells: Sequence[Cell], runs: Sequence[dict[str, object]]) -> int:
    print("| checkpoint | image | budget | phase | predicted | recorded | error | runs | dropped |")
    print("|---|---|---:|---|---:|---:|---:|---:|---:|")
    errors: dict[str, list[float]] = {phase: [] for phase in (*PHASES, "all")}
    for cell in cells:
        medians, good, dropped = _medians(cell, runs)
        rows = [(phase, cell.predicted[phase], medians[phase]) for phase in medians]
        rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
        for phase, predicted, recorded in rows:
            if not recorded:
                continue
            error = predicted / recorded - 1
            errors[phase].append(error)
            print(
                f"| {cell.checkpoint.name} | {cell.size} | {cell.said} | {phase} "
                f"| {predicted:.3f} s | {recorded:.3f} s | {error:+.0%} | {good} | {dropped} |"
            )
    print()
    for phase, found in errors.items():
        if found:
            within = sum(abs(error) <= TOLERANCE for error in found)
            print(
                f"{phase}: {within} of {len(found)} within {TOLERANCE:.0%}, median error "
                f"{statistics.median(abs(error) for error in found):.0%}, worst {max(found, key=abs):+.0%}"
            )
    copied = sum(float(str(run["copied"])) for run in runs if not run["disturbed"])
    copying = sum(float(str(run["copying"])) for run in runs if not run["disturbed"])
    if copying:
        print(f"weights came at {copied / copying / 1e9:.2f} GB/s (page cache, new pages included)")
    return int(any(abs(error) > TOLERANCE for phase in PHASES[1:] for error in errors[phase]))


def _ranking(cells: Sequence[Cell], runs: Sequence[dict[str, object]]) -> int:
    worst = 1.0
    for place in dict.fromkeys((cell.checkpoint, cell.size) for cell in cells):
        print("| plan | predicted | recorded | error | runs | dropped |")
        print("|---|---:|---:|---:|---:|---:|")
        pairs = []
        for cell in cells:
            if (cell.checkpoint, cell.size) != place:
                continue
            medians, good, dropped = _medians(cell, runs)
            if not medians:
                continue
            predicted = sum(cell.predicted[phase] for phase in medians)
            recorded = sum(medians.values())
            pairs.append((predicted, recorded))
            print(
                f"| {cell.said} | {predicted:.3f} s | {recorded:.3f} s "
                f"| {predicted / recorded - 1:+.0%} | {good} | {dropped} |"
            )
        tau = kendall(pairs)
        worst = min(worst, tau)
        print(f"\n{place[0].name}, {place[1]}: Kendall tau {tau:.2f} over {len(pairs)} plans\n")
    return int(worst < 0.8)


def kendall(pairs: Sequence[tuple[float, float]]) -> float:
    """Pairs in the same order less pairs in the other, over all pairs."""
    score = count = 0
    for number, (left, right) in enumerate(pairs):
        for other_left, other_right in pairs[:number]:
            product = (left - other_left) * (right - other_right)
            score += (product > 0) - (product < 0)
            count += 1
    return score / count if count else 1.0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BudgetTooSmall as error:
        sys.exit(f"error: {error}")
