from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow


def noise(width: int = 84, height: int = 56, channels: int = 3) -> Any:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(1).integers(0, 255, shape, dtype=np.uint8)


def png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def size(width: int, height: int) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        Pillow.fromarray(noise(width, height)).save(folder / "a.png")
        return folder / "a.png"

    return save


def saved(make: Callable[[], Any], name: str, **how: Any) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        make().save(folder / name, **how)
        return folder / name

    return save


def exif() -> Any:
    found = Pillow.Exif()
    found[0x0112] = 6  # a quarter turn
    return found


def animation() -> list[Any]:
    return [Pillow.fromarray(noise(channels=1)) for _ in range(2)]


GOOD = {
    "1x1": size(1, 1),
    "tall": size(20, 2000),
    "grey": saved(lambda: Pillow.fromarray(noise(channels=1)), "a.png"),
    "one bit": saved(lambda: Pillow.fromarray(noise(channels=1)).convert("1"), "a.png"),
    "cmyk": saved(lambda: Pillow.fromarray(noise()).convert("CMYK"), "a.jpg"),
    "palette": saved(lambda: Pillow.fromarray(noise()).quantize(16), "a.png"),
    "palette with alpha": saved(
        lambda: Pillow.fromarray(noise()).quantize(16), "a.png", transparency=0
    ),
    "16 bits": saved(lambda: Pillow.fromarray(noise(channels=1).astype(np.uint16) * 257), "a.png"),
    "alpha": saved(lambda: Pillow.fromarray(noise(channels=4)), "a.png"),
    "grey with alpha": saved(lambda: Pillow.fromarray(noise(channels=4)).convert("LA"), "a.png"),
    "turned": saved(lambda: Pillow.fromarray(noise()), "a.jpg", exif=exif()),
    "turned png": saved(lambda: Pillow.fromarray(noise()), "a.png", exif=exif()),
    "progressive": saved(lambda: Pillow.fromarray(noise()), "a.jpg", progressive=True),
    "webp": saved(lambda: Pillow.fromarray(noise()), "a.webp"),
    "tiff": saved(lambda: Pillow.fromarray(noise()), "a.tif"),
    "animated": saved(
        lambda: animation()[0], "a.gif", save_all=True, append_images=animation()[1:]
    ),
    "a name that is a size": saved(lambda: Pillow.fromarray(noise()), "8x8", format="PNG"),
    "a name with spaces": saved(lambda: Pillow.fromarray(noise()), "-- ä.png"),
}


@pytest.mark.parametrize("name", GOOD)
def test_an_unusual_image_runs_as_it_was_planned(name: str, kit: Any) -> None:
    image, out = GOOD[name](kit.folder), kit.folder / "plan.json"
    assert kit.plan("--image", str(image), out=out).code == 0
    outcome = kit.execute(plan=out, images=(image,))
    assert (outcome.code, outcome.err) == (0, "")
    planned = json.loads(out.read_text())["workload"]["images"][0]
    turned = (planned["source_width_px"], planned["source_height_px"]) == (56, 84)
    assert turned == name.startswith("turned")


def broken(content: bytes, name: str = "a.png") -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return save


@pytest.mark.parametrize(
    ("save", "words"),
    [
        (broken(b""), "a.png: not an image that Pillow can read"),
        (broken(b"text"), "a.png: not an image that Pillow can read"),
        (broken(png(84, 56)[:20]), "a.png: "),
        (broken(png(60000, 60000)), "a.png: wanted an image of at most 179 megapixels"),
        (size(4020, 20), "sides differ at most 200 times, found 4020x20"),
        (lambda folder: folder, "found a directory"),
    ],
    ids=["empty", "text", "cut in its header", "bomb", "strip", "folder"],
)
def test_an_image_that_nothing_can_be_planned_for_is_refused(
    save: Callable[[Path], Path], words: str, kit: Any
) -> None:
    out = kit.folder / "plan.json"
    kit.plan("--image", str(save(kit.folder)), out=out).refused(words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("30000x20", "sides differ at most 200 times, found 30000x20"),
        ("60000x60000", "at most 179 megapixels"),
        ("0x100", "at least 1x1"),
        ("no.png", "no such file"),
        ("", "wanted a file or a size"),
    ],
)
def test_a_size_that_nothing_can_be_planned_for_is_refused(text: str, words: str, kit: Any) -> None:
    kit.plan("--image", text).refused(words)


@pytest.mark.parametrize(
    ("save", "words"),
    [
        (broken(b"text"), "not an image that Pillow can read"),
        (broken(png(84, 56)), "damaged or cut short"),
        (broken(png(60000, 60000)), "make it smaller first"),
        (size(85, 56), "the plan is for an image of 84x56 pixels, this one has 85x56"),
    ],
    ids=["text", "without pixels", "bomb", "another size"],
)
def test_an_image_that_went_bad_after_planning_is_refused(
    save: Callable[[Path], Path], words: str, kit: Any
) -> None:
    outputs = kit.folder / "outputs"
    kit.execute("--save-outputs", str(outputs), images=(save(kit.folder),)).refused(words)
    assert not outputs.exists()


def test_more_images_than_planned_are_refused(kit: Any) -> None:
    kit.execute(images=(kit.image, kit.image)).refused("the plan is for 1 images, found 2")


def test_a_directory_is_no_image_for_either_command(kit: Any) -> None:
    kit.execute(images=(kit.folder,)).refused("wanted an image file, found a directory")
    kit.plan("--image", str(kit.folder)).refused("wanted an image file, found a directory")
