"""Checkpoints and built-in models: sizes, layouts of config.json, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.checkpoint import spec
from planner.checkpoint.config import check_config, normalise_config, read_config
from planner.checkpoint.headers import read_header
from planner.checkpoint.spec import builtin, builtin_model, read_checkpoint, resolve_model, units
from planner.checkpoint.template import template
from planner.errors import CheckpointError, InputError, RunFailed
from planner.plan.shapes import ModelShape

Make = Callable[..., Path]
DATA = Path(__file__).parents[1] / "data"

PUBLISHED = {
    "3b": (824, 3_754_622_976, 7_509_245_952),
    "7b": (729, 8_292_166_656, 16_584_333_312),
    "32b": (1161, 33_452_718_336, 66_905_436_672),
    "72b": (1353, 73_410_777_344, 146_821_554_688),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_built_in_model_has_the_published_number_of_bytes(name: str) -> None:
    model = builtin(name)
    assert (len(model.tensor_shapes), model.parameters, model.weight_bytes) == PUBLISHED[name]
    file = builtin_model(name)
    assert (file.tensors, file.parameters, file.weight_bytes) == PUBLISHED[name]
    assert model.shape.name == file.name
    assert (model.min_pixels, model.max_pixels) == (3136, 12_845_056)
    assert (model.shape.token_ids.stop, model.shape.repetition_penalty) == ((151645, 151643), 1.05)


def test_parts_of_3b_have_the_published_number_of_parameters() -> None:
    sizes: dict[str, int] = {}
    for unit in units(builtin("3b").shape, 10**6):
        part = unit.id.partition("/")[0] if "lm_head" not in unit.id else "lm_head"
        sizes[part] = sizes.get(part, 0) + sum(t.size_bytes // 2 for t in unit.tensors)
    assert sizes == {"visual": 668_684_288, "text": 2_774_773_760, "lm_head": 311_164_928}


def test_only_3b_ties_its_lm_head_to_the_embedding() -> None:
    assert [name for name in PUBLISHED if builtin(name).shape.text.tied] == ["3b"]


# --- layouts of config.json ---------------------------------------------------------------------------------------


def renamed(tensors: dict[str, Any]) -> dict[str, Any]:
    """Tensor names as transformers 4.52 and later save them."""
    names = {}
    for name, value in tensors.items():
        if name.startswith("visual."):
            name = "model." + name
        elif name.startswith("model."):
            name = "model.language_model." + name.removeprefix("model.")
        names[name] = value
    return names


def shape_of(make: Make, layout: str, config: dict[str, Any], tensors: Any = None) -> ModelShape:
    return read_checkpoint(make(config, tensors, name=f"{layout}/tiny")).shape


def test_all_three_layouts_give_the_same_model_shape(make_checkpoint: Make, kit: Any) -> None:
    shapes = {
        layout: shape_of(
            make_checkpoint,
            layout,
            config(),
            kit.tiny_tensors() if layout == "flat" else renamed(kit.tiny_tensors()),
        )
        for layout, config in kit.configs.items()
    }
    assert shapes["flat"] == shapes["nested"] == shapes["v5"]
    flat = shapes["flat"]
    assert (flat.name, flat.dtype, flat.repetition_penalty) == ("tiny", "bfloat16", 1.0)
    assert flat.vision.full_attention_blocks == (1,)
    assert (flat.text.head_dim, flat.text.kv_heads, flat.text.rope_theta) == (16, 2, 1e6)
    assert flat.token_ids.stop == (2,)


@pytest.mark.parametrize(
    ("root", "nested", "tied"),
    [(True, None, True), (None, True, True), (False, True, True), (False, False, False)],
)
def test_true_in_either_place_means_tied(
    root: bool | None, nested: bool | None, tied: bool, make_checkpoint: Make, kit: Any
) -> None:
    config = kit.configs["nested"]()
    for place, value in ((config, root), (config["text_config"], nested)):
        place.pop("tie_word_embeddings", None)
        if value is not None:
            place["tie_word_embeddings"] = value
    assert read_checkpoint(make_checkpoint(config)).shape.text.tied is tied


def test_tensor_shapes_decide_where_a_save_left_fields_out(make_checkpoint: Make, kit: Any) -> None:
    full = kit.flat_config()
    config = kit.flat_config()
    # window_size, num_heads and in_chans equal the class defaults here or cannot be seen in a shape
    config["vision_config"] = {"num_heads": 2, "fullatt_block_indexes": [1]}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
        del config[key]
    for key in ("num_attention_heads", "num_key_value_heads", "tie_word_embeddings"):
        del config[key]
    found = shape_of(make_checkpoint, "sparse", config, kit.tiny_tensors(full))
    assert found == shape_of(make_checkpoint, "full", full)


def test_class_defaults_are_what_the_class_has(tmp_path: Path) -> None:
    config = {"model_type": "qwen2_5_vl", "rope_scaling": {"mrope_section": [16, 24, 24]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_config(tmp_path)
    assert (found.vision.hidden, found.vision.out_hidden, found.vision.window_px) == (
        3584,
        3584,
        112,
    )
    assert found.vision.full_attention_blocks == (7, 15, 23, 31)
    assert (found.text.layers, found.text.heads, found.text.kv_heads) == (80, 64, 8)
    assert found.text.rms_norm_eps == 1e-5
    assert {"vision.hidden", "text.layers", "text.tied"} <= found.defaulted


def test_a_missing_lm_head_means_tied_only_where_the_config_is_silent(
    make_checkpoint: Make, kit: Any
) -> None:
    tensors = kit.tiny_tensors()
    del tensors["lm_head.weight"]
    silent = kit.flat_config()
    del silent["tie_word_embeddings"]
    assert read_checkpoint(make_checkpoint(silent, tensors, name="silent")).shape.text.tied
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: wanted \[512, 64\], found none"):
        read_checkpoint(make_checkpoint(kit.flat_config(), tensors, name="untied"))


def test_the_example_in_the_test_data_has_the_template_s_tensors() -> None:
    config = json.loads((DATA / "tiny_config.json").read_text())
    normal = normalise_config(config, DATA / "tiny_config.json")
    found = {name: tensor.shape for name, tensor in read_header(DATA / "tiny.safetensors").items()}
    assert found == template(normal.vision, normal.text)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_vl"}, "wanted model_type 'qwen2_5_vl', found 'qwen2_vl'"),
        ({"model_type": None}, "found None"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised checkpoints"),
        ({"hidden_size": "64"}, "hidden_size: wanted a whole number"),
        ({"hidden_size": 64.0}, "hidden_size: wanted a whole number"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: wanted a whole number from 1 to 4096"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: wanted a divisor of 4"),
        ({"use_sliding_window": True}, "use_sliding_window: wanted False"),
        ({"hidden_act": "gelu"}, "hidden_act: wanted silu"),
        ({"rope_scaling": None}, "mrope_section"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [2, 3, 3]}}, "wanted mrope or default"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3]}}, "three sizes"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 4]}}, "mrope_section"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"vision_config": 3}, "vision_config: wanted a JSON object"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: wanted true or false"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
    ],
)
def test_a_config_that_is_wrong_or_unsupported_is_refused(
    change: dict[str, object], message: str, make_checkpoint: Make, kit: Any
) -> None:
    folder = make_checkpoint({**kit.flat_config(), **change}, kit.tiny_tensors())
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spatial_merge_size": 4}, "spatial_merge_size: wanted 2"),
        ({"in_chans": 1}, "in_channels: wanted 3"),
        ({"window_size": 100}, "window_size: wanted a multiple of 28"),
        ({"num_heads": 3}, "num_heads"),
        ({"out_hidden_size": 32}, "out_hidden_size"),
        ({"fullatt_block_indexes": [-1]}, "fullatt_block_indexes"),
        ({"hidden_act": "quick_gelu"}, "hidden_act"),
        ({"patch_size": [14, 16]}, "patch_size"),
    ],
)
def test_a_vision_config_that_no_image_is_cut_for_is_refused(
    change: dict[str, object], message: str, make_checkpoint: Make, kit: Any
) -> None:
    config = kit.flat_config()
    config["vision_config"].update(change)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(make_checkpoint(config, kit.tiny_tensors()))


def test_a_tensor_of_another_shape_is_named_with_both_shapes(
    make_checkpoint: Make, kit: Any
) -> None:
    tensors = kit.tiny_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"] = ("BF16", (95, 64))
    with pytest.raises(CheckpointError, match=r"layers\.1.*wanted \[96, 64\].*found \[95, 64\]"):
        read_checkpoint(make_checkpoint(tensors=tensors))


def test_missing_tensors_are_counted(make_checkpoint: Make, kit: Any) -> None:
    tensors = {n: v for n, v in kit.tiny_tensors().items() if "layers.1." not in n}
    with pytest.raises(CheckpointError, match=r"layers\.1\..*\(12 of 69 tensors missing\)"):
        read_checkpoint(make_checkpoint(tensors=tensors))


def test_more_layers_than_the_config_has_are_refused(make_checkpoint: Make, kit: Any) -> None:
    tensors = {**kit.tiny_tensors(), "model.layers.2.mlp.up_proj.weight": ("BF16", (96, 64))}
    with pytest.raises(CheckpointError, match=r"wanted 2 blocks model\.layers\.N.*found 3"):
        read_checkpoint(make_checkpoint(tensors=tensors))


def test_mixed_dtypes_are_refused_and_the_odd_tensor_named(make_checkpoint: Make, kit: Any) -> None:
    tensors = {**kit.tiny_tensors(), "model.norm.weight": ("F32", (64,))}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: wanted bfloat16.*one dtype"):
        read_checkpoint(make_checkpoint(tensors=tensors))


def test_an_unsupported_dtype_matters_only_in_a_needed_tensor(
    make_checkpoint: Make, kit: Any
) -> None:
    tensors = {**kit.tiny_tensors(), "rotary.inv_freq": ("F64", (4,))}
    assert "rotary.inv_freq" not in read_checkpoint(make_checkpoint(tensors=tensors)).tensors
    tensors["model.norm.weight"] = ("I8", (64,))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: wanted BF16.*found I8"):
        read_checkpoint(make_checkpoint(tensors=tensors, name="bad"))


@pytest.mark.parametrize(("stored", "dtype"), [("F32", "float32"), ("F16", "float16")])
def test_the_dtype_of_the_tensors_is_the_model_s(
    stored: str, dtype: str, make_checkpoint: Make, kit: Any
) -> None:
    tensors = kit.tiny_tensors(dtype=stored)
    assert read_checkpoint(make_checkpoint(tensors=tensors)).shape.dtype == dtype


def test_a_config_that_is_not_json_is_refused(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: wanted JSON"):
        read_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: wanted a file, found none"):
        read_checkpoint(folder)


_VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-2, 70), st.just(2**80), st.floats(), st.text()
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_value_in_a_config_is_read_or_refused_in_words(data: st.DataObject, kit: Any) -> None:
    config = kit.configs[data.draw(st.sampled_from(sorted(kit.configs)))]()
    place = data.draw(
        st.sampled_from([p for p in (config, *config.values()) if isinstance(p, dict)])
    )
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(_VALUES)
    path = Path("config.json")
    try:
        normal = normalise_config(config, path)
        check_config(normal, path)
    except CheckpointError as error:
        message = str(error)
    else:
        message = normal.text.model_dump_json()
    assert 0 < len(message.encode()) < 1000


# --- files beside -------------------------------------------------------------------------------------------------


def test_the_fingerprint_knows_the_model_and_not_its_folder(
    make_checkpoint: Make, kit: Any
) -> None:
    base = shape_of(make_checkpoint, "a", kit.flat_config())
    folder = make_checkpoint(name="other", generation_config={"repetition_penalty": 1.05})
    extra = read_checkpoint(folder).shape
    assert extra.name != base.name
    assert extra.fingerprint == base.fingerprint
    other_stop = {**kit.flat_config(), "eos_token_id": 3}
    assert shape_of(make_checkpoint, "stop", other_stop).fingerprint == base.fingerprint
    config = kit.flat_config()
    config["vision_config"]["fullatt_block_indexes"] = [2]
    assert shape_of(make_checkpoint, "b", config).fingerprint != base.fingerprint
    wide = kit.tiny_tensors(dtype="F32")
    assert shape_of(make_checkpoint, "c", kit.flat_config(), wide).fingerprint != base.fingerprint


@pytest.mark.parametrize("eos", [[7, 9], 7])
def test_generation_settings_are_read(eos: object, make_checkpoint: Make) -> None:
    file = {"eos_token_id": eos, "repetition_penalty": 1.05}
    shape = read_checkpoint(make_checkpoint(generation_config=file)).shape
    assert shape.token_ids.stop == (tuple(eos) if isinstance(eos, list) else (eos,))
    assert shape.repetition_penalty == 1.05


@pytest.mark.parametrize(
    ("files", "bounds"),
    [
        ({}, (3136, 1_003_520)),
        (
            {"preprocessor_config": {"min_pixels": 784, "max_pixels": 12_845_056}},
            (784, 12_845_056),
        ),
        ({"preprocessor_config": {"size": {"longest_edge": 7840}}}, (3136, 7840)),
        (
            {"preprocessor_config": {"max_pixels": 784000, "size": {"longest_edge": 7840}}},
            (3136, 784000),
        ),
        (
            {
                "processor_config": {
                    "image_processor": {"size": {"shortest_edge": 784, "longest_edge": 1568}}
                },
                "preprocessor_config": {"max_pixels": 784000},
            },
            (784, 1568),
        ),
        (
            {"processor_config": {}, "preprocessor_config": {"max_pixels": 784000}},
            (3136, 784000),
        ),
    ],
)
def test_pixel_bounds_are_read_from_either_file(
    files: dict[str, object], bounds: tuple[int, int], make_checkpoint: Make
) -> None:
    found = read_checkpoint(make_checkpoint(**files))
    assert (found.min_pixels, found.max_pixels) == bounds


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"patch_size": 16}, "patch_size: wanted 14"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean"),
        ({"image_std": "x"}, "image_std"),
        ({"min_pixels": 10**6, "max_pixels": 1000}, "at most max_pixels"),
        ({"max_pixels": -1}, "max_pixels"),
        ({"resample": 2}, "resample: wanted 3"),
    ],
)
def test_another_preprocessing_is_refused(
    file: dict[str, object], message: str, make_checkpoint: Make
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(make_checkpoint(preprocessor_config=file))


def test_a_tokenizer_beside_the_weights_is_found_and_measured(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    assert read_checkpoint(folder).tokenizer_json is None
    (folder / "tokenizer.json").write_text("{}")
    found = read_checkpoint(folder)
    assert (found.tokenizer_json, found.tokenizer_bytes) == (folder / "tokenizer.json", 2)


# --- names of models ----------------------------------------------------------------------------------------------

HUB_ID = "Qwen/Qwen2.5-VL-3B-Instruct"
FOLDER = "models--Qwen--Qwen2.5-VL-3B-Instruct"


def cache_of(make: Make, base: str) -> Path:
    """A cache folder that holds the tiny model under a published name, as the hub's client lays it out."""
    snapshot = make(name=f"{base}/{FOLDER}/snapshots/abc123")
    repository = snapshot.parents[1]
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123\n")
    (repository / "snapshots" / "old").mkdir()
    return repository.parent


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"])
def test_a_hub_id_is_found_in_the_local_cache(
    variable: str, make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = {"HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}
    base = {"HF_HUB_CACHE": "cache", "HOME": "cache/.cache/huggingface/hub"}.get(
        variable, f"cache/{inside.get(variable)}"
    )
    cache = cache_of(make_checkpoint, base)
    for other in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(other, raising=False)
    root = next(path for path in (cache, *cache.parents) if path.name == "cache")
    monkeypatch.setenv(variable, str(root))
    found = resolve_model(HUB_ID)
    assert found.directory == cache / FOLDER / "snapshots" / "abc123"
    assert found.shape.name == "Qwen2.5-VL-3B-Instruct"


def test_a_hub_id_that_is_not_there_names_the_command_that_fetches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=f"found none; .*execute --download --model {HUB_ID}"):
        resolve_model(HUB_ID)


def test_a_reference_out_of_the_cache_is_not_followed(
    make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(make_checkpoint, "cache")
    (cache / FOLDER / "refs" / "main").write_text("../refs")  # a folder that exists
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    with pytest.raises(CheckpointError, match="2 snapshots and no main"):
        resolve_model(HUB_ID)


def test_a_size_a_folder_and_nonsense_are_told_apart(make_checkpoint: Make, tmp_path: Path) -> None:
    assert resolve_model(" 3B ") is builtin("3b")
    folder = make_checkpoint()
    assert resolve_model(str(folder)).directory == folder
    for text in ("9b", "", "a/b/c", "../..x/y", "\0"):
        with pytest.raises(CheckpointError, match="model: wanted 3b, 7b, 32b, 72b"):
            resolve_model(text)
    with pytest.raises(CheckpointError, match="found a file of that name"):
        resolve_model(str(folder / "config.json"))
    with pytest.raises(CheckpointError, match="wanted the folder"):
        read_checkpoint(tmp_path / "nowhere")


def test_download_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"stowplan\[hub\]"):
        spec.download(HUB_ID)
    with pytest.raises(InputError, match="wanted a hub id"):
        spec.download("nonsense")


def test_a_download_that_fails_is_a_failed_run_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def snapshot_download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        if len(asked) == 1:
            raise ConnectionError("no route\nmore lines")
        return str(tmp_path)

    client = ModuleType("huggingface_hub")
    client.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    with pytest.raises(RunFailed, match=r"could not be fetched: no route; what came"):
        spec.download(HUB_ID)
    assert spec.download(HUB_ID) == tmp_path
    assert not any("py" in pattern or "bin" in pattern for pattern in asked[0][1])


def test_spec_and_profile_import_nothing_heavy() -> None:
    code = (
        "import sys, planner.checkpoint.spec, planner.profile; planner.checkpoint.spec.builtin('72b'); "
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'numpy', 'safetensors'}; "
        "sys.exit(sorted(heavy & set(sys.modules)).__repr__() if heavy & set(sys.modules) else 0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
