"""A parser of arguments whose mistakes are InputErrors, and the kinds of numbers that options take."""

from __future__ import annotations

import argparse
from typing import NoReturn

from planner.errors import InputError
from planner.lines import wrapped

MOST = 10**6  # tokens, and whatever else is counted


class Parser(argparse.ArgumentParser):
    """argparse, with errors as one line that the command's `main` prints; options are spelled out."""

    def __init__(
        self, prog: str, description: str, epilog: str | None = None, *, add_help: bool = True
    ) -> None:
        super().__init__(
            prog=prog,
            description=_paragraphs(description),
            epilog=_paragraphs(epilog or ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=add_help,
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see: {self.prog} --help")


def _paragraphs(text: str) -> str:
    """The same words in lines of the screen, paragraph by paragraph."""
    return "\n\n".join(wrapped(" ".join(part.split())) for part in text.split("\n\n"))


def count(text: str) -> int:
    """A whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted a whole number, found {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"wanted at least 1, found {number}")
    return number


def tokens(text: str) -> int:
    """A whole number from 1 to MOST."""
    number = count(text)
    if number > MOST:
        raise argparse.ArgumentTypeError(f"wanted at most {MOST}, found {number}")
    return number
