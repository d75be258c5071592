"""Seconds of what the host does for a run: opening an image, cutting it into patches, making code for new products."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from executor.image import PixelSource, open_image
from executor.probe.bench import Bench, best
from planner.plan.shapes import Image, WindowRun


def pixel_values_per_s(side_px: int) -> int:
    """Patch values a second that the host cuts out of an image and normalises."""
    import numpy as np

    image = _image(side_px, side_px)
    source = PixelSource(np.full((side_px, side_px, 3), 100, dtype=np.uint8), image)
    out = torch.empty(image.patches, source.patch_values, dtype=torch.bfloat16)
    source.rows(0, image.patches, out)
    return best(lambda: source.rows(0, image.patches, out), out.numel(), 5)


def create_s(bench: Bench, rows: Sequence[int], width: int) -> float:
    """What the first product of so many rows with a square weight takes more than the second: the library makes code for it."""
    found = []
    weight = bench.numbers(width, width, dtype=torch.bfloat16)
    for count in rows:
        x = bench.numbers(count, width, dtype=torch.bfloat16)
        out = torch.empty_like(x)
        laps = []
        for _ in range(3):
            start = time.perf_counter()
            torch.mm(x, weight.t(), out=out)
            bench.synchronize()
            laps.append(time.perf_counter() - start)
        found.append(max(0.0, laps[0] - min(laps[1:])))
    return statistics.median(found)


def image_pixels_per_s(folder: Path | None, side_px: int) -> int:
    """Pixels of a file a second: decoded, and resized a little."""
    import numpy as np
    from PIL import Image as Pillow

    to = side_px // 28 * 28 - 28
    noise = np.random.default_rng(1).integers(0, 255, (side_px // 8, side_px // 8, 3), np.uint8)
    image = _image(side_px, to)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-", suffix=".jpg") as file:
        Pillow.fromarray(noise).resize((side_px, side_px)).save(file, "JPEG", quality=90)
        file.flush()
        open_image(Path(file.name), image)
        return best(lambda: open_image(Path(file.name), image), side_px**2, 3)


def _image(source_px: int, side_px: int) -> Image:
    """A square image; its windows matter to nobody here."""
    side = side_px // 14
    return Image(
        name="probe",
        source_width_px=source_px,
        source_height_px=source_px,
        width_px=side_px,
        height_px=side_px,
        rows=side,
        cols=side,
        windows=(WindowRun(count=side * side // 4, rows=4),),
    )
