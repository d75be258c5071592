from __future__ import annotations

import ast
import warnings
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
LOGIC = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.If, ast.comprehension)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(path: Path, folder: Path) -> Any:
    """The notebook, executed in `folder`."""
    notebook = nbformat.read(path, as_version=4)
    # without what is stored in the file
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    with warnings.catch_warnings():
        # of jupyter_client and its event loop, none of them ours
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", ResourceWarning)
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=120,
            resources={"metadata": {"path": str(folder)}},
        )
        client.execute()
    return notebook


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def pictures(notebook: Any) -> list[str]:
    return [o.data["image/png"] for o in outputs(notebook) if "image/png" in o.get("data", {})]


def test_there_are_two_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["choosing_a_budget", "where_the_memory_goes"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_the_pictures_that_are_stored_in_it(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "docs").mkdir()
    done = run(path, tmp_path / "notebooks")  # raises where a cell does
    stored = nbformat.read(path, as_version=4)
    assert [o for o in outputs(done) if o.get("name") == "stderr"] == []
    assert len(pictures(done)) == len(pictures(stored)) >= 2

    def texts(notebook: Any) -> list[str]:
        return [o.text for o in outputs(notebook) if o.output_type == "stream"]

    assert texts(done) == texts(stored), (
        f"stale: run jupyter execute --inplace notebooks/{path.name}"
    )
    (picture,) = (tmp_path / "docs").iterdir()
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert picture.stat().st_size <= 120_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_no_logic_and_is_small(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    tree = ast.parse("\n".join(line for line in code.splitlines() if line[:1] != "%"))
    found = [type(node).__name__ for node in ast.walk(tree) if isinstance(node, LOGIC)]
    assert found == []
    assert path.stat().st_size <= 200_000
