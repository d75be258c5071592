from __future__ import annotations

import io
import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from PIL import ImageOps

from executor.image import ArrayPixels, PixelSource, open_image, patch_positions, window_order
from planner.errors import ImageError, PlanFileError
from planner.plan.shapes import Image
from planner.workload import parse_image, plan_image

LIMITS = {"min_pixels": 3136, "max_pixels": 12845056}


def processed(path: Path, max_pixels: int = 12845056) -> torch.Tensor:
    """transformers' pixel values (P, 1176), in block order."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    with Pillow.open(path) as picture:
        processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=max_pixels)
        values: torch.Tensor = processor(picture, return_tensors="pt")["pixel_values"]
    return values


def all_rows(source: PixelSource | ArrayPixels, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full((source.image.patches, source.patch_values), torch.nan, dtype=dtype)
    source.rows(0, source.image.patches, out)
    return out


def photo(width: int, height: int) -> Pillow.Image:
    """Smooth colours with some noise, different in every corner."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 40, (height, width, 3))
    base = np.stack(
        [x * 200 // width, y * 200 // height, (x + y) * 200 // (width + height)], axis=-1
    )
    return Pillow.fromarray((base + noise).astype(np.uint8))


def opened(path: Path, max_pixels: int = 12845056) -> PixelSource:
    return open_image(path, parse_image(str(path), min_pixels=3136, max_pixels=max_pixels))


def resized(path: Path, picture: Pillow.Image) -> bool:
    """Whether the file opens to what Pillow makes of `picture` in one go."""
    source = opened(path)
    size = (source.image.width_px, source.image.height_px)
    whole = PixelSource(np.array(picture.resize(size, Pillow.Resampling.BICUBIC)), source.image)
    return torch.equal(all_rows(source), all_rows(whole))


# --- order --------------------------------------------------------------------------------------------------------


def test_window_order_is_transformers_order_regrouped(golden: dict[str, Any]) -> None:
    cases = [case for case in golden["window_index"] if "window_index" in case]
    stills = [case for case in cases if len(case["grid_thw"]) == 1 and case["grid_thw"][0][0] == 1]
    assert len(stills) >= 3
    for case in stills:
        _, rows, cols = case["grid_thw"][0]
        image = plan_image("x", cols * 14, rows * 14, **LIMITS)
        height, width = rows // 2, cols // 2
        cuts = [stop // 4 for stop in case["cu_window_seqlens"]]
        windows = [case["window_index"][a:b] for a, b in itertools.pairwise(cuts)]

        def group(window: list[int], height: int = height, width: int = width) -> tuple[bool, bool]:
            row, col = divmod(window[0], width)
            return row >= height - height % 4, col >= width - width % 4

        regrouped = sorted(windows, key=group)  # stable
        assert window_order(image).tolist() == [unit for window in regrouped for unit in window]
        sizes = [run.rows for run in image.windows for _ in range(run.count)]
        assert sizes == [4 * len(window) for window in regrouped]
        if len(case["hw_position_ids"]) == image.patches:
            block = np.array(case["hw_position_ids"]).reshape(-1, 4, 2)
            expected = block[window_order(image)].reshape(-1, 2)
            assert np.array_equal(np.stack(patch_positions(image), axis=1), expected)


@settings(deadline=None)
@given(st.integers(1, 700), st.integers(1, 700))
def test_every_window_lies_in_one_cell_of_the_window_grid(width: int, height: int) -> None:
    try:
        image = plan_image("x", width, height, **LIMITS)
    except ImageError:
        return
    order = window_order(image)
    assert np.array_equal(np.sort(order), np.arange(image.tokens))
    rows, cols = patch_positions(image)
    start = 0
    for run in image.windows:
        for _ in range(run.count):
            stop = start + run.rows
            cells = {
                *zip(
                    (rows[start:stop] // 8).tolist(), (cols[start:stop] // 8).tolist(), strict=True
                )
            }
            assert len(cells) == 1
            start = stop
    assert start == image.patches


# --- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_pixels", [12845056, 200704])
def test_rows_are_transformers_pixel_values_bit_for_bit(examples: Path, max_pixels: int) -> None:
    path = examples / "astronaut.jpg"
    source = opened(path, max_pixels)
    theirs = ArrayPixels(processed(path, max_pixels), source.image)
    assert torch.equal(all_rows(source), all_rows(theirs))
    assert torch.equal(all_rows(source, torch.bfloat16), all_rows(theirs).bfloat16())


@pytest.mark.parametrize("tile", [1, 3, 64, 255, 600, 5000])
def test_any_tiling_gives_the_same_rows(tmp_path: Path, tile: int) -> None:
    path = tmp_path / "photo.png"
    photo(300, 500).save(path)
    source = opened(path)
    whole = all_rows(source)
    for start in range(0, source.image.patches, tile):
        stop = min(start + tile, source.image.patches)
        out = torch.empty(stop - start, source.patch_values)
        source.rows(start, stop, out)
        assert torch.equal(out, whole[start:stop])


@pytest.mark.parametrize("shape", [(4, 1176), (1296, 588), (1296,)])
def test_array_pixels_of_another_image_are_refused(
    planned: Callable[..., Image], shape: tuple[int, ...]
) -> None:
    words = f"1296 patches, 1176 each, found shape {shape}"
    with pytest.raises(ImageError, match=re.escape(words)):
        ArrayPixels(torch.zeros(shape), planned(512, 512))


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    [
        *((1, 1), (300, 500), (56, 200), (2000, 30), (31, 4000), (1400, 28)),
        *((99, 461), (590, 1999), (610, 1999)),  # Pillow 13 resizes the columns of these first
    ],
)
def test_resizing_in_strips_is_resizing_whole(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "photo.png"
    picture = photo(*size)
    picture.save(path)
    assert resized(path, picture)


@pytest.mark.parametrize("kind", ["jpg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(130, 300), (99, 461), (461, 99)])
def test_a_turned_photograph_is_shown_upright(
    tmp_path: Path, kind: str, orientation: int, size: tuple[int, int]
) -> None:
    path = tmp_path / f"photo.{kind}"
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    photo(*size).save(path, exif=exif)
    with Pillow.open(path) as stored:
        upright = ImageOps.exif_transpose(stored)
    assert resized(path, upright.convert("RGB"))


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr"])
def test_other_colours_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("photo.tiff" if mode in ("CMYK", "YCbCr") else "photo.png")
    picture = photo(130, 300).convert(mode)
    picture.save(path)
    assert resized(path, picture.convert("RGB"))


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    picture = photo(130, 300)
    mask = Pillow.linear_gradient("L").resize(picture.size)
    white = Pillow.new("RGB", picture.size, "white")
    blended = Pillow.composite(picture, white, mask)
    clear = picture.copy()
    clear.putalpha(mask)
    clear.save(tmp_path / "alpha.png")
    ours = all_rows(opened(tmp_path / "alpha.png"))
    size = (
        opened(tmp_path / "alpha.png").image.width_px,
        opened(tmp_path / "alpha.png").image.height_px,
    )
    blended.resize(size, Pillow.Resampling.BICUBIC).save(tmp_path / "blended.png")
    # two ways of rounding the blend: one level of 256 apart at most, about 0.015 after normalising
    assert (ours - all_rows(opened(tmp_path / "blended.png"))).abs().max() < 0.04
    palette = Pillow.new("P", (100, 100), 0)
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    Pillow.new("RGB", (100, 100), "white").save(tmp_path / "white.png")
    assert torch.equal(
        all_rows(opened(tmp_path / "palette.png")), all_rows(opened(tmp_path / "white.png"))
    )


def test_sixteen_bits_become_the_upper_eight(tmp_path: Path) -> None:
    gray = np.asarray(photo(130, 300).convert("L")).astype(np.uint16)
    Pillow.fromarray(gray * 256 + 99).save(tmp_path / "deep.png")
    with Pillow.open(tmp_path / "deep.png") as stored:
        assert stored.mode == "I;16"
    assert resized(tmp_path / "deep.png", Pillow.fromarray(gray.astype(np.uint8)).convert("RGB"))


def test_pixels_of_unknown_range_are_refused(tmp_path: Path) -> None:
    Pillow.new("F", (100, 100), 0.5).save(tmp_path / "float.tiff")
    with pytest.raises(ImageError, match="save it as an 8-bit image"):
        opened(tmp_path / "float.tiff")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
def test_a_file_cut_short_is_refused(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    photo(300, 500).save(buffer, format=kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) * 2 // 3])
    image = plan_image(path.name, 300, 500, **LIMITS)
    with pytest.raises(ImageError, match=str(path)):
        open_image(path, image)


def test_files_that_are_no_image_are_refused(tmp_path: Path, planned: Callable[..., Image]) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    with pytest.raises(ImageError, match="not an image that Pillow can read"):
        open_image(text, planned(100, 100))
    with pytest.raises(ImageError, match="no such file"):
        open_image(tmp_path / "none.jpg", planned(100, 100))
    with pytest.raises(ImageError):
        open_image(tmp_path, planned(100, 100))


def test_another_image_than_the_plans_is_refused(
    examples: Path, planned: Callable[..., Image]
) -> None:
    with pytest.raises(PlanFileError, match="for an image of 640x480 pixels, this one has 512x512"):
        open_image(examples / "astronaut.jpg", planned(640, 480))


# --- memory -------------------------------------------------------------------------------------------------------

MEASURE = """
import ctypes, sys
from pathlib import Path
libc = ctypes.CDLL(None)
libc.mallopt(-3, 65536), libc.mallopt(-1, 65536)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
import torch
from executor.image import open_image
from planner.workload import host_bytes, parse_image
limits = dict(min_pixels=3136, max_pixels=12845056)
def status(key):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(key)]
    return int(line.split()[1]) * 1024
def grown(work):
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts anew
    before = status("VmRSS")
    result = work()
    return result, status("VmHWM") - before, status("VmRSS") - before
warm = parse_image(sys.argv[1], **limits)
open_image(Path(sys.argv[1]), warm).rows(0, 256, torch.empty(256, 1176, dtype=torch.bfloat16))
image = parse_image(sys.argv[2], **limits)
source, peak, kept = grown(lambda: open_image(Path(sys.argv[2]), image))
out = torch.zeros(256, 1176, dtype=torch.bfloat16)
_, rows, _ = grown(lambda: [source.rows(i, i + 256, out) for i in range(0, 4096, 256)])
print(peak, kept, rows, *host_bytes(image))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_host_memory_of_a_4k_photograph_is_as_predicted(examples: Path) -> None:
    files = [str(examples / "astronaut.jpg"), str(examples / "earth_3840x2160.jpg")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *files], capture_output=True, text=True, check=True
    )
    peak, kept, rows, peak_bytes, kept_bytes, error_bytes = map(int, done.stdout.split())
    assert abs(peak - peak_bytes) < 2 * 2**20
    assert peak <= peak_bytes + error_bytes
    assert abs(kept - kept_bytes) < 2**20
    assert rows < 2 * 2**20
