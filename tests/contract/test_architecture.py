"""ARCHITECTURE.md's table of files is that of the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def named(text: str, package: str) -> set[str]:
    """The files that a package's table names; a folder at the beginning of a row is that of the names behind it."""
    table = text.split(f"| {package}/ (", 1)[1].split("\n\n")[0]
    found = set()
    for row in table.splitlines()[2:]:
        folder = ""
        for name in re.findall("`([^`]+)`", row.split("|")[1]):
            if name.endswith("/"):
                folder = name
            else:
                found.add(f"{folder}{name}")
    return found


def files(package: str) -> set[str]:
    root = ROOT / package
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return {path.with_suffix("").as_posix() for path in paths if path.name != "__init__.py"}


@pytest.mark.parametrize("package", ["planner", "executor"])
def test_every_file_has_its_row_and_every_row_its_files(package: str) -> None:
    assert named((ROOT / "ARCHITECTURE.md").read_text(), package) == files(package)


def test_a_file_without_a_row_would_be_noticed() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for cut in ("`finite`, ", "`spec`, "):
        package = "executor" if "finite" in cut else "planner"
        assert named(text.replace(cut, ""), package) < files(package)


def test_the_other_folders_and_benchmarks_are_named() -> None:
    beside = (ROOT / "ARCHITECTURE.md").read_text().split("| beside them |")[1].split("\n\n")[0]
    for folder in ("profiles", "tests", "benchmarks", "fuzz", "docs", "notebooks", "examples"):
        assert f"`{folder}/`" in beside
    for path in [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "docs").glob("*.md")]:
        name = path.name if path.suffix == ".md" else path.stem
        assert f"`{name}`" in beside, path
