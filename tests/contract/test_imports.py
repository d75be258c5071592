"""What may import what, and that `plan` answers at once: shown in fresh interpreters, and that these tests can fail."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# what the executor may have; planner.plan with its parts
SHARED = {"planner.plan", "planner.units", "planner.errors"}
MAY_MORE = {"probe": {"planner.profile"}}  # a package of the executor that writes profiles
HEAVY = ("torch", "transformers", "numpy", "tokenizers", "PIL")

MODULES = """
import sys
from planner.cli import main
assert main(sys.argv[1:]) == 0
print(*sorted(name for name in sys.modules if "." not in name), file=sys.stderr)
"""


@pytest.mark.parametrize("words", [["--vram", "16GB"], ["--vram", "16GB", "--model", "72b"]])
def test_plan_imports_neither_torch_nor_anything_else_heavy(words: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", MODULES, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    loaded = set(ran.stderr.split())
    assert "networkx" in loaded
    assert not loaded & set(HEAVY)


YARDSTICK = """
total = 0
for i in range(4_000_000):
    total += i * i % 7
"""
YARDSTICK_S = 0.40  # processor seconds of that loop on the machine that the second is meant for, measured 2026-11-23


def processor_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("words", [["--vram", "16GB"], ["--vram", "16GB", "--model", "72b"]])
def test_plan_answers_within_a_second(words: list[str]) -> None:
    """Best of three, start of the process included, in processor seconds: one thread, and other processes do not count.

    A machine that is slowed down from outside is given that much more, told by a plain loop timed beside each try.
    """
    command = [sys.executable, "-m", "planner.cli", *words]
    taken = []
    for _ in range(3):
        slower = max(1.0, processor_seconds([sys.executable, "-c", YARDSTICK]) / YARDSTICK_S)
        taken.append(processor_seconds(command) / slower)
    assert min(taken) < 1.0, taken


def imported(source: str) -> set[str]:
    """Modules that a file imports anywhere, type checking and functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from planner import search` is an import of planner.search
            whole = node.module == "planner"
            found |= (
                {f"planner.{alias.name}" for alias in node.names} if whole else {node.module or ""}
            )
    return found


def foreign(source: str) -> set[str]:
    """What a file of the executor imports of the planner and must not."""
    planner = {name for name in imported(source) if name.split(".")[0] == "planner"}
    return {name for name in planner - SHARED if not name.startswith("planner.plan.")}


def test_the_executor_has_only_plan_units_and_errors_of_the_planner() -> None:
    files = sorted((ROOT / "executor").rglob("*.py"))
    assert len(files) > 10
    broken = {
        str(f): found
        for f in files
        if f.name != "cli.py"
        and (found := foreign(f.read_text()) - MAY_MORE.get(f.parent.name, set()))
    }
    assert broken == {}


def test_what_both_share_has_nothing_else_of_the_planner() -> None:
    files = [*(ROOT / "planner" / "plan").glob("*.py"), ROOT / "planner/units.py"]
    assert len(files) > 5
    broken = {
        str(f): found
        for f in [*files, ROOT / "planner/errors.py"]
        if (found := foreign(f.read_text()) - {"planner.files"})
    }
    assert broken == {}


def test_the_planner_and_the_profiles_import_nothing_of_the_executor_or_torch() -> None:
    for folder in ("planner", "profiles"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            tops = {name.split(".")[0] for name in imported(file.read_text())}
            assert not tops & {"executor", "torch", "transformers"}, file


def installed(pyproject: str) -> set[str]:
    """The packages that an installation holds."""
    setuptools = pyproject.split("[tool.setuptools]\n")[1].split("\n[")[0]
    (names,) = re.findall(r"^packages = (\[.*?\])$", setuptools, re.M | re.S)
    return set(ast.literal_eval(names))


def test_every_folder_with_code_is_installed() -> None:
    files = [
        file for top in ("planner", "executor", "profiles") for file in (ROOT / top).rglob("*.py")
    ]
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in files}
    assert installed((ROOT / "pyproject.toml").read_text()) == folders


def test_both_packages_import_nothing_by_themselves() -> None:
    for package in ("planner", "executor"):
        assert imported((ROOT / package / "__init__.py").read_text()) == set()


@pytest.mark.parametrize(
    "line",
    [
        "import planner.search",
        "from planner.search import search",
        "from planner import profile",
        "import planner.planned",
        "def f() -> None:\n    from planner.checkpoint.spec import builtin",
        "import planner",
    ],
)
def test_a_foreign_import_would_be_noticed(line: str) -> None:
    assert foreign(f"from planner.plan import Plan\n{line}\n")


def test_an_import_of_torch_would_be_noticed() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", "import torch\n" + MODULES, "--vram", "16GB"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert set(ran.stderr.split()) & set(HEAVY)
