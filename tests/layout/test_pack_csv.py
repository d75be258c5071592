"""`plan pack`: tables in, tables out, exit codes and messages."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from planner.cli import main
from planner.layout import Span

GOOD = "id,lower,upper,size\na,0,2,5\nb,1,3,5\n"


@pytest.fixture
def table(tmp_path: Path) -> Callable[[str | bytes], str]:
    def write(content: str | bytes) -> str:
        path = tmp_path / "table.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def test_the_table_comes_back_with_offsets(
    table: Callable[..., str],
    partition: Callable[..., list[Span]],
    check: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    spans = partition(100, 0)
    lines = [f"{s.id},x,{s.size},{s.lower},{s.upper}" for s in spans]
    file = table("\ufeffid,note,size,lower,upper\r\n" + "\r\n\r\n".join(lines))
    assert main(["pack", file, "--capacity", "1MiB", "--seconds", "30"]) == 0
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    assert out.startswith("id,note,size,lower,upper,offset\n")
    assert [row["id"] for row in rows] == [span.id for span in spans]
    assert check(spans, {row["id"]: int(row["offset"]) for row in rows}) == 2**20
    assert "height 1048576, capacity 1048576, lower bound 1048576; 100 buffers" in err


def test_blanks_around_names_and_numbers_and_blank_lines_mean_nothing(
    table: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = table("  \nid, lower, upper, size\na, 0, 2, 5\n\t\nb, 1, 3, 5\n   \n")
    assert main(["pack", file, "--capacity", "10"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "id, lower, upper, size,offset"
    assert sorted(row.rsplit(",", 1)[1] for row in rows[1:]) == ["0", "5"]


def test_a_capacity_out_of_reach_ends_with_3_and_the_lowest_layout(
    table: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", table(GOOD), "--capacity", "9"]) == 3
    out, err = capsys.readouterr()
    assert sorted(line.split(",")[-1] for line in out.split()[1:]) == ["0", "5"]
    assert "proved impossible" in err
    assert "best height 10, capacity 9, lower bound 10" in err


def test_no_buffers_need_no_bytes(
    table: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", table("id,lower,upper,size\n"), "--capacity", "1"]) == 0
    assert capsys.readouterr().out == "id,lower,upper,size,offset\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "found an empty file"),
        ("id,lower,size\na,0,1\n", "found none called upper"),
        ("id,lower,upper,size,size\na,0,1,1,1\n", "columns with different names"),
        ("id,lower,upper,size,alignment\na,0,1,1,8\n", "'alignment'"),
        ("id,lower,upper,size\na,0,1\n", "line 2: wanted 4 fields, found 3"),
        ("id,lower,upper,size\na,0,1,1.5\n", "size: wanted a whole number from 1 to 2^60, found '1.5'"),
        ("id,lower,upper,size\na,-1,1,1\n", "lower: wanted a whole number"),
        ("id,lower,upper,size\na,0,1,9999999999999999999\n", "size: wanted a whole number"),
        ("id,lower,upper,size\na,0,1,\n", "found ''"),
        ("id,lower,upper,size\na,2,2,1\n", "wanted lower < upper, found 2 and 2"),
        ("id,lower,upper,size\na,0,1,0\n", "size: wanted a whole number from 1 to 2^60, found '0'"),
        (GOOD + "a,5,6,1\n", "line 4: wanted ids that differ, found 'a' again (line 2)"),
        (b"id,lower,upper,size\n\xff,0,1,1\n", "wanted UTF-8"),
        ('id,lower,upper,size\n"a,0,1,1\n', "not a CSV table"),
    ],
)  # fmt: skip
def test_a_bad_table_is_refused_with_its_place(
    table: Callable[..., str], capsys: pytest.CaptureFixture[str], content: str, words: str
) -> None:
    assert main(["pack", table(content), "--capacity", "10"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert words in err


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--capacity", "0"],
        ["--capacity", "-5"],
        ["--capacity", "1mib"],
        ["--capacity", "9", "--seconds", "0"],
        ["--capacity", "9", "--seconds", "nan"],
        ["--capacity", "9", "--seconds", "soon"],
    ],
)
def test_bad_options_are_usage_errors(
    table: Callable[..., str], capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert main(["pack", table(GOOD), *options]) == 2
    assert "--" in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(tmp_path / "none.csv"), "--capacity", "1"]) == 2
    assert "none.csv: cannot be read: No such file" in capsys.readouterr().err
