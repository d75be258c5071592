"""The short form of `make fuzz`, what it found once, and that it can find something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image as Pillow

from executor.cli import main as execute
from fuzz import run as module
from fuzz.mutate import spoil_bytes, spoil_value
from fuzz.run import run
from fuzz.target import Place, Target
from fuzz.targets import TARGETS
from planner.cli import main as plan
from planner.errors import CheckpointError, InputError, PlanFileError

ROOT = Path(__file__).parents[2]
CASES = {"plan": 150, "tokenizer": 300, "image": 300}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", TARGETS)
def test_spoilt_input_is_read_or_refused_in_words(target: str) -> None:
    tally = run(target, range(10**6, 10**6 + CASES.get(target, 600)))
    assert tally.findings == []
    assert tally.refused.total() > tally.cases // 4
    # most of what a reader does lies behind its first check
    assert tally.read > 0


def target(monkeypatch: pytest.MonkeyPatch, read: Any) -> None:
    made = Target(lambda chance: chance.randbytes(100), read)
    monkeypatch.setitem(TARGETS, "test", lambda place: made)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("crash", "ZeroDivisionError"),
        ("memory", "allocated"),
        ("silence", "an error without words"),
        ("length", "characters"),
        ("slow", "took"),
    ],
)
def test_the_fuzzer_finds(fault: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(data: bytes) -> None:
        if fault == "crash" and data[0] < 16:
            raise ZeroDivisionError
        if fault == "memory" and data[0] < 128:
            bytearray(4 * 2**20)
        if fault in ("silence", "length"):
            raise InputError("" if fault == "silence" else "x" * 10000)

    target(monkeypatch, read)
    if fault == "slow":
        monkeypatch.setattr(module, "SECONDS", -1.0)
    findings = run("test", range(300)).findings
    assert [words in finding.what for finding in findings] == [True]


def test_a_case_is_the_same_input_every_time() -> None:
    for name, make in TARGETS.items():
        place = Place()
        try:
            made = make(place)
            first, again = (made.make(module.case(name, 7)) for _ in range(2))
        finally:
            place.close()
        assert first == again


def test_most_cases_differ_from_their_seed() -> None:
    seed = b'{"a": [1, 2, {"b": 3}], "c": "text"}' * 4
    made = {spoil_bytes(seed, Random(i)) for i in range(200)}
    assert len(made - {seed}) > 180
    values = [spoil_value({"a": [1, 2, {"b": 3}], "c": "text"}, Random(i)) for i in range(200)]
    assert sum(value != {"a": [1, 2, {"b": 3}], "c": "text"} for value in values) > 180


def test_the_command_says_what_it_found() -> None:
    words = [sys.executable, "-m", "fuzz", "--cases", "200", "--jobs", "1", "units", "pack"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\n0 findings in " in done.stdout


# --- found by `make fuzz` and by trying ----------------------------------------------------------------------------

LONG = "x" * 300  # longer than a file's name may be


@pytest.mark.parametrize(
    "words",
    [
        ["--image", LONG],
        ["--image", f"3840x2160{LONG}"],
        ["--out", LONG],
        ["--model", LONG],
        ["--device", f"{LONG}.json"],
    ],
)
def test_a_name_that_no_file_can_have_is_refused_by_plan(words: list[str], capsys: Any) -> None:
    assert plan(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert LONG in err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([LONG, "--model", "3b", "--prompt", "a"], 2),
        (["--vram", "1GB", "--model", ".", "--prompt", "a", "--image", LONG], 2),
        (["--vram", "1GB", "--model", ".", "--prompt", "a", "--record", LONG], 2),
        (["--make-random-checkpoint", "tiny", LONG], 1),
    ],
)
def test_a_name_that_no_file_can_have_is_refused_by_execute(
    words: list[str], code: int, capsys: Any
) -> None:
    assert execute(words) == code
    assert capsys.readouterr().err.startswith("error: ")


def test_a_shard_of_a_name_that_no_file_can_have_is_missing(tmp_path: Path) -> None:
    from planner.checkpoint.headers import read_checkpoint_tensors

    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": LONG}}))
    with pytest.raises(CheckpointError, match="1 of them missing"):
        read_checkpoint_tensors(tmp_path)


@pytest.mark.parametrize("kind", ["/dev/zero", "large"])
def test_a_plan_file_without_end_is_refused(kind: str, tmp_path: Path) -> None:
    from planner.plan import MOST_PLAN_BYTES, Plan

    path = Path(kind)
    if kind == "large":
        path = tmp_path / "plan.json"
        with open(path, "wb") as file:
            file.truncate(MOST_PLAN_BYTES + 1)
    elif not path.exists():
        pytest.skip("there is no /dev/zero")
    with pytest.raises(PlanFileError, match="wanted at most 64 MiB"):
        Plan.load(path)


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of Linux")
def test_a_length_inside_a_picture_takes_no_memory(tmp_path: Path) -> None:
    """A PNG of 200 bytes with a chunk that says it had two gigabytes."""
    import resource
    import struct

    from executor.image import open_image
    from executor.memory import data_bytes
    from planner.workload import image_size, plan_image

    file = tmp_path / "a.png"
    Pillow.new("RGB", (40, 40)).save(file)
    data = file.read_bytes()
    at = data.index(b"IDAT") - 4
    image = plan_image("a", 40, 40, min_pixels=784, max_pixels=3136)
    open_image(file, image)
    before, mapped = resource.getrlimit(resource.RLIMIT_DATA), data_bytes()
    assert mapped is not None
    for length in (2**31 - 1, 2**30):
        file.write_bytes(data[:at] + struct.pack(">I", length) + data[at + 4 :])
        resource.setrlimit(resource.RLIMIT_DATA, (mapped + 2**28, before[1]))
        try:
            assert image_size(file) == (40, 40)
            open_image(file, image)  # its pixels are all there
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)


def test_a_pipe_in_place_of_a_picture_is_refused(tmp_path: Path, capsys: Any) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("there are no pipes with names")
    os.mkfifo(tmp_path / "pipe")
    assert plan(["--image", str(tmp_path / "pipe")]) == 2
    assert "found a pipe or a device" in capsys.readouterr().err


def test_a_tokenizer_that_reads_but_cannot_encode_is_named(tmp_path: Path) -> None:
    from executor.prompt import build_prompt, load_tokenizer
    from planner.plan.shapes import TokenIds
    from planner.workload import prompt_tokens

    control = [
        {"id": i, "content": f"<|im_{w}|>", "special": True} for i, w in ((1, "start"), (2, "end"))
    ]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    file = tmp_path / "tokenizer.json"
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}
    added = [{**token, **flags} for token in control]
    file.write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": words}))
    with pytest.raises(CheckpointError, match="cannot encode text"):
        prompt_tokens("b", None, file, [])
    with pytest.raises(CheckpointError, match="cannot encode text"):
        build_prompt(
            load_tokenizer(file),
            "b",
            [],
            TokenIds(image=5, video=6, vision_start=7, vision_end=8, stop=(2,)),
        )


@pytest.mark.parametrize("number", ["7\x1e", "\x1c7", " 7 "])
def test_a_table_s_number_between_separators_is_a_number(number: str, tmp_path: Path) -> None:
    from planner.layout.cli import read

    file = tmp_path / "a.csv"
    file.write_text(f"id,lower,upper,size\na,0,1,{number}\n")
    assert [span.size for span in read(file)[2]] == [7]
