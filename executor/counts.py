"""Whether a plan's numbers of tokens, patches and pixels agree, before anything is made as large as they say."""

from __future__ import annotations

import math

from planner.errors import PlanFileError
from planner.plan import Plan
from planner.plan.shapes import Image, ModelShape

MOST_TOKENS = 2**24
MOST_PIXELS = 2**31


def check_counts(plan: Plan) -> None:
    """Nothing, if the plan's counts agree with one another; PlanFileError names the first that does not."""
    workload = plan.workload
    for name, found in (
        ("prompt_tokens", workload.prompt_tokens),
        ("max_new_tokens", workload.max_new_tokens),
        ("context_tokens", workload.context_tokens),
        ("decode_repeats", plan.decode_repeats + 1),
    ):
        if not 1 <= found <= MOST_TOKENS:
            raise PlanFileError(f"the plan's {name} cannot be; make the plan anew")
    for tile, rows in plan.levers.tiles:
        if rows < 1:
            raise PlanFileError(f"the plan's tile of {rows} {tile} cannot be; make the plan anew")
    _check_shapes(plan.model)
    patch = plan.model.vision.patch_px
    for image in workload.images:
        if not _agrees(image, patch):
            raise PlanFileError(
                f"{image.name}: its pixels, patches and windows do not agree; make the plan anew"
            )


def _check_shapes(model: ModelShape) -> None:
    tower, language = model.vision, model.text
    for part, shape in (("vision", tower), ("text", language)):
        for name, value in shape:
            least = 0 if isinstance(value, bool) else 1
            if isinstance(value, int) and not least <= value <= MOST_TOKENS:
                raise PlanFileError(f"the plan's {part} {name} cannot be; make the plan anew")
    unit_px = tower.patch_px * tower.merge
    for name, agrees in (
        ("merge", tower.merge == 2),
        ("window_px", tower.window_px % unit_px == 0),
        ("heads", tower.hidden % tower.heads == 0 and language.heads % language.kv_heads == 0),
        ("mrope_section", 2 * sum(language.mrope_section) == language.head_dim),
        ("rope_theta", math.isfinite(language.rope_theta) and language.rope_theta > 0),
        ("rms_norm_eps", math.isfinite(language.rms_norm_eps) and language.rms_norm_eps > 0),
    ):
        if not agrees:
            raise PlanFileError(f"the plan's {name} does not agree; make the plan anew")


def _agrees(image: Image, patch_px: int) -> bool:
    return (
        image.rows > 0
        and image.cols > 0
        and image.rows % 2 == image.cols % 2 == 0
        and image.height_px == image.rows * patch_px
        and image.width_px == image.cols * patch_px
        and image.width_px * image.height_px <= MOST_PIXELS
        and image.source_width_px > 0
        and image.source_height_px > 0
        and all(run.count > 0 and run.rows > 0 for run in image.windows)
        and sum(run.count * run.rows for run in image.windows) == image.patches
    )
