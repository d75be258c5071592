"""Packing against its lower bound: tables of buffers, and the layouts of a grid of plans.

    python benchmarks/packing.py FOLDER... --capacity 1048576    every *.csv in the folders, as `plan pack` would
    python benchmarks/packing.py --plans                         models x budgets x image sizes, as `plan` would

The tables with known answers are the "challenging" ones of https://github.com/google/minimalloc (Apache-2.0).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

from planner import evaluate
from planner.arguments import Parser
from planner.checkpoint.spec import resolve_model
from planner.errors import BudgetTooSmall
from planner.graph import Intervals
from planner.layout import SECONDS, Layout, pack, place
from planner.layout.cli import read
from planner.profile import load_profile
from planner.search import Request, search
from planner.workload import make_workload, plan_image

MODELS = ("3b", "7b", "32b", "72b")
BUDGETS_GB = (6, 8, 12, 16, 24, 48, 80)
IMAGES = ((640, 480), (1920, 1080), (3840, 2160))


def main() -> None:
    parser = Parser("packing", __doc__ or "")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--capacity", type=int, help="default: each table's lower bound")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--plans", action="store_true")
    parser.add_argument("--device", default="rtx-5080-16gb")
    options = parser.parse_args()
    for folder in options.folders:
        tables(folder, options)
    if options.plans:
        plans(options.device)


def tables(folder: Path, options: argparse.Namespace) -> None:
    """One line per table."""
    print(
        f"{'table':24} {'buffers':>7} {'bound':>10} {'height':>10} {'nodes':>8} {'seconds':>8}  method"
    )
    for path in sorted(folder.glob("*.csv")):
        _, _, spans = read(path)
        start = time.perf_counter()
        found = pack(spans, options.capacity or 0, seconds=options.seconds)
        seconds = time.perf_counter() - start
        method = "search" if found.nodes else "first fit"
        print(
            f"{path.stem:24} {len(spans):7} {found.lower_bound:10} {found.height:10} "
            f"{found.nodes:8} {seconds:8.2f}  {method}"
        )


def plans(device_name: str) -> None:
    """One line per model: layouts worked out on the way to its plans, and how many end above their bound."""
    made: list[tuple[Layout, float]] = []

    def recorded(sizes: Mapping[str, int], lifetimes: Mapping[str, Intervals]) -> Layout:
        start = time.perf_counter()
        layout = place(sizes, lifetimes)
        made.append((layout, time.perf_counter() - start))
        return layout

    vars(evaluate)["place"] = recorded  # every layout goes through it
    device = load_profile(device_name)
    print("model  plans  above bound  layouts  above bound  largest gap  ms each  ms at most")
    for model in MODELS:
        checkpoint = resolve_model(model)
        made.clear()
        chosen: list[float] = []
        for width, height in IMAGES:
            vision = checkpoint.shape.vision
            image = plan_image(
                f"{width}x{height}",
                width,
                height,
                min_pixels=checkpoint.min_pixels,
                max_pixels=checkpoint.max_pixels,
                patch_px=vision.patch_px,
                merge=vision.merge,
                window_px=vision.window_px,
            )
            workload = make_workload(
                [image], min_pixels=checkpoint.min_pixels, max_pixels=checkpoint.max_pixels
            )
            for budget in BUDGETS_GB:
                try:
                    plan = search(Request(checkpoint, workload, budget * 10**9), device)
                except BudgetTooSmall:
                    continue
                chosen.append(plan.prediction.arena_bytes / plan.prediction.live_peak_bytes - 1)
        gaps = [layout.height_bytes / layout.lower_bound_bytes - 1 for layout, _ in made]
        times = [1000 * seconds for _, seconds in made]
        print(
            f"{model:5} {len(chosen):6} {sum(gap > 0 for gap in chosen):12} {len(gaps):8} "
            f"{sum(gap > 0 for gap in gaps):12} {max(gaps):11.3%} {sum(times) / len(times):8.1f} {max(times):11.0f}"
        )


if __name__ == "__main__":
    main()
