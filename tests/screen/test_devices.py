from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner.devices import rates_from
from planner.profile import FIGURES, dumps, list_profiles, load_profile


def test_devices_lists_every_profile_in_80_columns(run: Any) -> None:
    outcome = run("devices")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert outcome.out.isascii()
    assert sorted(line.split()[0] for line in lines[2:-3]) == list(list_profiles())
    (row,) = [line.split() for line in lines if line.startswith("rtx-5080-16gb")]
    assert row[1:] == ["15.92", "15.53", "768", "78.8", "55.0", "12.0", "data", "sheets"]


def test_devices_as_json_says_bytes_and_rates(run: Any) -> None:
    rows = json.loads(run("devices", "--json").out)
    assert sorted(row["id"] for row in rows) == list(list_profiles())
    (card,) = [row for row in rows if row["id"] == "rtx-4060-8gb"]
    profile = load_profile("rtx-4060-8gb")
    assert card["memory_total_bytes"] == profile.memory_total_bytes
    assert card["bandwidth_bytes_per_s"] == profile.bandwidth_bytes_per_s
    assert card["rates"] == "data sheets"


def test_one_device_shows_every_figure_with_its_source(run: Any) -> None:
    outcome = run("devices", "NVIDIA GeForce RTX 4060 Ti")
    profile = load_profile("rtx-4060-ti-16gb")
    assert outcome.out.startswith("RTX 4060 Ti 16GB (rtx-4060-ti-16gb), cuda; rates: data sheets")
    assert max(map(len, outcome.out.splitlines())) <= 80
    whole = " ".join(outcome.out.split())
    for name in FIGURES:
        figure = whole.index(f"{name}: ")
        assert profile.sources[name] in whole[figure:]
    assert "16 bits 0.617e12 at 1 rows" in whole


def test_one_device_as_json_is_its_profile(run: Any, tmp_path: Path) -> None:
    document = json.loads(run("devices", "cpu", "--json").out)
    assert document == load_profile("cpu").model_dump(mode="json")
    path = tmp_path / "mine.json"
    path.write_text(dumps(load_profile("cpu")))
    assert json.loads(run("devices", str(path), "--json").out) == document


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nosuch"], "wanted the name of a profile"),
        (["a", "b"], "unrecognized arguments: b; see: plan devices --help"),
        (["--jso"], "unrecognized arguments"),
    ],
)
def test_what_devices_does_not_know_is_exit_code_2(
    run: Any, words: list[str], message: str
) -> None:
    outcome = run("devices", *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


def test_rates_are_measured_only_where_every_source_says_so() -> None:
    cpu, card = load_profile("cpu"), load_profile("rtx-5080-16gb")
    assert (rates_from(cpu), rates_from(card)) == ("measured", "data sheets")
    mixed = card.sources | {"bandwidth_bytes_per_s": "measured 2026-11-22"}
    assert rates_from(card.model_copy(update={"sources": mixed})) == "partly measured"
