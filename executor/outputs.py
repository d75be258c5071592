"""`--save-outputs`: what a run computed, as one safetensors file that is never held in memory.

Rows go to one temporary file per tensor as they come; at the end header and parts are joined and renamed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from contextlib import AbstractContextManager
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, NamedTuple

import torch
from torch import Tensor

from planner.errors import InputError, RunFailed

Name = Literal["image_features", "prefill_logits", "logits", "tokens"]
NAMES: tuple[Name, ...] = ("image_features", "prefill_logits", "logits", "tokens")
_CODES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int64: "I64",
}


class _Part(NamedTuple):
    file: IO[bytes]
    dtype: torch.dtype
    row_shape: tuple[int, ...]
    rows: int


class Outputs(AbstractContextManager["Outputs"]):
    """Collects rows by name; leaving the `with` block without an error writes the file, otherwise nothing stays."""

    def __init__(self, path: Path) -> None:
        if not path.parent.is_dir():
            raise InputError(f"--save-outputs {path}: the folder {path.parent} does not exist")
        if path.is_dir():
            raise InputError(f"--save-outputs {path}: is a folder; name a file")
        self._path = path
        self._parts: dict[str, _Part] = {}
        # known before it is made, so that an interrupt at any moment finds what to delete
        self._temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.part")

    def __enter__(self) -> Outputs:
        try:
            self._temporary.mkdir(mode=0o700)
        except OSError as error:
            raise self._failed(error) from None
        return self

    def append(self, name: Name, rows: Tensor) -> None:
        """Rows (n, ...) behind those that `name` already has, in the type they come in."""
        rows = rows.detach()
        part = self._parts.get(name)
        try:
            if part is None:
                file = open(self._temporary / name, "wb")
                part = _Part(file, rows.dtype, tuple(rows.shape[1:]), 0)
            assert (part.dtype, part.row_shape) == (rows.dtype, tuple(rows.shape[1:])), name
            self._parts[name] = part._replace(rows=part.rows + rows.shape[0])
            # a few MiB at a time, since a copy off the device or to contiguous rows is host memory
            row_bytes = max(1, prod(part.row_shape) * rows.element_size())
            step = max(1, 2**22 // row_bytes)
            for start in range(0, rows.shape[0], step):
                flat = rows[start : start + step].to("cpu").contiguous().view(-1)
                part.file.write(flat.view(torch.uint8).numpy().data)
        except OSError as error:
            raise self._failed(error) from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._join()
        except OSError as failure:
            raise self._failed(failure) from None
        finally:
            self.drop()

    def drop(self) -> None:
        """Delete what is temporary; where nothing is, nothing happens."""
        for part in self._parts.values():
            try:
                part.file.close()
            except OSError:
                pass  # a full disk: the rows are thrown away anyhow
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _join(self) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        # the widest types first, so that every tensor begins at a multiple of its item
        order = sorted(
            self._parts, key=lambda name: (-self._parts[name].dtype.itemsize, NAMES.index(name))
        )
        for name in order:
            part = self._parts[name]
            shape = [part.rows, *part.row_shape]
            size_bytes = prod(shape) * part.dtype.itemsize
            header[name] = {
                "dtype": _CODES[part.dtype],
                "shape": shape,
                "data_offsets": [at, at + size_bytes],
            }
            at += size_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        whole = self._temporary / "whole"
        with open(whole, "wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                self._parts[name].file.close()
                with open(self._temporary / name, "rb") as source:
                    shutil.copyfileobj(source, target, 2**22)
                # freed as they are joined: the disk holds one copy and a part, not two
                os.unlink(self._temporary / name)
        os.replace(whole, self._path)

    def _failed(self, error: OSError) -> RunFailed:
        return RunFailed(
            f"--save-outputs {self._path}: cannot be written: {error.strerror}; nothing was left behind"
        )
