"""What the canonical space gives away: the search beside trying every resident set, tile, depth, order and way of handling images.

    python benchmarks/optimality.py [--requests N] [--seed S]

Small random models on random devices, so that all can be tried: every subset of the units resident in vision, in
decode, and in prefill a subset of decode's. Two exact arguments shorten the list: kinds of steps never run at once, so
that under a cap on blocks outside the arena each takes its fastest tiles that fit; and a setting whose lower bound is
not below the search's answer is not timed.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product

from planner.checkpoint.spec import Checkpoint
from planner.checkpoint.template import template
from planner.fronts import START, fastest
from planner.parts import both, worked
from planner.plan import ModelShape, Order, TextShape, TokenIds, VisionShape
from planner.problem import Problem, Request
from planner.profile import DeviceProfile, load_profile
from planner.schedule import Choice, PhaseResidency
from planner.search import search
from planner.space import DEPTHS, Root, Space
from planner.variants import evaluate_ordered
from planner.workload import make_workload, plan_image

EQUAL = 1e-9
CLOSE = 0.01


def drawn(seed: int) -> tuple[Request, DeviceProfile]:
    """A small request between its smallest budget and no limit, on a device where copies matter."""
    draw = random.Random(seed)
    depth, layers = draw.randint(2, 3), 2
    vision = VisionShape(
        depth=depth,
        hidden=64,
        heads=4,
        intermediate=draw.choice([92, 300]),
        out_hidden=64,
        in_channels=3,
        patch_px=14,
        temporal_patch=2,
        merge=2,
        window_px=112,
        full_attention_blocks=(depth - 1,),
    )
    text = TextShape(
        layers=layers,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate=draw.choice([64, 180, 2000, 20000]),
        vocabulary=draw.choice([128, 640, 640]),
        rope_theta=1e6,
        mrope_section=(2, 3, 3),
        rms_norm_eps=1e-6,
        tied=False,
    )
    shape = ModelShape(
        name="tiny",
        dtype="float32",
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
    sides = [
        (28 * draw.randint(2, 16), 28 * draw.randint(2, 16)) for _ in range(draw.randint(0, 2))
    ]
    images = [plan_image(f"{w}x{h}", w, h, min_pixels=3136, max_pixels=12845056) for w, h in sides]
    workload = make_workload(
        images,
        min_pixels=3136,
        max_pixels=12845056,
        n_text_tokens=draw.choice([8, 100, 400]),
        max_new_tokens=draw.choice([1, 2, 4, 16, 64]),
        context_tokens=None,
    )
    profile = device(draw)
    request = Request(checkpoint, workload, None)
    whole = search(request, profile, compared=False).prediction
    least = whole.smallest_budget_bytes
    share = draw.random()
    budget = int(least + share * (whole.bound_peak_bytes - least))
    return replace(request, budget_bytes=budget), profile


def device(draw: random.Random) -> DeviceProfile:
    """A card, or three times in ten a CPU, with links slow and fast beside its products."""
    base = load_profile("cpu" if draw.random() < 0.3 else "rtx-5080-16gb").model_dump()
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


def subsets(units: frozenset[int] | range) -> list[frozenset[int]]:
    found = sorted(units)
    return [frozenset(c) for n in range(len(found) + 1) for c in combinations(found, n)]


def residents(space: Space, rows: int) -> Iterator[tuple[PhaseResidency, PhaseResidency]]:
    """Every (decode, prefill) with prefill's a subset of decode's."""
    layers, _, heads = space.parts.totals(rows)
    for outer in product(subsets(range(layers)), subsets(range(layers)), subsets(range(heads))):
        decode = PhaseResidency.of(*outer)
        for inner in product(*map(subsets, outer)) if space.repeats else [outer]:
            yield decode, PhaseResidency.of(*inner)


def settings(problem: Problem, below: float) -> Iterator[tuple[float, Choice]]:
    """Every setting whose lower bound is below so many seconds, with that bound."""
    space = Space(problem)
    parts = space.parts
    blocks = problem.model.vision.depth
    orders: tuple[Order, ...] = ("vision_then_llm", "prefetch", "all_first")
    for depth, rows, cap in product(DEPTHS, space.vocabulary_rows(), space.caps):
        room = space.room(Root(depth, rows), cap)
        start = START.model_copy(update={"vocabulary_rows": rows})
        towers = []
        for together in space.modes if problem.workload.images else [True]:
            pairs = product(subsets(range(blocks)), subsets(range(blocks)))
            for attn, mlp in pairs if problem.workload.images else [(frozenset(), frozenset())]:
                residency = PhaseResidency.of(attn, mlp)
                frame = parts.vision(together, residency, depth, False)
                tiles = fastest(space.vision.get(together, {}), frame.base, room, cap) or {}
                if not tiles and problem.workload.images:
                    continue
                steps = parts.seconds("vision", frame.bare, START.model_copy(update=tiles))
                found = (
                    min(both(steps, frame.jobs, problem.costs.beside)),
                    sum(steps),
                    frame.copy_seconds,
                )
                towers.append((found, together, residency, tiles))
        if not towers:
            continue
        quickest = min(tower[0][0] for tower in towers)
        taken = space.stack(space, rows).decode_taken
        for decode, prefill in residents(space, rows):
            rest = 0.0
            if space.repeats:
                loop = parts.decode(decode, prefill, depth, rows)
                if any(base + taken.get(k, 0) > room for k, base in loop.base.items()):
                    continue
                rest = parts.looped(decode, prefill, depth, start).seconds(space.repeats)
            frame = parts.prefill(prefill, decode, depth, rows)
            chosen = fastest(space.prefill, frame.base, room, cap)
            if chosen is None or quickest + rest >= below:
                continue
            steps = parts.seconds("prefill", frame.bare, start.model_copy(update=chosen))
            early = set(frame.early)
            filled = [
                j._replace(seconds=0.0) if n in early else j for n, j in enumerate(frame.jobs)
            ]
            alone, there = (
                min(both(steps, frame.jobs, problem.costs.beside)),
                min(both(steps, filled, problem.costs.beside)),
            )
            brought = sum(frame.jobs[n].seconds for n in early)
            for (seconds, compute, copied), together, residency, tiles in towers:
                bounds = (
                    seconds + alone,
                    max(seconds + there, copied + frame.copy_seconds),
                    brought + compute + there,
                )
                for order, bound in zip(orders, bounds, strict=True):
                    if order != "vision_then_llm" and not (problem.workload.images and early):
                        continue
                    if bound + rest < below:
                        everything = start.model_copy(update=tiles | chosen)
                        setting = (together, depth, residency, prefill, decode, everything)
                        yield bound + rest, Choice(order, *setting)


def tried(problem: Problem, answer: float) -> float:
    """Seconds of the fastest setting of all that fits; `answer` where none is faster."""
    space = Space(problem)
    budget = problem.request.budget_bytes
    below = answer * (1 - EQUAL)
    timed = []
    for bound, choice in sorted(settings(problem, below), key=lambda found: found[0]):
        found = worked(space.parts, choice)
        assert found.seconds >= bound * (1 - EQUAL), (found.seconds, bound, choice)
        fits = budget is None or space.footprint.bound(choice, found.live, found.held) <= budget
        if found.seconds < below and fits:
            timed.append((found.seconds, choice))
    for seconds, choice in sorted(timed, key=lambda found: found[0]):
        if budget is None or evaluate_ordered(problem, choice).bound_bytes <= budget:
            return seconds
    return answer


def main() -> None:
    """Print how many requests the search answers as well as trying everything, and what it loses in the others."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    losses = []
    for seed in range(arguments.seed, arguments.seed + arguments.requests):
        request, profile = drawn(seed)
        plan = search(request, profile, compared=False)
        found = plan.prediction
        answer = found.seconds - Problem(request, profile).start_s(plan.levers.tiles)
        best = tried(Problem(request, profile), answer)
        losses.append(answer / best - 1)
        gap = found.seconds - found.seconds_lower_bound
        if losses[-1] > EQUAL or gap > EQUAL:
            print(
                f"{seed}: {losses[-1]:.3%} slower than the best of all; gap {gap:.2e} s", flush=True
            )
    equal, close = sum(x <= EQUAL for x in losses), sum(x <= CLOSE for x in losses)
    print(
        f"{len(losses)} requests: {equal} equal to the best of all, {close} within 1 %, "
        f"largest loss {max(losses):.2%}"
    )


if __name__ == "__main__":
    main()
