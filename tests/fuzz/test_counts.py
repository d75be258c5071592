"""Signed plans whose numbers cannot be: refused before anything is made as large as they say."""

from __future__ import annotations

from typing import Any

import pytest

from executor.counts import check_counts
from fuzz.plans import small
from fuzz.target import Place
from planner.errors import PlanFileError
from planner.plan import Plan


@pytest.fixture(scope="module")
def plan() -> Any:
    place = Place()
    data = small(place).plan
    place.close()
    data.pop("digest")
    return data


def change(plan: dict[str, Any], path: str, value: object) -> Plan:
    import copy

    changed = copy.deepcopy(plan)
    *names, last = path.split(".")
    where: Any = changed
    for name in names:
        where = where[int(name) if isinstance(where, list) else name]
    where[last] = value
    return Plan.model_validate(changed)


def test_a_plan_as_it_was_made_agrees(plan: dict[str, Any]) -> None:
    check_counts(Plan.model_validate(plan))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("decode_repeats", -2, "decode_repeats"),
        ("workload.prompt_tokens", 2**40, "prompt_tokens"),
        ("workload.max_new_tokens", 0, "max_new_tokens"),
        ("workload.images.0.rows", 6, "do not agree"),
        ("workload.images.0.cols", 2**31, "do not agree"),
        ("workload.images.0.width_px", 0, "do not agree"),
        ("workload.images.0.windows", [[1, 4]], "do not agree"),
        ("levers.tiles.query_rows", 0, "query_rows"),
        ("model.vision.patch_px", 0, "patch_px"),
        ("model.vision.window_px", 20, "window_px"),
        ("model.vision.merge", 3, "merge"),
        ("model.vision.heads", 3, "heads"),
        ("model.text.vocabulary", 2**62, "vocabulary"),
        ("model.text.mrope_section", [1, 1, 1], "mrope_section"),
        ("model.text.rope_theta", float("inf"), "rope_theta"),
    ],
)
def test_a_number_that_cannot_be_is_refused(
    path: str, value: object, words: str, plan: dict[str, Any]
) -> None:
    if path.endswith("windows"):
        value = [{"count": 1, "rows": 4}]
    with pytest.raises(PlanFileError, match=words):
        check_counts(change(plan, path, value))
