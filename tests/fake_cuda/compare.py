"""Plans for a card of each compute capability, and what their walks show beside what they list."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from planner.simulate import card_bytes
from tests.fake_cuda.trace import Block
from tests.fake_cuda.walk import Walk, scratch_bytes

# one profile of each compute capability
CARDS = {
    "8.0": "a100-sxm4-80gb",
    "8.6": "rtx-3090-24gb",
    "8.9": "rtx-4090-24gb",
    "9.0": "h100-sxm5-80gb",
    "12.0": "rtx-5080-16gb",
}
OLD_CARDS = {"7.5": "t4-16gb"}  # without bfloat16, and without the flash kernel


class Compared(NamedTuple):
    """One plan beside its walk. `wrong`: one sentence for everything in which they differ."""

    steps: int
    blocks: int  # that the walk saw, over all distinct steps
    declared: int  # that the plan lists beside them
    reserved_bytes: int
    planned_reserved_bytes: int
    wrong: tuple[str, ...]


def make_plan(
    model: str,
    image: str,
    budget: str | None,
    capability: str,
    allocator: Any = None,
    *,
    dtype: str = "bfloat16",
) -> Any:
    """A plan as the command line makes it, for that model, image and budget on a card of that capability."""
    from planner.checkpoint.spec import resolve_model
    from planner.profile import load_profile
    from planner.search import Request, search
    from planner.units import parse_bytes
    from planner.workload import make_workload, parse_image

    checkpoint = resolve_model(model)
    shape = checkpoint.shape.model_copy(update={"dtype": dtype})
    checkpoint = dataclasses.replace(checkpoint, shape=shape)
    vision, limits = checkpoint.shape.vision, (checkpoint.min_pixels, checkpoint.max_pixels)
    images = [
        parse_image(
            name,
            min_pixels=limits[0],
            max_pixels=limits[1],
            patch_px=vision.patch_px,
            merge=vision.merge,
            window_px=vision.window_px,
        )
        for name in image.split()
    ]
    workload = make_workload(images, min_pixels=limits[0], max_pixels=limits[1], max_new_tokens=128)
    bytes_ = None if budget is None else parse_bytes(budget, what="--vram")
    request = Request(checkpoint, workload, bytes_, allocator=allocator)
    return search(request, load_profile((CARDS | OLD_CARDS)[capability]))


def seen(blocks: Sequence[Any]) -> tuple[Any, ...]:
    """A plan's blocks without the declared ones, counted anew."""
    numbers = [n for n, block in enumerate(blocks) if not block.declared]
    return tuple(
        blocks[n].model_copy(
            update={"birth": number, "death": sum(other < blocks[n].death for other in numbers)}
        )
        for number, n in enumerate(numbers)
    )


def compare(plan: Any, found: Walk) -> Compared:
    """Everything that the walk shows and the plan does not list, and the reverse."""
    wrong = list(found.complaints)
    by_id = {step.id: step for step in plan.steps}
    for step_id, every in found.steps.items():
        listed = tuple(
            Block(block.size_bytes, block.birth, block.death)
            for block in seen(by_id[step_id].outside)
        )
        for blocks in every:
            if blocks != listed:
                wrong.append(f"{step_id}: walked {blocks}, planned {listed}")
    kept = tuple(block.size_bytes for block in plan.device.kept if not block.declared)
    for what, walked, planned in (
        ("arena", found.arena_bytes, plan.prediction.arena_bytes),
        ("kept", found.kept, kept),
    ):
        if walked != planned:
            wrong.append(f"{what}: walked {walked}, planned {planned}")
    # the walk cannot take the declared blocks, so neither side counts them here
    bare = card_bytes(
        plan.prediction.arena_bytes,
        plan.device.kept,
        [seen(step.outside) for step in plan.steps],
        scratch_bytes=scratch_bytes(plan),
        alloc_conf=plan.device.alloc_conf,
    )
    planned_reserved = plan.prediction.phases[0].reserved_peak_bytes
    if bare.reserved != found.reserved_bytes or planned_reserved < bare.reserved:
        wrong.append(
            f"reserved: walked {found.reserved_bytes}, planned {bare.reserved} and {planned_reserved} with what is declared"
        )
    allocated = max(bare.start_allocated, *bare.allocated)
    if allocated != found.allocated_peak_bytes:
        wrong.append(f"allocated: walked {found.allocated_peak_bytes}, planned {allocated}")
    listed_steps = [by_id[step_id] for step_id in found.steps]
    return Compared(
        steps=len(found.steps),
        blocks=sum(len(every[0]) for every in found.steps.values()),
        declared=sum(block.declared for step in listed_steps for block in step.outside),
        reserved_bytes=found.reserved_bytes,
        planned_reserved_bytes=planned_reserved,
        wrong=tuple(wrong),
    )
