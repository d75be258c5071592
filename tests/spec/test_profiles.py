"""Device profiles: every file loads, every figure has a source, rates are read between points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner.errors import InputError
from planner.profile import DeviceProfile, dumps, list_profiles, load_profile, rate

MIB = 2**20


def test_there_is_a_profile_for_the_cpu_and_for_31_cards() -> None:
    assert len(list_profiles()) == 32
    assert "cpu" in list_profiles()


@pytest.mark.parametrize("profile_id", list_profiles())
def test_every_profile_loads_and_stands_in_its_file_s_own_form(profile_id: str) -> None:
    profile = load_profile(profile_id)
    assert profile.id == profile_id
    assert load_profile(profile.name) is profile
    assert DeviceProfile.model_validate_json(dumps(profile)) == profile
    assert profile.max_tensor_bytes == 2**31 - 1
    for rates in (profile.matmul_flops_per_s, profile.attention_flops_per_s):
        for points in (rates.bits16, rates.float32):
            values = [value for _, value in points]
            assert values == sorted(values), "more rows never run at a lower rate"


@pytest.mark.parametrize("profile_id", [p for p in list_profiles() if p != "cpu"])
def test_a_card_s_figures_are_of_a_card(profile_id: str) -> None:
    card = load_profile(profile_id)
    assert card.kind == "cuda"
    assert card.compute_capability is not None
    hopper = card.compute_capability == "9.0"
    assert card.workspace_bytes == (33_554_432 if hopper else 8_519_680)
    assert card.bf16 == (float(card.compute_capability) >= 8.0)
    assert 300 * MIB <= card.memory_total_bytes - card.usable_bytes <= 700 * MIB
    # one-row products must be bound by bandwidth: two operations for each two bytes of weight
    assert card.matmul_rate("bfloat16", 1) > card.bandwidth_bytes_per_s


def test_only_the_cpu_s_context_grows_with_the_model() -> None:
    for profile in map(load_profile, list_profiles()):
        grows = (profile.context_block_bytes, profile.tokenizer_bytes_per_token)
        assert all(grows) if profile.kind == "cpu" else not any(grows)


@pytest.mark.parametrize(
    "name",
    [
        "rtx-5080-16gb",
        "RTX 5080 16GB",
        "rtx 5080 16gb",
        "NVIDIA GeForce RTX 5080",
        "RTX 5080",
    ],
)
def test_a_device_is_found_by_id_and_by_name(name: str) -> None:
    assert load_profile(name).id == "rtx-5080-16gb"


def test_a_laptop_card_is_not_taken_for_the_desktop_one() -> None:
    assert load_profile("NVIDIA GeForce RTX 4060 Laptop GPU").id == "rtx-4060-laptop-8gb"
    assert load_profile("NVIDIA GeForce RTX 4060").id == "rtx-4060-8gb"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("RTX 5808 16GB", "did you mean rtx-5080-16gb"),
        ("A100 SXM4", "did you mean a100-sxm4-40gb, a100-sxm4-80gb"),
        ("a100-40gb", "did you mean a100-sxm4-40gb, a100-sxm4-80gb, a100-pcie-80gb, a10-24gb[?]"),
        ("A100", "did you mean a100-sxm4-80gb, a100-sxm4-40gb, a100-pcie-80gb"),
        ("RTX 4090 Ti", "did you mean rtx-4090-24gb, rtx-4090-laptop-16gb"),
        ("T4 8GB", "did you mean t4-16gb"),
        ("5080", "did you mean rtx-5080-16gb[?]"),
        ("zzz", "there are a10-24gb"),
        ("", "there are a10-24gb"),
        ("../devices/cpu", "wanted the name of a profile"),
    ],
)
def test_an_unknown_device_gets_close_names(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        load_profile(name)


def cpu_file(tmp_path: Path, **changes: Any) -> Path:
    data = {**json.loads(dumps(load_profile("cpu"))), **changes}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({k: v for k, v in data.items() if v != "absent"}))
    return path


def test_a_profile_file_of_one_s_own_is_read(tmp_path: Path) -> None:
    assert load_profile(str(cpu_file(tmp_path, start_s=1.5))).start_s == 1.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_s": "absent"}, "start_s"),
        ({"extra": 1}, "extra"),
        ({"disk_bytes_per_s": 0}, "disk_bytes_per_s"),
        ({"usable_bytes": 2**60}, "usable_bytes"),
        ({"sources": {}}, "wanted one for each figure"),
        (
            {"matmul_flops_per_s": {"bits16": [[8, 1], [4, 2]], "float32": [[1, 1]]}},
            "ascending rows",
        ),
        ({"matmul_flops_per_s": {"bits16": [], "float32": [[1, 1]]}}, "bits16"),
    ],
)
def test_a_profile_file_with_a_wrong_field_is_refused_by_name(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        load_profile(str(cpu_file(tmp_path, **changes)))


def test_a_profile_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_profile(str(tmp_path / "none.json"))


def test_a_rate_is_linear_in_the_logarithm_of_rows_and_clamped() -> None:
    points = ((4, 100), (16, 200), (1024, 800))
    assert [rate(points, rows) for rows in (1, 4, 8, 16, 128, 1024, 5000)] == [
        *(100, 100, 150, 200, 500, 800, 800)
    ]
