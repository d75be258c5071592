from __future__ import annotations

import json
import math
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from executor import make_checkpoint, random_files
from executor.image import open_image
from executor.make_checkpoint import make_random_checkpoint
from executor.prompt import build_prompt, load_tokenizer
from executor.random_files import SPECS
from planner.errors import InputError, RunFailed
from planner.plan.shapes import TokenIds
from planner.workload import parse_image


def shapes(spec: str) -> dict[str, tuple[int, ...]]:
    return dict(make_checkpoint._tensors(SPECS[spec]))


def test_the_large_specs_have_the_published_tensors() -> None:
    # number of tensors and bytes in bfloat16 as in the published model.safetensors.index.json
    for spec, count, size in (("3b", 824, 7_509_245_952), ("7b", 729, 16_584_333_312)):
        tensors = shapes(spec)
        assert len(tensors) == count
        assert 2 * sum(map(math.prod, tensors.values())) == size
        tokenizer = random_files.tokenizer(SPECS[spec].first_special)
        assert tokenizer["model"]["vocab"]["<|image_pad|>"] == 151655
        assert tokenizer["model"]["vocab"]["<|im_end|>"] == 151645


def test_transformers_loads_it_and_its_answers_vary(
    tiny: Path, tiny_ids: TokenIds, examples: Path
) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    path = examples / "astronaut.jpg"
    image = parse_image(str(path), min_pixels=3136, max_pixels=100352)
    processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=100352)
    from PIL import Image as Pillow

    with Pillow.open(path) as picture:
        pixels = processor(picture, return_tensors="pt")
    assert open_image(path, image).image.patches == len(pixels["pixel_values"])
    ids = build_prompt(load_tokenizer(tiny), "Describe this image.", [image], tiny_ids)
    prompt = torch.tensor([ids])
    answers = []
    for values in (pixels["pixel_values"], pixels["pixel_values"].flip(1)):
        with torch.no_grad():
            output = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                pixel_values=values,
                image_grid_thw=pixels["image_grid_thw"],
                mm_token_type_ids=(prompt == tiny_ids.image).int(),
                max_new_tokens=24,
                do_sample=False,
                repetition_penalty=1.0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        answers.append(output.sequences[0, len(ids) :].tolist())
        spread = torch.stack(output.logits).std().item()
        assert 0.5 < spread < 5
    assert len(set(answers[0])) >= 8
    assert answers[0] != answers[1]


def test_the_same_seed_gives_the_same_bytes_whatever_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_random_checkpoint("tiny:bfloat16", tmp_path / "whole", seed=3)
    monkeypatch.setattr(make_checkpoint, "SHARD_BYTES", 300_000)
    size = make_random_checkpoint("tiny", tmp_path / "parts", seed=3, dtype="bfloat16")
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size
    whole = load_file(tmp_path / "whole/model.safetensors")
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(whole) == set(index["weight_map"])
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "parts" / file, "pt") as shard:
            assert torch.equal(shard.get_tensor(name), whole[name]), name
    monkeypatch.undo()
    make_random_checkpoint("tiny:bfloat16", tmp_path / "other", seed=4)
    other = load_file(tmp_path / "other/model.safetensors")
    assert not any(torch.equal(other[name], whole[name]) for name in whole)


def test_a_large_tensor_made_in_pieces_has_no_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_checkpoint, "PIECE_VALUES", 1000)
    pieces = [bytes(piece) for piece in make_checkpoint._pieces("model.x", (70, 100), "float32", 0)]
    assert [len(piece) for piece in pieces] == [4000] * 7
    assert len(set(pieces)) == 7


def test_weights_have_the_dtype_asked_for(tmp_path: Path) -> None:
    make_random_checkpoint("tiny-tied:float16", tmp_path / "half")
    weights = load_file(tmp_path / "half/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "float16"
    assert "lm_head.weight" not in weights
    make_random_checkpoint("tiny-tied", tmp_path / "untied", tied=False)
    assert "lm_head.weight" in load_file(tmp_path / "untied/model.safetensors")


@pytest.mark.parametrize("spec", ["", "4b", "tiny:int8", "tiny-tied:bf16"])
def test_unknown_specs_are_refused(tmp_path: Path, spec: str) -> None:
    with pytest.raises(InputError, match="wanted"):
        make_random_checkpoint(spec, tmp_path / "new")
    assert not any(tmp_path.iterdir())


def test_what_lies_there_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/model.safetensors").write_text("mine")
    with pytest.raises(InputError, match="new or empty directory"):
        make_random_checkpoint("tiny", tmp_path / "full")
    assert (tmp_path / "full/model.safetensors").read_text() == "mine"
    with pytest.raises(InputError, match="inside an existing one"):
        make_random_checkpoint("tiny", tmp_path / "none/new")
    (tmp_path / "empty").mkdir()
    make_random_checkpoint("tiny", tmp_path / "empty")
    assert (tmp_path / "empty/config.json").exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # no file beyond 1 MB
    try:
        with pytest.raises(RunFailed, match="nothing was left behind"):
            make_random_checkpoint("tiny", tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(tmp_path.iterdir())


def test_an_interruption_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(written: int, total: int) -> None:
        if written > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_random_checkpoint("tiny", tmp_path / "new", progress=interrupt)
    assert not any(tmp_path.iterdir())
