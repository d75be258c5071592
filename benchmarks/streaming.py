"""How well copies and compute overlap on the CPU when every unit is streamed; prints Markdown.

    GOMP_SPINCOUNT=4000 python benchmarks/streaming.py CHECKPOINT [--sizes 448x448 ...] [--depth 3] [--tokens 8] [--rounds 3] [--cold]

(as `execute` sets it). One plan of each size, with nothing resident, is run in three ways by turns: as it stands; with the first filling of each
place alone, so that later copies cost nothing (compute alone: the phase's seconds less the waiting for those); and with
no step run (reading alone: the measured read rate). Each phase must take at most 1.15 times the longer of the last two, and
its start-up, which is the time until its first weights are there.
With --cold what was read is dropped from the page cache at once (`posix_fadvise`), so that all of it comes from the disk,
in each iteration of decode anew. With OMP_NUM_THREADS one less than there are cores, the reader has a core of its own, as it has beside
a card. Exit code 1 where a phase takes longer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from page_cache import drop, warm
from PIL import Image

from executor.arena import Arena
from executor.cpu import CpuDevice
from executor.device import Chunk, Range
from executor.files import Files
from executor.run import Request, run
from executor.weights import Reader
from planner.checkpoint.spec import Checkpoint, read_checkpoint
from planner.plan import Plan
from planner.plan.tiles import Tiles
from planner.profile import load_profile
from planner.schedule import Choice, PhaseResidency
from planner.search import Request as PlanRequest
from planner.search import build
from planner.workload import make_workload, parse_image

PHOTO = Path(__file__).parent.parent / "examples" / "earth_3840x2160.jpg"
PROMPT = "Describe this image."
PHASES = ("vision", "prefill", "decode")
MOST = 1.15
Seconds = dict[str, float]


class Cold(CpuDevice):
    """The CPU, with a page cache that keeps nothing of what was read."""

    def fill(self, chunk: Chunk, files: Files) -> None:
        super().fill(chunk, files)
        drop(chunk.path, chunk.offset_bytes, chunk.size_bytes)


class Once(CpuDevice):
    """The CPU, where a place of the arena is filled once; what is meant for it later is not read."""

    def __init__(self) -> None:
        super().__init__()
        self._filled: set[tuple[Range, ...]] = set()

    def fill(self, chunk: Chunk, files: Files) -> None:
        if chunk.targets not in self._filled:
            self._filled.add(chunk.targets)
            super().fill(chunk, files)

    def release(self, ranges: Sequence[Range]) -> None:
        super().release(ranges)
        self._filled = {
            targets
            for targets in self._filled
            if not any(
                start < high and low < stop for low, high in targets for start, stop in ranges
            )
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["448x448"])
    parser.add_argument("--depth", type=int, default=3, help="slots of the ring")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()
    checkpoint = read_checkpoint(options.checkpoint)
    files = sorted({place.path for place in checkpoint.tensors.values()})
    worst = 0.0
    print(
        "| image | phase | streamed, GB | compute, s | reading, s | start-up, s | both, s | (both - start-up) / max |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            image = Path(folder) / "image.jpg"
            with Image.open(PHOTO) as photo:
                photo.resize(tuple(int(part) for part in size.split("x"))).save(image, quality=90)
            plan = _plan(checkpoint, image, options.depth, options.tokens)
            request = Request(
                checkpoint.tensors,
                (image,),
                PROMPT,
                tokenizer=checkpoint.tokenizer_json,
                stop=(),
            )
            # how quickly they are read from the page cache depends on how they came there
            _drop_all(files)
            worst = max(worst, _table(size, plan, request, files, options))
    return int(worst > MOST)


def _table(
    size: str,
    plan: Plan,
    request: Request,
    files: Sequence[Path],
    options: argparse.Namespace,
) -> float:
    """Print a size's rows; the worst ratio."""
    found: dict[str, list[tuple[Seconds, Seconds]]] = {"both": [], "compute": [], "reading": []}
    for _ in range(options.rounds):
        for way, sink in found.items():
            device = Cold() if options.cold else CpuDevice()
            if options.cold:
                _drop_all(files)
            else:
                warm(files)
            if way == "reading":
                sink.append(_read(plan, request, device))
            else:
                sink.append(_run(plan, request, Once() if way == "compute" else device))

    def median(way: str, phase: str, which: int) -> float:
        return statistics.median(pair[which].get(phase, 0.0) for pair in found[way])

    worst = 0.0
    for phase in PHASES:
        streamed = sum(
            c.size_bytes * (options.tokens - 1 if phase == "decode" and not c.once else 1)
            for c in plan.copies
            if c.phase == phase
        )
        both, first = median("both", phase, 0), median("both", phase, 1)
        # of the waiting in this way only what is not a place's first filling would be compute's
        compute = statistics.median(
            pair[0][phase] - pair[1][phase + " waited"] for pair in found["compute"]
        )
        reading = median("reading", phase, 0)
        ratio = (both - first) / max(compute, reading)
        worst = max(worst, ratio)
        print(
            f"| {size} | {phase} | {streamed / 1e9:.2f} | {compute:.2f} | {reading:.2f} "
            f"| {first:.2f} | {both:.2f} | {ratio:.2f} |",
            flush=True,
        )
    return worst


def _run(plan: Plan, request: Request, device: CpuDevice) -> tuple[Seconds, Seconds]:
    """Seconds of each phase, and what its first step waited for its weights."""
    record = run(plan, request, device).record
    waits: Seconds = {}
    for phase in record.phases:
        steps = [step for step in record.steps if step.phase == phase.phase]
        waits[phase.phase] = steps[0].waited_seconds if steps and steps[0].count == 1 else 0.0
        waits[phase.phase + " waited"] = phase.waited_seconds
    return {phase.phase: phase.seconds for phase in record.phases}, waits


def _read(plan: Plan, request: Request, device: CpuDevice) -> tuple[Seconds, Seconds]:
    """Seconds of each phase's copies, with every step over at once."""
    seconds: Seconds = {}
    try:
        arena = Arena(plan, device)
        iterations = plan.decode_repeats
        with Reader(plan, device, request.locations, decode_iterations=iterations) as reader:
            for phase in PHASES:
                steps = [step for step in plan.steps if step.phase == phase]
                start = time.perf_counter()
                for iteration in range(iterations if phase == "decode" else 1):
                    for step in steps:
                        reader.begin_step(step, iteration)
                        reader.finish_step(step)
                seconds[phase] = time.perf_counter() - start
                after = plan.steps.index(steps[-1]) + 1
                if after < len(plan.steps):
                    arena.release(arena.dead_ranges(after))
        arena.close()
    finally:
        device.close()
    return seconds, {}


def _plan(checkpoint: Checkpoint, image: Path, depth: int, tokens: int) -> Plan:
    """Nothing resident, a ring of `depth` slots, tiles of 1024 rows."""
    model = checkpoint.shape
    bounds = {"min_pixels": checkpoint.min_pixels, "max_pixels": checkpoint.max_pixels}
    workload = make_workload(
        [parse_image(str(image), **bounds)],
        **bounds,
        text=PROMPT,
        tokenizer_json=checkpoint.tokenizer_json,
        max_new_tokens=tokens,
    )
    tiles = Tiles(
        patch_rows=1024,
        window_rows=1024,
        query_rows=1024,
        query_heads=model.vision.heads,
        vision_mlp_rows=1024,
        merger_rows=1024,
        prompt_rows=1024,
        prompt_heads=model.text.kv_heads,
        prompt_mlp_rows=1024,
        vocabulary_rows=model.text.vocabulary // 8,
    )
    nothing = PhaseResidency(0, 0)
    choice = Choice("vision_then_llm", True, depth, nothing, nothing, nothing, tiles)
    return build(PlanRequest(checkpoint, workload, None), load_profile("cpu"), choice)


def _drop_all(files: Sequence[Path]) -> None:
    for path in files:
        drop(path)


if __name__ == "__main__":
    sys.exit(main())
