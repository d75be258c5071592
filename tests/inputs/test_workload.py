from __future__ import annotations

import math
import struct
import subprocess
import sys
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from executor.prompt import build_prompt, load_tokenizer
from planner.errors import CheckpointError, ImageError, InputError
from planner.plan.shapes import Image, TokenIds, WindowRun
from planner.workload import (
    TEMPLATE_TOKENS,
    image_size,
    make_workload,
    parse_image,
    plan_image,
    prompt_tokens,
    smart_resize,
)

LIMITS = {"min_pixels": 3136, "max_pixels": 12845056}


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + bytes(4)


def test_images_are_resized_as_transformers_does(golden: dict[str, Any]) -> None:
    assert len(golden["smart_resize"]) > 20
    for case in golden["smart_resize"]:
        image = plan_image(
            "x", case["w"], case["h"], min_pixels=3136, max_pixels=case["max_pixels"]
        )
        assert (image.height_px, image.width_px) == (case["out_h"], case["out_w"])
        assert [1, image.rows, image.cols] == case["grid"]
        assert (image.patches, image.tokens) == (case["patches"], case["tokens"])


@settings(deadline=None)
@given(st.integers(1, 9000), st.integers(1, 9000), st.sampled_from([3136, 1003520, 12845056]))
def test_any_size_is_resized_as_transformers_does(width: int, height: int, most: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    try:
        wanted = theirs(height, width, min_pixels=3136, max_pixels=most)
    except ValueError:
        with pytest.raises(ImageError, match="differ at most 200 times"):
            smart_resize(height, width, min_pixels=3136, max_pixels=most)
        return
    assert smart_resize(height, width, min_pixels=3136, max_pixels=most) == wanted


def test_windows_are_grouped_full_then_right_then_bottom_then_corner() -> None:
    image = plan_image("x", 14 * 14, 10 * 14, **LIMITS)
    assert (image.rows, image.cols) == (10, 14)
    assert image.windows == (
        WindowRun(count=1, rows=64),
        WindowRun(count=1, rows=8 * 6),
        WindowRun(count=1, rows=2 * 8),
        WindowRun(count=1, rows=2 * 6),
    )


def test_an_image_of_whole_windows_has_one_group() -> None:
    assert plan_image("x", 224, 448, **LIMITS).windows == (WindowRun(count=8, rows=64),)


def test_a_strip_is_refused_with_its_name() -> None:
    with pytest.raises(ImageError, match=r"strip\.png: .*30000x20; crop it"):
        plan_image("strip.png", 30000, 20, **LIMITS)


def test_one_pixel_becomes_four_tokens() -> None:
    assert plan_image("dot", 1, 1, **LIMITS).tokens == 4


def test_limits_that_exclude_everything_are_refused() -> None:
    with pytest.raises(InputError, match="min pixels <= max pixels"):
        smart_resize(100, 100, min_pixels=3136, max_pixels=100)


def test_a_size_given_as_text_reads_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_image("3840x2160", **LIMITS).tokens == 10549
    Pillow.new("RGB", (300, 200)).save("64x64", format="PNG")
    assert parse_image("64x64", **LIMITS).source_width_px == 64
    assert parse_image("./64x64", **LIMITS).source_width_px == 300


@pytest.mark.parametrize("text", ["", "a\0b", "0x100", "999999999x999999999"])
def test_text_that_is_no_image_is_refused(text: str) -> None:
    with pytest.raises(ImageError):
        parse_image(text, **LIMITS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_measured_upright(tmp_path: Path, orientation: int) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    for kind in ("jpg", "png", "tiff", "webp"):
        path = tmp_path / f"photo.{kind}"
        Pillow.new("RGB", (300, 200)).save(path, exif=exif)
        assert image_size(path) == ((200, 300) if orientation >= 5 else (300, 200)), kind


def test_bad_files_are_named_and_explained(tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    empty = tmp_path / "empty.png"
    empty.touch()
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_header(20000, 20000))
    flat = tmp_path / "flat.png"
    flat.write_bytes(png_header(0, 10))
    header = tmp_path / "header.jpg"
    header.write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF")
    for path, words in (
        (text, "not an image that Pillow can read"),
        (empty, "not an image that Pillow can read"),
        (bomb, "at most 179 megapixels"),
        (flat, "."),
        (header, "."),
        (tmp_path, "found a directory"),
        (tmp_path / "none.jpg", "no such file"),
    ):
        with pytest.raises(ImageError, match=words) as caught:
            image_size(path)
        assert str(path) in str(caught.value)


def test_a_large_but_allowed_image_gives_no_warning(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(png_header(12000, 10000))  # Pillow warns from 89 megapixels on
    assert image_size(path) == (12000, 10000)


def test_the_template_is_counted_as_the_golden_prompts_have_it(golden: dict[str, Any]) -> None:
    one_image, no_image, _ = golden["prompts"]
    assert one_image["n"] == TEMPLATE_TOKENS + 3 + 4  # start, pad, end; "Describe this image."
    assert no_image["n"] == TEMPLATE_TOKENS + 7


def test_without_text_64_tokens_are_planned(planned: Callable[..., Image]) -> None:
    assert prompt_tokens(None, None, None, [planned(3840, 2160)]) == (19 + 2 + 10549 + 64, False)
    assert prompt_tokens(None, 5, None, []) == (24, False)


def test_text_without_a_tokenizer_is_bounded_by_its_bytes() -> None:
    assert prompt_tokens("né", None, None, []) == (19 + 3, True)
    # NFC makes three characters of some single ones
    assert prompt_tokens("\u0958", None, None, []) == (19 + 6, True)


@settings(deadline=None)
@given(st.text(min_size=1).filter(str.strip))
def test_the_bound_is_never_below_the_real_count(qwen: Any, text: str) -> None:
    bound, is_bound = prompt_tokens(text, None, None, [])
    ids = TokenIds(image=151655, video=151656, vision_start=151652, vision_end=151653, stop=())
    assert is_bound
    assert len(build_prompt(qwen, text, [], ids)) <= bound, unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    "text", ["What is 2+2?", "\n\nnewlines first", "<|image_pad|> and <tool_call>"]
)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_planner_and_executor_count_the_same_prompt(
    tiny: Path, tiny_ids: TokenIds, planned: Callable[..., Image], text: str, count: int
) -> None:
    images = [planned(100, 200), planned(64, 64)][:count]
    ids = build_prompt(load_tokenizer(tiny), text, images, tiny_ids)
    assert prompt_tokens(text, None, tiny / "tokenizer.json", images) == (len(ids), False)


@pytest.mark.parametrize("text", ["\n\nnewlines first", "plain", "<|image_pad|>"])
def test_both_count_the_same_with_the_real_tokenizer(
    qwen: Any, qwen_tokenizer_json: Path, qwen_ids: TokenIds, text: str
) -> None:
    ids = build_prompt(qwen, text, [], qwen_ids)
    assert prompt_tokens(text, None, qwen_tokenizer_json, []) == (len(ids), False)


def test_a_number_of_tokens_comes_on_top_of_the_checkpoints_own_template(tiny: Path) -> None:
    template = prompt_tokens("x", None, tiny / "tokenizer.json", [])[0] - 1
    assert template > TEMPLATE_TOKENS  # the random checkpoint's tokenizer splits most words
    assert prompt_tokens(None, 7, tiny / "tokenizer.json", []) == (template + 7, False)


def test_prompts_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for text, number, words in (
        (" \n", None, "empty text"),
        ("a", 3, "found both"),
        (None, 0, "at least 1, found 0"),
        ("\udcff", None, "UTF-8"),
    ):
        with pytest.raises(InputError, match=words):
            prompt_tokens(text, number, None, [])
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    with pytest.raises(CheckpointError, match="download it again"):
        prompt_tokens("a", None, broken, [])
    with pytest.raises(CheckpointError, match="no such file"):
        prompt_tokens("a", None, tmp_path / "none.json", [])


def test_the_context_holds_prompt_and_answer(planned: Callable[..., Image]) -> None:
    image = planned(512, 512)
    work = make_workload([image], **LIMITS, max_new_tokens=10)
    assert work.context_tokens == work.prompt_tokens + 10 == 19 + 2 + 324 + 64 + 10
    assert make_workload([image], **LIMITS, context_tokens=12000).context_tokens == 12000
    with pytest.raises(
        InputError, match=r"at least 537 \(409 of the prompt \+ 128 new\), found 536"
    ):
        make_workload([image], **LIMITS, context_tokens=536)
    with pytest.raises(InputError, match="max-new-tokens"):
        make_workload([image], **LIMITS, max_new_tokens=0)


def test_reading_a_size_as_text_imports_neither_pillow_nor_numpy() -> None:
    code = (
        "import sys, planner.workload as w;"
        "w.parse_image('3840x2160', min_pixels=3136, max_pixels=12845056);"
        "print([m for m in ('PIL', 'numpy', 'torch', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_worst_aspect_allowed_is_planned() -> None:
    assert math.prod(smart_resize(28, 5600, **LIMITS)) == 28 * 5600
