"""What the canonical space gives away: the search beside trying every resident set, tile, depth, order and way of handling images.

    python benchmarks/optimality.py [--requests N] [--seed S] [--seconds S] [--out FILE]

Small random requests on random devices, so that all can be tried (`everything.py`). Models of one or two layers and one
to three blocks of vision, 16 or 32 bits, no image, one or two, budgets anywhere between the smallest and what the
unlimited plan takes. As in every real model attention halves are smaller than MLP halves, and on a card the arena is
large enough for a segment of its own. With --out each request's verdict is a line of a file, and those already there
are not judged again.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from everything import EQUAL, Everything

from planner.certificate import least_plan
from planner.checkpoint.spec import Checkpoint
from planner.checkpoint.template import template
from planner.plan.shapes import ModelShape, TextShape, TokenIds, VisionShape
from planner.problem import Problem, Request
from planner.profile import DeviceProfile, load_profile
from planner.search import search, usual_way
from planner.workload import make_workload, plan_image

CLOSE = 0.01
SECONDS = 60.0  # of the processor, for one request


# --- random requests ----------------------------------------------------------------------------------------------


def drawn(seed: int) -> tuple[Request, DeviceProfile]:
    """A small request between its smallest budget and no limit, on a device where copies matter."""
    draw = random.Random(seed)
    depth, layers = draw.choice([1, 2, 2, 3]), draw.choice([1, 2, 2])
    on_cpu = draw.random() < 0.4
    wide, broad = (
        draw.choice([64, 640, 1280]),
        draw.choice([128, 512, 2048] if on_cpu else [2560, 3584]),
    )
    vision = VisionShape(
        depth=depth,
        hidden=wide,
        heads=4,
        intermediate=wide * draw.choice([2, 3]),
        out_hidden=broad,
        in_channels=3,
        patch_px=14,
        temporal_patch=2,
        merge=2,
        window_px=112,
        full_attention_blocks=(depth - 1,),
    )
    text = TextShape(
        layers=layers,
        hidden=broad,
        heads=4,
        kv_heads=2,
        head_dim=broad // 4,
        intermediate=broad * draw.choice([2, 3, 5]),
        vocabulary=draw.choice([128, 640, 6000]),
        rope_theta=1e6,
        mrope_section=(broad // 32, 3 * broad // 64, 3 * broad // 64),
        rms_norm_eps=1e-6,
        tied=False,
    )
    shape = ModelShape(
        name="tiny",
        dtype=draw.choice(["float32", "bfloat16"]),
        vision=vision,
        text=text,
        token_ids=TokenIds(image=1, video=2, vision_start=3, vision_end=4, stop=(5,)),
        repetition_penalty=1.0,
        fingerprint="0" * 64,
    )
    checkpoint = Checkpoint(
        directory=None,
        shape=shape,
        tensors={},
        tensor_shapes=template(vision, text),
        min_pixels=3136,
        max_pixels=12845056,
        tokenizer_json=None,
        tokenizer_bytes=100_000,
    )
    most = draw.choice([8, 16, 40])
    sides = [
        (28 * draw.randint(2, most), 28 * draw.randint(2, most)) for _ in range(draw.randint(0, 2))
    ]
    images = [plan_image(f"{w}x{h}", w, h, min_pixels=3136, max_pixels=12845056) for w, h in sides]
    workload = make_workload(
        images,
        min_pixels=3136,
        max_pixels=12845056,
        n_text_tokens=draw.choice([8, 100, 400, 1500]),
        max_new_tokens=draw.choice([1, 2, 4, 16, 64]),
        context_tokens=None,
    )
    profile = device(draw, "cpu" if on_cpu else "rtx-5080-16gb")
    request = Request(checkpoint, workload, None)
    least = least_plan(Problem(request, profile)).bound_bytes
    most = usual_way(request, profile).prediction.bound_peak_bytes
    share = draw.random() ** draw.choice([2, 4])  # where much is left there is little to choose
    budget = int(least + share * (most - least))
    return replace(request, budget_bytes=budget), profile


def device(draw: random.Random, name: str) -> DeviceProfile:
    """A device with links slow and fast beside its products."""
    base = load_profile(name).model_dump()
    flops = 10 ** draw.uniform(8, 10.5)
    rates = [(1, max(int(flops / 30), 1)), (64, int(flops / 3)), (1024, int(flops))]
    link = int(10 ** draw.uniform(6, 9))
    table = {"bits16": rates, "float32": rates}
    changed = {
        "matmul_flops_per_s": table,
        "attention_flops_per_s": table,
        "bandwidth_bytes_per_s": 20 * link,
        "host_to_device_bytes_per_s": link,
        "page_cache_bytes_per_s": link * draw.randint(1, 6) // 2,
        "pin_bytes_per_s": 0 if base["kind"] == "cpu" else link * draw.randint(1, 4),
        "disk_bytes_per_s": max(link // draw.randint(1, 3), 1),
        "launch_s": 1e-6,
        "default_ram_bytes": draw.choice([0, 2**30]),
    }
    if "measured" in base:
        changed["measured"] = None
    return DeviceProfile.model_validate(base | changed)


# --- verdicts -----------------------------------------------------------------------------------------------------


def judged(seed: int, seconds: float = SECONDS) -> dict[str, object]:
    """One request: by how much its plan is slower than the fastest setting of all; None where that took too long to find."""
    request, profile = drawn(seed)
    plan = search(request, profile, compared=False)
    found = plan.prediction
    problem = Problem(request, profile)
    answer = found.seconds - problem.start_s(plan.levers.tiles)
    everything = Everything(problem)
    began = time.process_time()
    loss: float | None = None
    instead = None
    try:
        best, choice = everything.fastest(answer, seconds)
        loss, instead = answer / best - 1, choice and repr(choice)
    except TimeoutError:
        pass
    return {
        "seed": seed,
        "device": profile.kind,
        "dtype": problem.model.dtype,
        "images": len(request.workload.images),
        "layers": problem.model.text.layers,
        "new_tokens": request.workload.max_new_tokens,
        "budget_bytes": request.budget_bytes,
        "smallest_bytes": found.smallest_budget_bytes,
        "gap": found.seconds / found.seconds_lower_bound - 1,
        "loss": loss,
        "instead": instead,
        "pairs": everything.settings,
        "timed": everything.timed,
        "built": everything.built,
        "processor_s": round(time.process_time() - began, 2),
    }


def table(verdicts: Sequence[dict[str, object]]) -> str:
    """How many requests are answered as well as trying everything does, and what is lost in the others."""
    lines = [
        "| requests | equal | within 1 % | more | largest loss | not judged |",
        "|---|---|---|---|---|---|",
    ]
    kinds: dict[str, Callable[[dict[str, object]], bool]] = {
        "all": lambda v: True,
        "card": lambda v: v["device"] == "cuda",
        "CPU": lambda v: v["device"] == "cpu",
        "text only": lambda v: v["images"] == 0,
    }
    for name, of_kind in kinds.items():
        losses = [v["loss"] for v in verdicts if of_kind(v)]
        known = [loss for loss in losses if isinstance(loss, float)]
        equal = sum(loss <= EQUAL for loss in known)
        close = sum(EQUAL < loss <= CLOSE for loss in known)
        more = sum(loss > CLOSE for loss in known)
        largest = max(known, default=0.0)
        lines.append(
            f"| {name}: {len(losses)} | {equal} | {close} | {more} | {largest:.2%} | {len(losses) - len(known)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Judge the requests, name those that are not equal, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = (
        arguments.out.read_text().splitlines() if arguments.out and arguments.out.exists() else []
    )
    verdicts = {v["seed"]: v for v in map(json.loads, lines)}
    seeds = range(arguments.seed, arguments.seed + arguments.requests)
    for seed in seeds:
        if seed not in verdicts:
            verdict = verdicts[seed] = judged(seed, arguments.seconds)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(verdict) + "\n")
        loss, gap = verdicts[seed]["loss"], verdicts[seed]["gap"]
        if loss is None:
            print(f"{seed}: not judged in {arguments.seconds:.0f} s", flush=True)
        elif loss > EQUAL:
            print(
                f"{seed}: {loss:.3%} slower than the best of all; stated gap {gap:.3%}", flush=True
            )
    print(table([verdicts[seed] for seed in seeds]))


if __name__ == "__main__":
    main()
