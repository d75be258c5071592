"""The usual way against the plan over sizes of one image: what the pictures of a notebook draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from planner.checkpoint.spec import Checkpoint
from planner.plan.prediction import Prediction
from planner.profile import DeviceProfile
from planner.search import Request, search, usual_way
from planner.workload import make_workload, parse_image

LARGEST_PX = 2**25  # so that no size is shrunk


class SizePoint(NamedTuple):
    """One size of image: what it is resized to, and both ways to run it."""

    megapixels: float
    budget_bytes: int
    usual: Prediction
    planned: Prediction


def by_pixels(
    checkpoint: Checkpoint, device: DeviceProfile, budget_bytes: int, sizes: Sequence[str]
) -> tuple[SizePoint, ...]:
    """For one image of each of these sizes (`3840x2160`), not shrunk, the usual way and the plan for the budget."""
    return tuple(_point(checkpoint, device, budget_bytes, size) for size in sizes)


def _point(
    checkpoint: Checkpoint, device: DeviceProfile, budget_bytes: int, size: str
) -> SizePoint:
    least = checkpoint.min_pixels
    image = parse_image(size, min_pixels=least, max_pixels=LARGEST_PX)
    workload = make_workload([image], min_pixels=least, max_pixels=LARGEST_PX)
    request = Request(checkpoint, workload, budget_bytes)
    return SizePoint(
        megapixels=image.width_px * image.height_px / 1e6,
        budget_bytes=budget_bytes,
        usual=usual_way(request, device).prediction,
        planned=search(request, device, compared=False).prediction,
    )
