"""Headers of safetensors files: what is read, and that nothing in them is believed unchecked."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.checkpoint.headers import (
    DTYPES,
    published_name,
    read_checkpoint_tensors,
    read_entries,
    read_header,
)
from planner.errors import CheckpointError
from planner.plan.shapes import TensorLocation
from planner.plan.words import DTYPE_BYTES

TWO = {"a": ("BF16", (2, 3)), "b": ("F32", (4,))}


def entry(dtype: object, shape: object, offsets: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_locations_are_absolute_file_offsets(tmp_path: Path, kit: Any) -> None:
    path = kit.write_tensors(tmp_path / "x.safetensors", TWO)
    start = path.stat().st_size - 12 - 16
    assert read_header(path) == {
        "a": TensorLocation(path, start, 12, (2, 3), "bfloat16"),
        "b": TensorLocation(path, start + 12, 16, (4,), "float32"),
    }


def test_a_file_written_by_safetensors_reads_the_same_bytes(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    from safetensors.numpy import save_file

    value = numpy.arange(12, dtype="float32").reshape(3, 4)
    save_file(
        {"v": value, "h": value.astype("float16")}, tmp_path / "x.safetensors", {"format": "pt"}
    )
    found = read_header(tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    v = found["v"]
    assert raw[v.offset_bytes : v.offset_bytes + v.size_bytes] == value.tobytes()
    assert found["h"].dtype == "float16"


def test_tensors_of_other_dtypes_are_left_out_but_counted_in_the_layout(
    tmp_path: Path, kit: Any
) -> None:
    path = kit.write_tensors(
        tmp_path / "model.safetensors", {"ids": ("I64", (3,)), "a": ("BF16", (2,))}
    )
    assert list(read_header(path)) == ["a"]
    assert read_checkpoint_tensors(tmp_path).other_dtypes == {"ids": "I64"}


BAD_ENTRIES = {
    "wanted 12 bytes": entry("BF16", [2, 3], [0, 10]),
    "wanted a dtype": entry("Q4_0", [2, 3], [0, 12]),
    "wanted a dtype ": entry(["BF16"], [2, 3], [0, 12]),
    "wanted a shape": entry("BF16", [2, -3], [0, 12]),
    "wanted a shape ": entry("BF16", [True, 6], [0, 12]),
    "wanted a shape  ": entry("BF16", [1] * 40 + [6], [0, 12]),
    "wanted a shape   ": entry("BF16", "23", [0, 12]),
    "wanted two data_offsets": entry("BF16", [2, 3], [0, 6, 12]),
    "wanted two data_offsets ": entry("BF16", [2, 3], [0.0, 12.0]),
    "wanted two data_offsets  ": entry("BF16", [2, 3], [-12, 0]),
    "leave a hole": entry("BF16", [2, 3], [2, 14]),
    "wanted dtype, shape": {"dtype": "BF16", "shape": [6]},
    "wanted dtype, shape ": {**entry("BF16", [2, 3], [0, 12]), "more": 1},
    "wanted dtype, shape  ": 7,
    "truncated: wanted": entry("BF16", [2**61, 1], [0, 2**62]),
}


@pytest.mark.parametrize("message", BAD_ENTRIES)
def test_an_inconsistent_entry_is_refused(message: str, tmp_path: Path, kit: Any) -> None:
    path = kit.write_file(tmp_path / "x.safetensors", {"t": BAD_ENTRIES[message]}, 12)
    with pytest.raises(CheckpointError, match=message.strip()):
        read_header(path)


def test_overlapping_tensors_are_refused(tmp_path: Path, kit: Any) -> None:
    header = {"a": entry("F32", [2], [0, 8]), "b": entry("F32", [2], [4, 12])}
    with pytest.raises(CheckpointError, match=r"'b'.*overlap"):
        read_header(kit.write_file(tmp_path / "x.safetensors", header, 12))


def test_a_truncated_file_says_the_bytes_wanted_and_found(tmp_path: Path, kit: Any) -> None:
    path = kit.write_tensors(tmp_path / "x.safetensors", TWO)
    size = path.stat().st_size
    os.truncate(path, size - 5)
    with pytest.raises(CheckpointError, match=f"truncated: wanted {size} bytes.*found {size - 5}"):
        read_header(path)


def test_bytes_behind_the_last_tensor_are_refused(tmp_path: Path, kit: Any) -> None:
    header, data_bytes = kit.header_of(TWO)
    with pytest.raises(CheckpointError, match=r"wanted \d+ bytes as its header says"):
        read_header(kit.write_file(tmp_path / "x.safetensors", header, data_bytes + 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "at least 8 bytes, found 0"),
        (b"\x01\x00", "at least 8 bytes, found 2"),
        ((2**63).to_bytes(8, "little") + b"{}", f"header of {2**63} bytes"),
        ((3).to_bytes(8, "little") + b"{}", "header of 3 bytes"),
        ((2).to_bytes(8, "little") + b"[]", "wanted a JSON object, found list"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "wanted JSON"),
        ((4).to_bytes(8, "little") + b"{'a'", "wanted JSON"),
        ((40000).to_bytes(8, "little") + b"[" * 40000, "wanted"),
        ((14).to_bytes(8, "little") + b'{"a":1,"a":2} ', "there twice"),
    ],
)
def test_a_lying_or_foreign_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    with pytest.raises(CheckpointError, match="at most 100000000 bytes, found 200000000"):
        read_header(path)


def test_metadata_must_be_text(tmp_path: Path, kit: Any) -> None:
    with pytest.raises(CheckpointError, match="__metadata__"):
        read_header(kit.write_file(tmp_path / "x.safetensors", {"__metadata__": {"a": 1}}, 0))
    assert (
        read_header(kit.write_file(tmp_path / "y.safetensors", {"__metadata__": {"a": "1"}}, 0))
        == {}
    )


def test_a_folder_or_a_pipe_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="wanted a file"):
        read_header(tmp_path / "pipe")


_NUMBERS = st.one_of(st.integers(-3, 20), st.just(2**70), st.booleans(), st.none(), st.floats())
_ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["BF16", "F32", "I8", "", "x", None]),
        "shape": st.one_of(st.lists(_NUMBERS, max_size=3), _NUMBERS),
        "data_offsets": st.one_of(st.lists(_NUMBERS, max_size=3), _NUMBERS),
    }
)
_HEADERS = st.dictionaries(
    st.one_of(st.just("__metadata__"), st.text(max_size=4)), st.one_of(_ENTRIES, _NUMBERS)
)
_FILES = st.one_of(
    st.binary(max_size=64),
    st.binary(max_size=64).map(lambda raw: len(raw).to_bytes(8, "little") + raw),
    st.tuples(_HEADERS.map(lambda h: json.dumps(h).encode()), st.binary(max_size=32)).map(
        lambda parts: len(parts[0]).to_bytes(8, "little") + parts[0] + parts[1]
    ),
)


@settings(max_examples=150, deadline=None)
@given(content=_FILES)
def test_any_bytes_are_read_or_refused_in_words(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(content)
        try:
            found = read_entries(path)
            message = ""
        except CheckpointError as error:
            message = str(error)
            found = {}
        assert len(message.encode()) < 1000  # and no lone surrogates reach a terminal
        for item in found.values():
            assert 0 <= item.start <= item.stop <= len(content)
        for location in [] if message else read_header(path).values():
            elements = 1
            for extent in location.shape:
                elements *= extent
            assert location.size_bytes == elements * DTYPE_BYTES[location.dtype]


@pytest.mark.parametrize(
    ("stored", "published"),
    [
        ("visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight"),
        ("model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("base_model.model.model.visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("base_model.model.lm_head.weight", "lm_head.weight"),
        ("thinker.model.norm.weight", "model.norm.weight"),
        ("thinker.visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_of_every_tool_become_the_published_ones(stored: str, published: str) -> None:
    assert published_name(stored) == published


# --- shards -------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, kit: Any, weight_map: dict[str, object]) -> None:
    kit.write_tensors(folder / "one.safetensors", {"a": ("BF16", (2, 3))})
    kit.write_tensors(folder / "two.safetensors", {"b": ("F32", (4,)), "c": ("F32", (1,))})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_finds_each_tensor_in_its_shard(tmp_path: Path, kit: Any) -> None:
    write_shards(tmp_path, kit, {"a": "one.safetensors", "b": "two.safetensors"})
    found = read_checkpoint_tensors(tmp_path).tensors
    assert {name: tensor.path.name for name, tensor in found.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "three.safetensors"}, r"1 of them missing: 'three\.safetensors'"),
        ({"a": "../one.safetensors"}, "plain name"),
        ({"a": "/etc/passwd"}, "plain name"),
        ({"a": ".."}, "plain name"),
        ({"a": "sub\\one.safetensors"}, "plain name"),
        ({"a": "one\0.safetensors"}, "plain name"),
        ({"a": 3}, "plain name"),
        ({"z": "one.safetensors"}, "wanted tensor 'z'"),
        ({}, "wanted a weight_map"),
        ([], "wanted a weight_map"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused(
    weight_map: Any, message: str, tmp_path: Path, kit: Any
) -> None:
    write_shards(tmp_path, kit, weight_map)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint_tensors(tmp_path)


def test_a_tensor_under_two_prefixes_is_refused(tmp_path: Path, kit: Any) -> None:
    names = ("visual.merger.ln_q.weight", "model.visual.merger.ln_q.weight")
    kit.write_tensors(tmp_path / "model.safetensors", dict.fromkeys(names, ("BF16", (2,))))
    with pytest.raises(CheckpointError, match="there twice"):
        read_checkpoint_tensors(tmp_path)


def test_a_folder_without_weights_says_which_files_were_wanted(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors or .*index"):
        read_checkpoint_tensors(tmp_path)


def test_every_supported_dtype_has_a_size_in_the_plan() -> None:
    assert set(DTYPES.values()) <= set(DTYPE_BYTES)
