"""Text in lines that a screen of 80 columns holds."""

from __future__ import annotations

from textwrap import fill

COLUMNS = 80


def wrapped(text: str, first: str = "", other: str = "") -> str:
    """In lines that begin with `first` and with `other`."""
    return fill(
        text, COLUMNS, initial_indent=first, subsequent_indent=other, break_on_hyphens=False
    )
