from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from planner.cli import main
from planner.plan import Plan
from planner.profile import load_profile


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*words: str) -> Outcome:
        code = main(words)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return call


def test_vram_alone_plans_the_7b_model_and_a_4k_image_on_the_default_card(run: Any) -> None:
    outcome = run("--vram", "16GB", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    plan = Plan.loads(outcome.out)
    assert outcome.out == plan.dumps()
    assert plan.model.name == "Qwen2.5-VL-7B-Instruct"
    assert [image.name for image in plan.workload.images] == ["3840x2160"]
    assert plan.workload.images[0].tokens == 10549
    assert plan.workload.prompt_tokens == 10549 + 2 + 19 + 64
    assert plan.workload.max_new_tokens == 128
    assert not plan.workload.prompt_is_bound
    assert (plan.device.profile, plan.device.budget_bytes) == ("rtx-5080-16gb", 16 * 10**9)
    assert plan.prediction.bound_peak_bytes <= 16 * 10**9


def test_the_report_says_what_fits_how_and_at_what_price_in_80_columns(run: Any) -> None:
    outcome = run("--vram", "16GB")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in outcome.out
    assert "…" not in outcome.out
    assert lines[0] == "Qwen2.5-VL-7B-Instruct fits 16GB (14.90 GiB) on rtx-5080-16gb"
    assert "3840x2160 -> 3836x2156 px, 42196 patches, 10549 tokens" in outcome.out
    first_words = [line.split()[0] for line in lines if line.split()]
    for phase in ("load", "vision", "prefill", "decode", "all"):
        assert phase in first_words
    for words in (
        "alive at the peak",
        "resident weights",
        "KV cache",
        "this plan",
        "LLM beside the vision tower (SUM)",
        "vision weights resident",
        "attention untiled",
        "all three off",
        "execute plan.json --model DIR",
        "rates: data sheets",
        "the usual way",
        "GiB saved",
        "timeline",
    ):
        assert words in outcome.out, words


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "72b", "--vram", "7GB", "--max-new-tokens", "1000"],
        ["--device", "cpu", "--model", "3b", "--image", "640x480", "--image", "80x900"],
        ["--image", "none", "--vram", "8GB"],
        ["--device", "h200-sxm-141gb", "--model", "72b", "--max-new-tokens", "1"],
    ],
)
def test_no_report_is_cut_or_wider_than_80_columns(run: Any, words: list[str]) -> None:
    outcome = run(*words)
    assert outcome.code == 0, outcome.err
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert "…" not in outcome.out


def test_a_prompt_without_its_tokenizer_is_said_to_be_at_most(run: Any) -> None:
    words = ["--device", "cpu", "--model", "3b", "--image", "none"]
    # one token at most of each UTF-8 byte, beside the template's 19
    assert "at most 25 tokens in all" in run(*words, "--prompt", "héllo").out
    assert "at most" not in run(*words, "--prompt-tokens", "5").out.split("new ones")[0]


def test_the_plan_names_the_command_that_makes_it_again(run: Any) -> None:
    words = ["--device", "cpu", "--model", "3b", "--image", "640x480", "--prompt", "what's -x"]
    first = run(*words, "--vram", "3GB", "--max-pixels", "200000", "--ram", "32GB", "--json")
    command = shlex.split(json.loads(first.out)["request"])
    assert command[0] == "plan"
    assert run(*command[1:], "--json").out == first.out


def test_no_host_memory_can_be_asked_for(run: Any) -> None:
    words = ["--device", "rtx-4060-8gb", "--model", "7b", "--image", "none", "--json"]
    kept = {ram: json.loads(run(*words, "--ram", ram).out)["host_units"] for ram in ("0GB", "64GB")}
    assert kept["0GB"] == []
    assert kept["64GB"]


def test_out_writes_the_plan_and_says_so_on_stderr(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    words = ["--device", "cpu", "--model", "3b", "--image", "640x480", "--out", str(path)]
    outcome = run(*words, "--json")
    assert (outcome.code, outcome.err) == (0, f"wrote {path}\n")
    assert path.read_text() == outcome.out
    report = " ".join(run(*words).out.split())
    assert f"execute {path.name}" in report.replace(f"{path.parent}/", "")
    assert "first save" not in report


def test_without_a_budget_a_card_offers_what_it_has_and_the_cpu_has_no_limit(run: Any) -> None:
    card = json.loads(run("--device", "rtx-4060-8gb", "--image", "none", "--json").out)
    assert card["device"]["budget_bytes"] == load_profile("rtx-4060-8gb").usable_bytes
    words = ["--device", "cpu", "--model", "3b", "--image", "none"]
    assert json.loads(run(*words, "--json").out)["device"]["budget_bytes"] is None
    assert "no budget was given" in run(*words).out


def test_a_budget_above_the_card_is_noted(run: Any) -> None:
    outcome = run("--vram", "64GB", "--image", "none")
    assert outcome.code == 0
    assert "note: rtx-5080-16gb offers 15.53 GiB" in outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--vram 16", "--vram: wanted a size"),
        ("--vram 16gb", "--vram: wanted a size"),
        ("--vram 0GB", "--vram: wanted a size above zero"),
        ("--vram=-1GB", "--vram: wanted a size"),
        ("--ram lots", "--ram: wanted a size"),
        ("--model nosuch", "model: wanted 3b, 7b, 32b, 72b"),
        ("--model no/such-model", "no/such-model"),
        ("--device nosuch", "device: wanted the name of a profile"),
        ("--device nosuch.json", "cannot be read as a profile"),
        ("--image missing.jpg", "missing.jpg: no such file"),
        ("--image 0x10", "at least 1x1"),
        ("--image 10x9000", "differ at most 200"),
        ("--image 640x480 --image none", "found both"),
        ("--max-pixels 0", "--max-pixels: wanted at least 1"),
        ("--max-pixels 100", "raise --max-pixels"),
        ("--max-new-tokens 0", "--max-new-tokens: wanted at least 1"),
        ("--max-new-tokens 1.5", "wanted a whole number, found '1.5'"),
        ("--prompt-tokens 99999999", "wanted at most 1000000"),
        ("--prompt a --prompt-tokens 3", "not allowed with argument"),
        ("--context-tokens 100", "--context-tokens: wanted at least 10762"),
        ("--vra 16GB", "unrecognized arguments"),
        ("nonsense", "unrecognized arguments"),
        ("--out no/such/folder/plan.json", "does not exist"),
        ("--device t4-16gb --dtype bfloat16", "float16"),
    ],
)
def test_bad_usage_is_one_clear_line_and_exit_code_2(run: Any, words: str, message: str) -> None:
    outcome = run(*words.split())
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_a_text_file_as_image_is_refused(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a picture")
    outcome = run("--image", str(path))
    assert outcome.code == 2
    assert "not an image that Pillow can read" in outcome.err


def test_what_does_not_fit_is_exit_code_3_with_the_certificate(run: Any) -> None:
    outcome = run("--vram", "1.5GB")
    assert (outcome.code, outcome.out) == (3, "")
    lines = outcome.err.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("error: no plan fits 1.5GB (1.40 GiB): the smallest needs")
    step, fit = " ".join(" ".join(lines[1:]).split()).split("to fit")
    assert step.startswith("largest step ")
    assert "staging " in step
    assert "context and reserved " in step
    assert "--vram " in fit
    assert "--max-pixels" in fit


def test_help_explains_the_budget_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--image-max-tokens is N / 784" in text
    assert "3 does not fit" in text


def test_a_reader_who_leaves_ends_the_report_quietly(kit: Any) -> None:
    words = [sys.executable, "-m", "planner.cli", "--vram", "16GB", "--json"]
    with subprocess.Popen(
        words, cwd=kit.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ)
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_an_interrupt_is_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("planner.search.search", interrupted)
    assert main(["--vram", "16GB"]) == 130
    assert capsys.readouterr().err == "interrupted; nothing half written\n"


def test_a_plan_is_not_written_over_what_it_was_made_from(run: Any, tmp_path: Path) -> None:
    profile = tmp_path / "card.json"
    text = (Path(__file__).parents[2] / "profiles/devices/rtx-5080-16gb.json").read_bytes()
    profile.write_bytes(text)
    (tmp_path / "link.json").symlink_to(profile)
    for name in ("card.json", "link.json"):
        outcome = run("--device", str(profile), "--out", str(tmp_path / name))
        assert outcome.code == 2
        assert "found one that is read here" in outcome.err
    assert profile.read_bytes() == text
