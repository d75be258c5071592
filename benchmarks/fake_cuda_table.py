"""What the executor takes outside the arena on a card that is not there, beside what plans list: a Markdown table.

    python benchmarks/fake_cuda_table.py [--model 3b] [--image 1920x1080] [--allocator expandable]

One line per model, image, budget and compute capability. Every distinct step is walked under FakeTensorMode on `cuda:0`
(tests/fake_cuda); `equal` says that the ordered list of blocks (size, birth, death), what is kept throughout,
allocated and reserved bytes are the plan's. No card, no weights. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from planner.errors import BudgetTooSmall
from tests.fake_cuda.card import FakeCard
from tests.fake_cuda.compare import CARDS, compare, make_plan
from tests.fake_cuda.walk import walk

IMAGES = ("560x420", "1920x1080", "3840x2160")
BUDGETS = {
    "3b": ("3GB", "6GB", "12GB"),
    "7b": ("4GB", "10GB", "24GB"),
    "72b": ("12GB", "48GB", "160GB"),
}
GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", action="append", choices=list(BUDGETS))
    parser.add_argument("--image", action="append")
    parser.add_argument("--allocator", choices=("native", "expandable"), default="native")
    options = parser.parse_args()
    print(
        "| model | image | budget | capability | steps | blocks | declared | reserved walked | planned | equal |"
    )
    print("|---|---|---|---|---:|---:|---:|---:|---:|---|")
    wrong = 0
    for model in options.model or BUDGETS:
        for image in options.image or IMAGES:
            known: dict[Any, Any] = {}
            for budget in BUDGETS[model]:
                for capability in CARDS:
                    where = f"| {model} | {image} | {budget} | {capability} |"
                    try:
                        plan = make_plan(model, image, budget, capability, options.allocator)
                    except BudgetTooSmall:
                        print(f"{where} | | | | | no plan |", flush=True)
                        continue
                    card = FakeCard(capability, 192 * GIB, plan.device.alloc_conf)
                    found = compare(plan, walk(plan, card, known=known))
                    print(
                        f"{where} {found.steps} | {found.blocks} | {found.declared} | {found.reserved_bytes} "
                        f"| {found.planned_reserved_bytes} | {'no' if found.wrong else 'yes'} |",
                        flush=True,
                    )
                    for sentence in found.wrong:
                        print(sentence, file=sys.stderr)
                    wrong += bool(found.wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
