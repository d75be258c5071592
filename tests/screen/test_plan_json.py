"""docs/plan-json.md against the models: every key is documented, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from planner.plan import SCHEMA_VERSION, Plan
from planner.screen.sweep import Frontier

TEXT = (Path(__file__).parents[2] / "docs" / "plan-json.md").read_text()


def models(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The model and all that its fields hold, by name."""
    found = {model.__name__: model}
    for field in model.model_fields.values():
        waiting = [field.annotation]
        while waiting:
            kind = waiting.pop()
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= models(kind)
            waiting += get_args(kind)
    return found


def documented() -> dict[str, list[str]]:
    """Keys by heading."""
    sections = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
    return {
        section.splitlines()[0].strip(): re.findall(r"^\| `(\w+)` \| \S", section, re.MULTILINE)
        for section in sections
    }


def test_every_model_is_documented_and_no_other() -> None:
    assert set(documented()) == set(models(Plan) | models(Frontier))


@pytest.mark.parametrize("name", sorted(models(Plan) | models(Frontier)))
def test_every_key_is_documented_in_its_order_and_no_other(name: str) -> None:
    model = (models(Plan) | models(Frontier))[name]
    assert documented()[name] == list(model.model_fields)


def test_the_document_says_the_version_it_describes(kit: Any) -> None:
    assert f"The version is {SCHEMA_VERSION}." in TEXT
    plan = json.loads(kit.plan("7b", "8GB").dumps())
    assert set(plan) == {*documented()["Plan"], "digest"}


def test_moves_and_variants_survive_the_file(kit: Any) -> None:
    plan = kit.plan("7b", "8GB")
    assert Plan.loads(plan.dumps()).prediction == plan.prediction
