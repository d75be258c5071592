"""What people bring: pictures, words for sizes, a tokenizer."""

from __future__ import annotations

import io
import json
from random import Random
from typing import Any

from fuzz.mutate import as_json, spoil_bytes, spoil_png, spoil_value
from fuzz.target import Place, Target


def picture(kind: str, to: Any, size: tuple[int, int], mode: str = "RGB") -> None:
    from PIL import Image as Pillow

    width, height = size
    values = bytes(range(256)) * (width * height * 4 // 256 + 1)
    made = Pillow.frombytes("RGB", size, values[: width * height * 3]).convert(mode)
    exif = Pillow.Exif()
    exif[0x0112] = 6
    made.save(to, kind, exif=exif.tobytes()) if kind in ("JPEG", "PNG", "WEBP") else made.save(
        to, kind
    )


def image_target(place: Place) -> Target:
    """Its size as the planner reads it, then decoded and resized as the executor does."""
    from executor.image import open_image
    from planner.workload import image_size, plan_image

    seeds: list[bytes] = []
    modes = {"PNG": ("RGB", "RGBA", "P", "L", "1"), "JPEG": ("RGB", "CMYK"), "GIF": ("P",)}
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "TGA", "ICO"):
        for mode in modes.get(kind, ("RGB",)):
            file = io.BytesIO()
            picture(kind, file, (33, 30), mode)
            seeds.append(file.getvalue())
    wanted = plan_image("a", 33, 30, min_pixels=784, max_pixels=3136)
    turned = plan_image("a", 30, 33, min_pixels=784, max_pixels=3136)

    def make(chance: Random) -> bytes:
        seed = chance.choice(seeds)
        if seed[1:4] == b"PNG" and chance.random() < 0.6:
            return spoil_png(seed, chance)
        return spoil_bytes(seed, chance, seeds)

    def read(data: bytes) -> None:
        path = place.file("a.png", data)
        width, height = image_size(path)
        plan_image("a", width, height, min_pixels=784, max_pixels=3136)
        open_image(path, turned if (width, height) == (30, 33) else wanted)

    return Target(make, read)


def units_target(place: Place) -> Target:
    """Sizes of memory and of images as people type them."""
    from planner.units import MOST_BYTES, format_gb_up, format_gib, parse_bytes
    from planner.workload import parse_image

    seeds = [
        b"16GB",
        b"6.5GiB",
        b"1024 MiB",
        b"0.000001TB",
        b"1B",
        b"3840x2160",
        b"1x1",
        b"999999999x1",
    ]
    alphabet = "0123456789..xX kKMGTiB-+e_\u0661\u00b2\u2003\n\0"

    def make(chance: Random) -> bytes:
        if chance.random() < 0.5:
            return spoil_bytes(chance.choice(seeds), chance, seeds)
        return "".join(chance.choices(alphabet, k=chance.randrange(12))).encode()

    def read(data: bytes) -> None:
        from planner.errors import StowplanError

        text = data.decode(errors="surrogateescape")
        try:
            size = parse_bytes(text)
            assert 0 < size <= MOST_BYTES
            assert parse_bytes(format_gb_up(size)) >= size
            format_gib(size)
        except StowplanError:
            image = parse_image(text, min_pixels=3136, max_pixels=12845056)
            assert image.patches * 196 == image.width_px * image.height_px <= 12845056

    return Target(make, read)


def tokenizer_target(place: Place) -> Target:
    from executor.make_checkpoint import make_random_checkpoint
    from executor.prompt import build_prompt, load_tokenizer
    from planner.plan.shapes import TokenIds
    from planner.workload import prompt_tokens

    make_random_checkpoint("tiny", place.path / "tiny")
    data = json.loads((place.path / "tiny/tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    data["model"]["vocab"] = {  # a shorter one: bytes, and what is added comes by itself
        word: number for word, number in vocabulary.items() if len(word) == 1
    }
    data["model"]["merges"] = []
    seed = json.dumps(data).encode()
    ids = TokenIds(image=1, video=2, vision_start=3, vision_end=4, stop=(5,))

    def make(chance: Random) -> bytes:
        if chance.random() < 0.3:
            return spoil_bytes(seed, chance)
        data = json.loads(seed)
        if chance.random() < 0.5:
            part = chance.choice(list(data))
            data[part] = spoil_value(data[part], chance)
            return as_json(data, chance)
        return as_json(spoil_value(data, chance), chance)

    def read(data: bytes) -> None:
        path = place.file("tokenizer.json", data)
        prompt_tokens("What is this?", None, path, [])
        build_prompt(load_tokenizer(path), "What is this?", [], ids)

    return Target(make, read)
