from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.errors import PlanFileError, RunFailed
from planner.plan import Plan


@pytest.fixture
def saved(streamed: Plan, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    streamed.save(path)
    return path


def test_a_plan_comes_back_from_its_file_as_it_was(streamed: Plan, saved: Path) -> None:
    loaded = Plan.load(saved)
    assert loaded == streamed
    assert loaded.dumps() == streamed.dumps() == saved.read_text()
    assert [path.name for path in saved.parent.iterdir()] == ["plan.json"]


def test_a_plan_for_a_card_with_images_and_a_budget_comes_back_too(
    kit: Any, tmp_path: Path
) -> None:
    workload = kit.workload([(336, 252), (100, 300)])
    plan = kit.plan("3b", 2**32, "rtx-4060-8gb", workload, command="plan --vram 4GiB")
    plan.save(tmp_path / "a.json")
    assert Plan.load(tmp_path / "a.json").dumps() == plan.dumps()


Spoil = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: d.update(schema_version=2), "wanted a plan of schema version 1, found 2"),
        (lambda d: d.pop("schema_version"), "found None"),
        (lambda d: d.update(more=1), "field more: Extra inputs"),
        (lambda d: d["steps"][3].update(colour="red"), "field steps.3.colour: Extra inputs"),
        (lambda d: d.pop("buffers"), "field buffers: Field required"),
        (lambda d: d["copies"][0].update(size_bytes="much"), "field copies.0.size_bytes"),
    ],
)
def test_a_changed_file_is_refused_by_its_field_and_says_how_to_write_it_anew(
    saved: Path, spoil: Spoil, words: str
) -> None:
    data = json.loads(saved.read_text())
    spoil(data)
    saved.write_text(json.dumps(data))
    with pytest.raises(PlanFileError) as refused:
        Plan.load(saved)
    assert words in str(refused.value)
    assert f"plan --out {saved}" in str(refused.value)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    text = saved.read_text().rstrip()
    saved.write_text(text[: int(len(text) * share)])
    with pytest.raises(PlanFileError, match="not JSON"):
        Plan.load(saved)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"plan"'])
def test_json_that_is_no_plan_is_refused(saved: Path, text: str) -> None:
    saved.write_text(text)
    with pytest.raises(PlanFileError, match="found None"):
        Plan.load(saved)


def test_a_missing_file_a_folder_and_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", ".", "bytes"):
        with pytest.raises(PlanFileError, match="cannot be read as a plan"):
            Plan.load(tmp_path / name)


def test_a_disk_that_takes_only_part_leaves_the_old_plan_and_nothing_else(
    streamed: Plan, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    child = os.fork()  # a limit on file sizes cannot be taken back in this process
    if not child:
        code = 0
        try:
            import signal

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            streamed.save(path)
        except RunFailed as error:
            code = 7 if "nothing was left behind" in str(error) else 8
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["plan.json"]


def test_a_folder_that_does_not_exist_is_a_clear_failure(streamed: Plan, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="cannot be written"):
        streamed.save(tmp_path / "no" / "plan.json")
