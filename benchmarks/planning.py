"""Planning over models, budgets and images: does it fit, with which levers, and how long planning took; as markdown.

    python benchmarks/planning.py [--models 3b 7b] [--sizes 1920x1080] [--device cpu]

Each budget is planned for on a card of that size, or on one device. "planned in" is one process's `plan`, interpreter start included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

CARDS = {
    "6GB": "rtx-3060-laptop-6gb",
    "8GB": "rtx-4060-8gb",
    "12GB": "rtx-4070-12gb",
    "16GB": "rtx-5080-16gb",
    "24GB": "rtx-4090-24gb",
    "48GB": "rtx-6000-ada-48gb",
    "80GB": "h100-sxm5-80gb",
}
MODELS = ("3b", "7b", "32b", "72b")
SIZES = ("1280x720", "1920x1080", "3840x2160")
ORDERS = {"all_first": "SUM", "vision_then_llm": "MAX", "prefetch": "MAX, prefetched"}
PLAN = "import sys; from planner.cli import main; sys.exit(main())"
DOES_NOT_FIT = 3


def main() -> None:
    """Print one row per request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--budgets", nargs="+", default=list(CARDS))
    parser.add_argument("--device", help="for every budget, in place of a card of that size")
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    options = parser.parse_args()
    others = sorted(set(options.budgets) - set(CARDS))
    if others and not options.device:
        parser.error(
            f"no card of {', '.join(others)} here: name one with --device, or take of {', '.join(CARDS)}"
        )
    print(
        "| model | budget | image | bound GiB | seconds | over the lower bound | order | LLM resident in decode | planned in s |"
    )
    print("|---|---|---|---:|---:|---:|---|---|---:|")
    for model in options.models:
        for budget in options.budgets:
            for size in options.sizes:
                device = options.device or CARDS[budget]
                print(_row(model, budget, device, size), flush=True)


def _row(model: str, budget: str, device: str, size: str) -> str:
    words = [
        "--vram",
        budget,
        "--device",
        device,
        "--model",
        model,
        "--image",
        size,
        "--json",
    ]
    start = time.perf_counter()
    ran = subprocess.run([sys.executable, "-c", PLAN, *words], capture_output=True, text=True)
    took = time.perf_counter() - start
    head = f"| {model} | {budget} | {size} |"
    if ran.returncode == DOES_NOT_FIT:
        verdict = ran.stderr.partition("\n")[0].partition(": ")[2]
        return f"{head} | | | {verdict} | | {took:.2f} |"
    if ran.returncode:
        raise SystemExit(f"plan {' '.join(words)} ended with {ran.returncode}: {ran.stderr}")
    plan = json.loads(ran.stdout)
    said = plan["prediction"]
    gap = said["seconds"] / said["seconds_lower_bound"] - 1
    return (
        f"{head} {said['bound_peak_bytes'] / 2**30:.2f} | {said['seconds']:.1f} | {gap:.2%} | "
        f"{ORDERS[plan['levers']['order']]} | {_resident(plan)} | {took:.2f} |"
    )


def _resident(plan: dict[str, Any]) -> str:
    counts = [r for r in plan["levers"]["residency"] if r["phase"] == "decode"]
    shares = {r["unit_class"].partition(".")[2]: (r["resident"], r["total"]) for r in counts}
    if all(resident == total for resident, total in shares.values()):
        return "all"
    return ", ".join(f"{name} {a}/{b}" for name, (a, b) in shares.items() if name != "norm")


if __name__ == "__main__":
    main()
