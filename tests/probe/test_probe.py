"""The probe in its short form: what it writes is a profile that loads, plans, and says where every figure is from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from executor import cli, probe
from executor.probe import run_probe
from executor.probe.bench import Busy
from planner.checkpoint.spec import builtin
from planner.profile import DeviceProfile, load_profile
from planner.rates import PASSES
from planner.search import Request, search
from planner.workload import make_workload, parse_image


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "mine.json"
    run_probe(path, device="cpu", short=True, quiet=True)
    return path


@pytest.fixture(scope="module")
def profile(written: Path) -> DeviceProfile:
    return load_profile(str(written))


def test_the_profile_is_this_machine_s(profile: DeviceProfile) -> None:
    assert profile.kind == "cpu"
    assert profile.id == "cpu-probed"
    assert profile.threads is not None
    assert profile.threads >= 1
    # a process with torch in it and nothing else: above 100 MB, and the tiny model is long started within a minute
    assert 100e6 < profile.context_bytes < 2e9
    assert 0.1 < profile.start_s < 60


def test_every_table_is_there_and_bytes_move_at_rates_that_memory_can_have(
    profile: DeviceProfile,
) -> None:
    measured = profile.measured
    assert measured is not None
    for found in (measured.bits16, measured.float32):
        assert set(found.passes) == set(PASSES)
        assert found.product.first == (16, 256)
        assert found.product.second == (4096, 65536)
        assert [dim.head_dim for dim in found.attention] == [16]
        # a call of one head takes longer than a head's part of a call of several
        (head,) = found.attention
        assert head.alone is not None
        assert head.heads == 4
        assert head.alone.at(256, 512) > head.full.at(256, 512) / 2
    assert all(0 < share <= 1 for share in measured.beside)
    assert measured.favoured is not None
    assert -1 <= measured.favoured <= measured.beside[0]
    for rate in (profile.page_cache_bytes_per_s, profile.disk_bytes_per_s):
        assert 1e6 < rate < 1e12
    assert measured.pixel_values_per_s > 1e6


def test_what_was_measured_says_when_and_how(profile: DeviceProfile) -> None:
    for name in ("matmul_flops_per_s", "bandwidth_bytes_per_s", "start_s", "measured", "launch_s"):
        assert "by execute --probe, torch" in profile.sources[name], name


def test_a_plan_is_made_with_it(profile: DeviceProfile) -> None:
    checkpoint = builtin("3b")
    workload = make_workload(
        [
            parse_image(
                "448x448", min_pixels=checkpoint.min_pixels, max_pixels=checkpoint.max_pixels
            )
        ],
        min_pixels=checkpoint.min_pixels,
        max_pixels=checkpoint.max_pixels,
        n_text_tokens=16,
        max_new_tokens=4,
    )
    plan = search(Request(checkpoint, workload, None), profile)
    assert plan.prediction.seconds > profile.start_s
    assert plan.device.profile == "cpu-probed"


def test_the_profile_goes_to_stdout_and_a_summary_to_stderr(
    profile: DeviceProfile, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "probe", lambda **_: profile)
    assert cli.main(["--probe", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert DeviceProfile.model_validate(json.loads(out)) == profile
    assert "memory read by one-row products" in err
    assert "execute --probe --out" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--probe", "--prompt", "hello"], "runs nothing"),
        (["--probe", "--out", "mine.txt"], "wanted a name ending in .json"),
        (["--probe", "--out", "/nowhere/mine.json"], "does not exist"),
        (["--probe", "--model", "/nowhere"], "no such folder"),
        (["--out", "mine.json", "--vram", "1GB"], "belongs to --probe"),
    ],
)
def test_wrong_words_beside_probe_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_probe_of_a_card_that_is_not_there_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["--probe", "--device", "cuda"]) == 1
    assert "probe with --device cpu" in capsys.readouterr().err


def test_busy_cores_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Busy()
    readings = iter([(90.0, 10.0, 100.0)])
    monkeypatch.setattr(busy, "_before", (0.0, 0.0, 0.0))
    monkeypatch.setattr(busy, "_read", lambda: next(readings))
    assert busy.of_others() == (80.0, 100.0)
