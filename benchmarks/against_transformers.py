"""Seconds of vision, prefill and decode, and peak memory, beside transformers on the same checkpoint and image (CPU).

    python benchmarks/against_transformers.py CHECKPOINT [--size 1024x1024] [--new-tokens 16] [--rounds 5] [--vram SIZE]

transformers (sdpa, the checkpoint's dtype, weights copied into memory) stays loaded in a process of its own and is
warmed once; `execute` is started afresh every round. Without --vram its plan too has every weight in memory before the
first step; with it, the plan is what `plan` makes for that budget, and what it streams is read within the phases.
Loading is timed on neither side. Rounds alternate; figures are medians, ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from PIL import Image

from planner.checkpoint.spec import read_checkpoint
from planner.plan.shapes import TokenIds
from planner.profile import load_profile
from planner.schedule import Choice, PhaseResidency
from planner.search import Request, build, search
from planner.units import parse_bytes
from planner.workload import make_workload, parse_image

PHOTO = Path(__file__).parent.parent / "examples" / "earth_3840x2160.jpg"
PROMPT = "Describe this image."
PHASES = ("vision", "prefill", "decode")


def main() -> int:
    """0 where no median ratio is above 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vram", default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        image, plan = Path(folder) / "image.png", Path(folder) / "plan.json"
        width, height = (int(part) for part in options.size.split("x"))
        with Image.open(PHOTO) as photo:
            photo.resize((width, height)).save(image)
        _plan(options, image, plan)
        here, there = multiprocessing.get_context("spawn").Pipe()
        worker = multiprocessing.get_context("spawn").Process(
            target=_transformers, args=(there, options.checkpoint, image, options.new_tokens)
        )
        worker.start()
        ours: list[dict[str, float]] = []
        theirs: list[dict[str, float]] = []
        here.recv()  # loaded and warm
        for round_ in range(options.rounds):
            here.send("run")
            theirs.append(here.recv())
            ours.append(_execute(options, image, plan, Path(folder) / "record.json"))
            print(
                f"round {round_}: {_line(ours[-1])} | transformers {_line(theirs[-1])}", flush=True
            )
        here.send("end")
        worker.join()
    return _print(ours, theirs)


def _plan(options: argparse.Namespace, image: Path, plan: Path) -> None:
    checkpoint = read_checkpoint(options.checkpoint)
    bounds = {"min_pixels": checkpoint.min_pixels, "max_pixels": checkpoint.max_pixels}
    workload = make_workload(
        [parse_image(str(image), **bounds)],
        **bounds,
        text=PROMPT,
        tokenizer_json=checkpoint.tokenizer_json,
        max_new_tokens=options.new_tokens,
    )
    budget = parse_bytes(options.vram) if options.vram else None
    request, device = Request(checkpoint, workload, budget), load_profile("cpu")
    found = search(request, device)
    if budget is None:
        shape, tiles = checkpoint.shape, found.levers.tiles
        vision = PhaseResidency(shape.vision.depth, shape.vision.depth)
        heads = -(-shape.text.vocabulary // tiles.vocabulary_rows)
        text = PhaseResidency(shape.text.layers, shape.text.layers, heads)
        found = build(request, device, Choice("all_first", True, 1, vision, text, text, tiles))
    found.save(plan)


def _execute(
    options: argparse.Namespace, image: Path, plan: Path, record: Path
) -> dict[str, float]:
    command = [sys.executable, "-m", "executor.cli", str(plan), "--model", str(options.checkpoint)]
    command += ["--image", str(image), "--prompt", PROMPT, "--record", str(record), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = json.loads(record.read_text())
    seconds = {phase["phase"]: phase["seconds"] for phase in found["phases"]}
    seconds["decode"] /= found["new_tokens"] - 1
    return {phase: seconds[phase] for phase in PHASES} | {"peak": found["peak_bytes"]}


def _transformers(pipe: Connection, checkpoint: Path, image: Path, new_tokens: int) -> None:
    """In a process of its own: load, warm, then time one request for each message."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil
    from transformers.utils import logging

    from executor.prompt import build_prompt, load_tokenizer

    logging.disable_progress_bar()
    found = read_checkpoint(checkpoint)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        checkpoint, dtype=getattr(torch, found.shape.dtype), attn_implementation="sdpa"
    )
    model.eval()
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # from_pretrained maps the file
    planned = parse_image(str(image), min_pixels=found.min_pixels, max_pixels=found.max_pixels)
    processor = Qwen2VLImageProcessorPil(min_pixels=found.min_pixels, max_pixels=found.max_pixels)
    with Image.open(image) as opened:
        pixels = processor(opened.convert("RGB"), return_tensors="pt")
    token_ids: TokenIds = found.shape.token_ids
    ids = build_prompt(load_tokenizer(checkpoint), PROMPT, (planned,), token_ids)
    inputs = torch.tensor([ids])
    grid = pixels["image_grid_thw"]
    values = pixels["pixel_values"].to(model.dtype)

    def run() -> dict[str, float]:
        with torch.inference_mode():
            start = time.perf_counter()
            model.model.get_image_features(values, grid)
            vision = time.perf_counter() - start
            start = time.perf_counter()
            out = model(
                input_ids=inputs,
                mm_token_type_ids=(inputs == token_ids.image).long(),
                attention_mask=torch.ones_like(inputs),
                pixel_values=values,
                image_grid_thw=grid,
                use_cache=True,
                logits_to_keep=1,
            )
            prefill = time.perf_counter() - start - vision
            cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            start = time.perf_counter()
            for _ in range(new_tokens - 1):
                out = model(input_ids=token, past_key_values=cache, use_cache=True)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
            decode = (time.perf_counter() - start) / (new_tokens - 1)
        return {"vision": vision, "prefill": prefill, "decode": decode, "peak": _peak()}

    run()
    pipe.send("ready")
    while pipe.recv() == "run":
        pipe.send(run())


def _peak() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) * 1024
    return 0.0


def _line(found: dict[str, float]) -> str:
    times = ", ".join(f"{phase} {found[phase]:.3f} s" for phase in PHASES)
    return f"{times}, peak {found['peak'] / 2**30:.2f} GiB"


def _print(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> int:
    print("\n| | execute | transformers | median ratio |\n|---|---:|---:|---:|")
    worst = 0.0
    for key in (*PHASES, "peak"):
        ratio = statistics.median(a[key] / b[key] for a, b in zip(ours, theirs, strict=True))
        worst = max(worst, ratio)
        scale, unit = (2**30, "GiB") if key == "peak" else (1, "s")
        mine = statistics.median(a[key] for a in ours) / scale
        other = statistics.median(b[key] for b in theirs) / scale
        name = f"{key} per token" if key == "decode" else key
        print(f"| {name} | {mine:.3f} {unit} | {other:.3f} {unit} | {ratio:.2f} |")
    return int(worst > 1)


if __name__ == "__main__":
    sys.exit(main())
