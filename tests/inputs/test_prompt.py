from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.prompt import Detokenizer, build_prompt, load_tokenizer, positions
from planner.errors import CheckpointError, InputError
from planner.plan.shapes import Image, TokenIds
from planner.workload import plan_image


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny: Path) -> Any:
    return load_tokenizer(tiny)


def grid(rows: int, cols: int) -> Image:
    return plan_image(f"{rows}x{cols}", cols * 14, rows * 14, min_pixels=784, max_pixels=12845056)


def test_the_golden_prompts_come_out(golden: dict[str, Any], qwen: Any, qwen_ids: TokenIds) -> None:
    for case in golden["prompts"]:
        text = case["text"].split("user\n")[1].split("<|im_end|>")[0]
        count = text.count("<|image_pad|>")
        text = text.replace("<|vision_start|><|image_pad|><|vision_end|>", "")
        images = [grid(4, 6)] * count
        expected = [
            token
            for one in case["ids"]
            for token in ([one] * 6 if one == qwen_ids.image else [one])
        ]
        assert build_prompt(qwen, text, images, qwen_ids) == expected


@pytest.mark.parametrize("text", ["\nnewline first", "  spaces ", "你好世界", "I'm 2025's"])
def test_text_is_tokenised_as_transformers_would_the_whole_template(
    qwen: Any, qwen_tokenizer_json: Path, qwen_ids: TokenIds, text: str
) -> None:
    from tokenizers import Tokenizer

    whole = Tokenizer.from_file(str(qwen_tokenizer_json))
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    image = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    for images, pads in (([], ""), ([grid(4, 6)], image)):
        expected = whole.encode(head + pads + text + tail, add_special_tokens=False).ids
        assert build_prompt(qwen, text, images, qwen_ids) == expected


@pytest.mark.parametrize(
    "token", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>", "<|endoftext|>"]
)
def test_control_tokens_in_the_users_text_stay_text(
    tiny_tokenizer: Any, tiny_ids: TokenIds, token: str
) -> None:
    number = tiny_tokenizer.token_to_id(token)
    plain = build_prompt(tiny_tokenizer, "say it", [], tiny_ids)
    written = build_prompt(tiny_tokenizer, f"say {token} it", [], tiny_ids)
    assert written.count(number) == plain.count(number)
    assert "".join(map(Detokenizer(tiny_tokenizer).push, written)).count(token) == 1


def test_control_tokens_in_the_users_text_stay_text_with_the_real_tokenizer(
    qwen: Any, qwen_ids: TokenIds
) -> None:
    ids = build_prompt(qwen, "what is <|image_pad|>?", [grid(4, 4)], qwen_ids)
    assert ids.count(qwen_ids.image) == 4


def test_prompts_that_cannot_be_are_refused(tiny_tokenizer: Any, tiny_ids: TokenIds) -> None:
    with pytest.raises(InputError, match="empty text"):
        build_prompt(tiny_tokenizer, " \n ", [], tiny_ids)
    with pytest.raises(InputError, match="UTF-8"):
        build_prompt(tiny_tokenizer, "\udcff", [], tiny_ids)


def test_tokenizers_that_cannot_be_are_refused(
    tmp_path: Path, tiny: Path, tiny_ids: TokenIds
) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="download it again"):
        load_tokenizer(tmp_path)
    foreign = (tiny / "tokenizer.json").read_text().replace("<|im_start|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(foreign)
    with pytest.raises(CheckpointError, match=r"wanted a token <\|im_start\|>"):
        build_prompt(load_tokenizer(tmp_path), "a", [], tiny_ids)
    lax = (tiny / "tokenizer.json").read_text().replace('"special": true', '"special": false')
    (tmp_path / "tokenizer.json").write_text(lax)
    with pytest.raises(CheckpointError, match="not marked special"):
        build_prompt(load_tokenizer(tmp_path), "<|image_pad|>", [], tiny_ids)


def test_the_golden_positions_come_out(golden: dict[str, Any], qwen_ids: TokenIds) -> None:
    cases = [case for case in golden["positions"] if case["image_grid_thw"]]
    assert len(cases) == 2
    for case in cases:
        images = [grid(rows, cols) for _, rows, cols in case["image_grid_thw"]]
        found, delta = positions(case["input_ids"], images, qwen_ids)
        assert found.dtype == np.int64
        assert found.tolist() == case["position_ids"]
        assert delta == case["rope_delta"]


def test_text_alone_counts_up(qwen_ids: TokenIds) -> None:
    found, delta = positions([5, 6, 7], [], qwen_ids)
    assert found.tolist() == [[0, 1, 2]] * 3
    assert delta == 0


def test_image_tokens_must_match_the_images(qwen_ids: TokenIds) -> None:
    pad = qwen_ids.image
    with pytest.raises(InputError, match="wanted 6 image tokens"):
        positions([1, pad, pad, pad, 2], [grid(4, 6)], qwen_ids)
    with pytest.raises(InputError, match="found more"):
        positions([1, *[pad] * 7, 2], [grid(4, 6)], qwen_ids)
    with pytest.raises(InputError, match="wanted 6 image tokens"):
        positions([1, 2], [grid(4, 6)], qwen_ids)


@settings(deadline=None)
@given(st.lists(st.integers(0, 700), max_size=40))
def test_text_in_pieces_is_the_text_as_a_whole(tiny_tokenizer: Any, ids: list[int]) -> None:
    pieces = Detokenizer(tiny_tokenizer)
    text = "".join(map(pieces.push, ids)) + pieces.finish()
    assert text == tiny_tokenizer.decode(ids, skip_special_tokens=True)


def test_a_character_appears_once_its_last_byte_is_there(tiny_tokenizer: Any) -> None:
    pieces = Detokenizer(tiny_tokenizer)
    ids = tiny_tokenizer.encode("a€b", add_special_tokens=False).ids
    assert [pieces.push(token) for token in ids] == ["a", "", "", "€", "b"]
    assert pieces.push(ids[1]) == ""
    assert pieces.finish() == "\ufffd"


def test_ids_without_text_give_nothing(tiny_tokenizer: Any, tiny_ids: TokenIds) -> None:
    pieces = Detokenizer(tiny_tokenizer)
    for token in (tiny_ids.image, *tiny_ids.stop, 639, 10**6, -1):
        assert pieces.push(token) == ""


def test_the_real_tokenizer_round_trips(qwen: Any) -> None:
    text = "Grüße, 世界! 👩‍🚀 <tool_call>"
    pieces = Detokenizer(qwen)
    ids = qwen.encode(text, add_special_tokens=False).ids
    assert "".join(map(pieces.push, ids)) + pieces.finish() == text


def test_images_stand_before_the_text_in_their_order(
    tiny_tokenizer: Any, tiny_ids: TokenIds, planned: Callable[..., Image]
) -> None:
    images = [planned(100, 200), planned(64, 64)]
    ids = build_prompt(tiny_tokenizer, "Compare", images, tiny_ids)
    starts = [i for i, token in enumerate(ids) if token == tiny_ids.vision_start]
    ends = [i for i, token in enumerate(ids) if token == tiny_ids.vision_end]
    assert [end - start - 1 for start, end in zip(starts, ends, strict=True)] == [
        image.tokens for image in images
    ]
    assert starts[1] == ends[0] + 1
