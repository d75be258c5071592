"""Files written whole or not at all, a look beforehand at whether they can be, and a stdout that takes nothing more."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from planner.errors import InputError, RunFailed


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that nobody has. It is there before the file is, so that an interrupt at any moment finds what to delete."""
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.part")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; RunFailed where it cannot."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: a temporary name in the same folder, then rename. RunFailed where it cannot."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        _drop(temporary)
        raise RunFailed(
            f"{path}: cannot be written: {error.strerror}; nothing was left behind"
        ) from None
    except BaseException:
        _drop(temporary)
        raise


@contextmanager
def reaching_stdout() -> Iterator[None]:
    """What is written inside has reached stdout at its end; RunFailed says why not."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # what is left over would make Python complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise RunFailed(f"stdout: cannot be written: {error.strerror}") from None


def check_target(option: str, path: Path, reads: Iterable[str | Path] = ()) -> None:
    """Nothing, if a file can be written under this name and is none that is read; InputError says why not, before any work was done for it."""
    # os.path, not Path: a name that no file can have is no file
    if not os.path.isdir(path.parent):
        raise InputError(f"{option} {path}: the folder {path.parent} does not exist")
    there = os.path.exists(path)
    if there and not os.path.isfile(path):
        raise InputError(f"{option} {path}: wanted the name of a file, found a folder or a device")
    if there and any(os.path.isfile(other) and os.path.samefile(path, other) for other in reads):
        raise InputError(
            f"{option} {path}: wanted a file of its own, found one that is read here; name another one"
        )
    try:
        # permissions alone do not tell: root may do anything, a file system may be read only
        with tempfile.TemporaryFile(dir=path.parent, prefix=".", suffix=".part"):
            pass
        try:
            os.lstat(path)  # the name may be too long for the file system
        except FileNotFoundError:
            pass
    except OSError as error:
        raise InputError(
            f"{option} {path}: no file can be made in {path.parent.resolve()}: {error.strerror}; name another folder"
        ) from None


def _drop(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        pass  # never made, or already renamed
