from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from executor.make_checkpoint import make_random_checkpoint
from planner.plan import digest


def spoilt(kit: Any, change: Callable[[dict[str, Any]], object]) -> Path:
    """The plan with one change made by hand, and signed again as if the planner had made it."""
    data = json.loads(kit.plan_file.read_text())
    change(data)
    data["digest"] = digest(data)
    path: Path = kit.folder / "plan.json"
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"null", b"[]", b"[" * 100_000, b'{"schema_version": 1}'],
    ids=["empty", "cut", "bytes", "null", "list", "deep", "fields missing"],
)
def test_a_file_that_is_no_plan_is_refused(content: bytes, kit: Any) -> None:
    path = kit.folder / "plan.json"
    path.write_bytes(content)
    kit.execute(plan=path).refused(f"{path}: ")


def test_a_truncated_plan_is_refused(kit: Any) -> None:
    path = kit.folder / "plan.json"
    path.write_text(kit.plan_file.read_text()[:-100])
    kit.execute(plan=path).refused("not JSON (", code=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(schema_version=2), "wanted a plan of schema version 1, found 2"),
        (lambda d: d.pop("schema_version"), "wanted a plan of schema version 1, found None"),
        (lambda d: d.update(colour="red"), "field colour: Extra inputs are not permitted (1 in"),
        (lambda d: d.pop("copies"), "field copies: Field required"),
        (lambda d: d["steps"][3].update(kind="guess"), "field steps.3.kind: "),
        (lambda d: d["levers"]["tiles"].update(query_rows="many"), "field levers.tiles.query_rows"),
        (lambda d: d["buffers"][0].update(offset_bytes=-512), "lie outside the arena"),
        (lambda d: d["buffers"][0].update(offset_bytes=2**40), "lie outside the arena"),
        (
            lambda d: d["steps"][1]["reads"].append("nowhere"),
            "names buffer nowhere, which the plan",
        ),
        (lambda d: d["steps"][1].update(unit="visual/none"), "its unit visual/none has no place"),
        (lambda d: d["units"].pop(), "its unit text/lm_head[0] has no place"),
        (lambda d: d["device"].update(kind="cuda"), "the plan is for cuda"),
        (lambda d: d["copies"][-1].update(after="nowhere"), "after step nowhere, which the plan"),
        (lambda d: d["steps"][0]["waits"].append("copy:no"), "waits for copy:no, which the plan"),
    ],
)
def test_a_plan_changed_by_hand_is_refused(
    change: Callable[[dict[str, Any]], object], words: str, kit: Any
) -> None:
    # as it would be run where it says so
    kit.execute("--device", "cpu", plan=spoilt(kit, change)).refused(words)


def test_a_plan_changed_after_it_was_written_is_refused_whatever_was_changed(kit: Any) -> None:
    data = json.loads(kit.plan_file.read_text())
    path = kit.folder / "plan.json"
    path.write_text(json.dumps(data, indent=1))
    assert kit.execute(plan=path).code == 0  # spacing is no change
    data["levers"]["tiles"]["prompt_rows"] = 0
    path.write_text(json.dumps(data))
    kit.execute(plan=path).refused("it was changed after it was written")


def test_a_plan_for_other_shapes_is_refused_and_one_for_other_weights_runs(kit: Any) -> None:
    tied, other = kit.folder / "tied", kit.folder / "other"
    make_random_checkpoint("tiny-tied", tied)
    kit.execute(model=tied).refused("the plan is for tiny (")
    make_random_checkpoint("tiny", other, seed=7)
    first, second = kit.execute(), kit.execute(model=other)
    assert (first.code, second.code) == (0, 0)
    assert first.out != second.out  # else the seed has no say


def test_a_prompt_longer_than_the_plan_is_refused(kit: Any) -> None:
    kit.execute(prompt="What is this, and what is that? " * 4).refused("the plan room for")


def test_a_further_prompt_longer_than_the_plan_is_refused_before_the_first_is_answered(
    kit: Any,
) -> None:
    found = kit.execute("--prompt", "What is this, and what is that? " * 4)
    found.refused("the plan room for")
    assert found.out == ""


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_an_empty_prompt_is_refused_by_both_commands(prompt: str, kit: Any) -> None:
    kit.plan("--prompt", prompt).refused("found an empty text")
    kit.execute(prompt=prompt).refused("found an empty text")


def test_a_prompt_that_is_not_utf8_is_refused_by_both_commands(kit: Any) -> None:
    # as Python hands on an argument of stray bytes
    prompt = b"caf\xe9".decode("utf-8", "surrogateescape")
    kit.plan("--prompt", prompt).refused("wanted UTF-8 text")
    kit.execute(prompt=prompt).refused("wanted UTF-8 text")


def test_a_prompt_that_looks_like_an_option_is_a_prompt(kit: Any) -> None:
    out = kit.folder / "plan.json"
    assert kit.plan("--prompt=--vram", out=out).code == 0
    assert kit.execute("--prompt=--vram", plan=out).code == 0
