"""Text in lines that a screen of 80 columns holds."""

from __future__ import annotations

import re
import sys
from io import StringIO
from textwrap import fill
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

COLUMNS = 80
_GLUE = "\ue000"  # in no text
_NUMBER_AND_UNIT = re.compile(r"(?<=[0-9]) (?=(?:[KMGT]i?B|min|m?s)\b)|(?<=min) (?=[0-9]+ s\b)")


def wrapped(text: str, first: str = "", other: str = "", *, width: int = COLUMNS) -> str:
    """In lines that begin with `first` and with `other`; no number is left without its unit."""
    lines = fill(
        _NUMBER_AND_UNIT.sub(_GLUE, text),
        width,
        initial_indent=first,
        subsequent_indent=other,
        break_on_hyphens=False,
    )
    return lines.replace(_GLUE, " ")


def print_report(screen: RenderableType) -> None:
    """Print in 80 columns, or in those of the terminal."""
    from rich.console import Console

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the letters shows a ?
    if sys.stdout.isatty():
        Console(highlight=False).print(screen)
        return
    text = StringIO()
    Console(file=text, highlight=False, width=COLUMNS).print(screen)
    # rows of a table end in spaces, which nobody wants in a file
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines()))
