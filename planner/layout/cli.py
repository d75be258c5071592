"""`plan pack FILE.csv --capacity N`: offsets for the buffers of a table, on stdout; what was reached on stderr."""

from __future__ import annotations

import argparse
import csv
import io
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from planner.arguments import Parser
from planner.errors import DoesNotFit, InputError
from planner.files import reaching_stdout
from planner.layout import SECONDS, Packing, Span, pack
from planner.units import MOST_BYTES, parse_bytes

COLUMNS = ("id", "lower", "upper", "size")
REFUSED = (
    "offset",
    "alignment",
    "gaps",
    "hint",
)  # would constrain a layout; not part of this format
MOST_BUFFERS = 5_000
MOST_SECONDS = 86_400.0
_NUMBER = re.compile(r"[0-9]{1,19}")

DESCRIPTION = """\
Give every buffer of a table an offset such that no two that are alive together overlap and none ends above the
capacity. The table is a CSV file (UTF-8) with the columns id,lower,upper,size: a buffer is alive in the half-open
interval [lower, upper). Further columns are passed through.
"""
EPILOG = """\
stdout: the table with one more column, offset. Where the capacity was not reached: the lowest layout found, and
exit code 3; stderr then says its height, the lower bound (the largest sum of sizes alive together) and whether the
capacity was proved out of reach. The search ends as soon as the capacity is reached or proved impossible.

exit codes: 0 all below the capacity, 2 usage or bad input, 3 capacity not reached, 130 interrupted (no table)
"""


def main(arguments: list[str]) -> int:
    """The exit code of one `plan pack`; DoesNotFit, after the table was written, where the capacity was not reached."""
    options = _parser().parse_args(arguments)
    header, rows, spans = read(options.file)
    start = time.monotonic()
    found = pack(spans, options.capacity, seconds=options.seconds)
    seconds = time.monotonic() - start
    _write(header, rows, spans, found)
    summary = (
        f"height {found.height}, capacity {options.capacity}, lower bound {found.lower_bound}; "
        f"{len(spans)} buffers, {seconds:.1f} s"
    )
    if not found.fits:
        reason = "proved impossible" if found.proved else "not proved impossible; try a larger --seconds"  # fmt: skip
        raise DoesNotFit(f"the capacity was not reached ({reason})\n  best {summary}")
    print(f"packed: {summary}", file=sys.stderr)
    return 0


def read(path: Path) -> tuple[list[str], list[list[str]], list[Span]]:
    """Header, rows and buffers of a table; InputError names the line and the column."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    rows: list[list[str]] = []
    spans: list[Span] = []
    lines: dict[str, int] = {}
    try:
        header = next((row for row in reader if _is_filled(row)), [])
        places = _places(path, [name.strip() for name in header])
        for row in reader:
            if not _is_filled(row):
                continue
            where = f"{path}, line {reader.line_num}"
            if len(row) != len(header):
                raise InputError(f"{where}: wanted {len(header)} fields, found {len(row)}")
            span = _span([row[place] for place in places], where)
            if span.id in lines:
                raise InputError(
                    f"{where}: wanted ids that differ, found {span.id!r} again (line {lines[span.id]})"
                )
            lines[span.id] = reader.line_num
            rows.append(row)
            spans.append(span)
            if len(spans) > MOST_BUFFERS:
                raise InputError(f"{path}: wanted at most {MOST_BUFFERS} buffers, found more")
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not a CSV table: {error}") from None
    return header, rows, spans


def _is_filled(row: Sequence[str]) -> bool:
    """Whether a line is more than blanks; one of empty fields is, and has errors of its own."""
    return len(row) > 1 or any(field.strip() for field in row)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: wanted UTF-8, found another byte at {error.start}") from None


def _places(path: Path, header: Sequence[str]) -> list[int]:
    wanted = f"wanted the columns {','.join(COLUMNS)}"
    if not header:
        raise InputError(f"{path}: {wanted}, found an empty file")
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise InputError(f"{path}: {wanted}, found none called {' nor '.join(missing)}")
    if len(set(header)) < len(header):
        raise InputError(f"{path}: wanted columns with different names, found {','.join(header)}")
    refused = [name for name in REFUSED if name in header]
    if refused:
        raise InputError(
            f"{path}: found a column {refused[0]!r}, which would constrain the layout and is not "
            "understood here: remove it"
        )
    return [header.index(name) for name in COLUMNS]


def _span(fields: Sequence[str], where: str) -> Span:
    numbers = []
    for name, field in zip(COLUMNS[1:], fields[1:], strict=True):
        text = field.strip()
        least = 1 if name == "size" else 0
        if not _NUMBER.fullmatch(text) or not least <= int(text) <= MOST_BYTES:
            raise InputError(
                f"{where}: {name}: wanted a whole number from {least} to 2^60, found {text[:40]!r}"
            )
        numbers.append(int(text))
    span = Span(fields[0], *numbers)
    if span.lower >= span.upper:
        raise InputError(f"{where}: wanted lower < upper, found {span.lower} and {span.upper}")
    return span


def _write(
    header: Sequence[str], rows: Sequence[Sequence[str]], spans: Sequence[Span], found: Packing
) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*header, "offset"])
    for row, span in zip(rows, spans, strict=True):
        writer.writerow([*row, found.offsets[span.id]])
    with reaching_stdout():
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(encoding="utf-8")  # as the file that was read
        sys.stdout.write(table.getvalue())


def _parser() -> Parser:
    parser = Parser("plan pack", DESCRIPTION, EPILOG)
    parser.add_argument("file", type=Path, metavar="FILE.csv", help="the table of buffers")
    parser.add_argument(
        "--capacity",
        type=_capacity,
        required=True,
        metavar="N",
        help="what offset + size may reach: a whole number in the unit of the sizes, or bytes as 1MiB",
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=SECONDS,
        metavar="S",
        help=f"how long to search at most (default: {SECONDS:.0f})",
    )
    return parser


def _capacity(text: str) -> int:
    if _NUMBER.fullmatch(text) and 0 < int(text) <= MOST_BYTES:
        return int(text)
    try:
        return parse_bytes(text, what="--capacity")
    except InputError:
        raise argparse.ArgumentTypeError(
            f"wanted a whole number from 1 to 2^60 or a size such as 1MiB, found {text!r}"
        ) from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(
            f"wanted seconds above 0 and at most {MOST_SECONDS:.0f}, found {text!r}"
        )
    return seconds
