"""Untrusted bytes of a memory snapshot to plain containers: pickle or JSON, gzipped or not, told by their content.

A pickle is a program for a stack machine. Its opcodes are read over before Python's unpickler runs them: one that
names a class, or that makes much out of few bytes, is refused. So what is allocated stays in proportion to the file.
"""

from __future__ import annotations

import gc
import gzip
import io
import json
import pickle
import re
import zlib
from pathlib import Path
from typing import Any, NoReturn

from planner.errors import InputError
from planner.files import write_bytes
from planner.units import GIB, MIB, format_mib

MOST_BYTES = 4 * GIB  # of a file, unpacked
MOST_RATIO = 300  # unpacked to packed; frames repeat a lot, but no recording comes near
FREE_BYTES = 64 * MIB  # may be unpacked whatever the ratio

WANTED = (
    "wanted a memory snapshot as torch.cuda.memory._dump_snapshot writes it (pickle), or its JSON"
)


def read(path: Path) -> tuple[Any, int]:
    """What the file holds, made of dict, list, tuple, str, int, float, bool and None, and its bytes unpacked.

    Raises InputError for what cannot be read, is something else, or would take far more memory than the file does.
    """
    try:
        if not path.is_file():
            raise InputError(
                f"{path}: {WANTED}; found {'a folder' if path.is_dir() else 'no file'}"
            )
        if path.stat().st_size > MOST_BYTES:
            raise InputError(
                f"{path}: wanted at most {format_mib(MOST_BYTES)}, found a larger file"
            )
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return loads(data, name=str(path))


def loads(data: bytes, *, name: str = "snapshot") -> tuple[Any, int]:
    """As `read`, of bytes; `name` is what errors call them."""
    collected = gc.isenabled()
    gc.disable()  # millions of dicts without a cycle: looking for cycles takes longer than reading
    try:
        if data[:2] == b"\x1f\x8b":
            data = _gunzip(data, name)
        head = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if head in (b"{", b"["):
            return _json(data, name), len(data)
        if data[:1] == b"\x80" or head in (b"(", b"}", b"]"):
            return _unpickle(data, name), len(data)
    except (MemoryError, RecursionError, OverflowError):
        raise InputError(f"{name}: {WANTED}; found one nested too deeply or too large") from None
    finally:
        if collected:
            gc.enable()
    raise InputError(f"{name}: {WANTED}; found neither")


def dump(path: Path, snapshot: dict[str, Any]) -> None:
    """Write a snapshot whole or not at all: JSON for .json, a pickle for other names; gzipped for .gz."""
    packed = path.suffix == ".gz"
    kind = Path(path.stem).suffix if packed else path.suffix
    if kind == ".json":
        data = json.dumps(snapshot, separators=(",", ":")).encode()
    else:
        data = pickle.dumps(snapshot, protocol=4)
    # no time in the header: the same snapshot is the same bytes
    write_bytes(path, gzip.compress(data, mtime=0) if packed else data)


def _gunzip(data: bytes, name: str) -> bytes:
    most = min(max(FREE_BYTES, MOST_RATIO * len(data)), MOST_BYTES)
    parts = []
    total = 0
    left = data
    try:
        while left[:2] == b"\x1f\x8b":
            unpacker = zlib.decompressobj(wbits=31)
            part = unpacker.decompress(left, most - total + 1)
            total += len(part)
            if total > most:
                raise InputError(
                    f"{name}: {format_mib(len(data))} of gzip unpack to more than {format_mib(most)}, "
                    "which no recording does; unpack it yourself if it is one"
                )
            if not unpacker.eof:
                raise InputError(f"{name}: wanted a whole gzip file, found one that is cut off")
            parts.append(part)
            left = unpacker.unused_data
    except zlib.error as error:
        raise InputError(f"{name}: wanted a gzip file, found a damaged one: {error}") from None
    return b"".join(parts)


def _json(data: bytes, name: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=_no_constant)
    except ValueError as error:
        raise InputError(f"{name}: {WANTED}; found damaged JSON: {error}") from None


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


# --- pickle -------------------------------------------------------------------------------------------------------

# opcodes with their arguments that only push, pop or put together what is there
_PLAIN = (
    rb"[\x80][\x00-\x05]|\x95.{8}"  # PROTO, FRAME
    rb"|[()\]}Natues0\x31\x32\x85-\x89\x90\x94]"  # containers, None, bools, MARK, MEMOIZE, POP, DUP, STOP
    rb"|[Khq].|M..|[Jj].{4}|G.{8}"  # small numbers, BINGET, BINPUT
    rb"|\x8a(?:\x00|\x01.|\x02..|\x03.{3}|\x04.{4}|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}|\x09.{9})"  # LONG1
)
_LENGTHS = {  # opcode: bytes of its length, which precedes that many bytes
    0x8C: 1,  # SHORT_BINUNICODE
    0x58: 4,  # BINUNICODE
    0x8D: 8,  # BINUNICODE8
    0x55: 1,  # SHORT_BINSTRING
    0x54: 4,  # BINSTRING
    0x43: 1,  # SHORT_BINBYTES
    0x42: 4,  # BINBYTES
    0x8E: 8,  # BINBYTES8
    0x96: 8,  # BYTEARRAY8
}
_LINES = b"ILFSVgp"  # opcodes of protocol 0, whose argument ends with the line
_CLASSES = {
    0x63: "GLOBAL",
    0x93: "STACK_GLOBAL",
    0x52: "REDUCE",
    0x62: "BUILD",
    0x69: "INST",
    0x6F: "OBJ",
    0x81: "NEWOBJ",
    0x92: "NEWOBJ_EX",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
    0x50: "PERSID",
    0x51: "BINPERSID",
}
_STOP = 0x2E
_CONTAINERS = b"dl\x8f\x91"  # rare ones: DICT, LIST, EMPTY_SET, FROZENSET
_LARGEST_INT = 64  # bytes of one int
_BYTES_PER_CONTAINER = 8  # a dict of a recording takes 20 bytes and more
_SPARE_CONTAINERS = 4096


class _Unpickler(pickle.Unpickler):
    """Knows no class at all."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: object) -> NoReturn:
        raise pickle.UnpicklingError("it refers to something outside")


def _unpickle(data: bytes, name: str) -> Any:
    _look_over(data, name)
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
    ) as error:
        raise InputError(f"{name}: {WANTED}; found a damaged pickle: {error}") from None


def _look_over(data: bytes, name: str) -> None:
    """Nothing, if every opcode up to STOP is harmless; InputError otherwise."""
    size = len(data)
    most = size // _BYTES_PER_CONTAINER + _SPARE_CONTAINERS
    run = re.compile(rb"(?:%s|r..%s){0,4096}" % (_PLAIN, _index_bytes(size)), re.DOTALL)
    position = containers = 0
    if max(data.count(b"}"), data.count(b"]")) > most:
        containers = most + 1
    while containers <= most:
        found = run.match(data, position)
        assert found is not None  # it matches nothing, too
        if found.end() > position:
            position = found.end()
            continue
        if position >= size:
            raise InputError(f"{name}: {WANTED}; found a pickle that is cut off")
        code = data[position]
        if code == _STOP:
            return
        containers += code in _CONTAINERS
        position = _argument_end(data, position, name)
    raise InputError(f"{name}: {WANTED}; found a pickle of almost nothing but empty containers")


def _argument_end(data: bytes, position: int, name: str) -> int:
    """Where the opcode at `position` ends, of those with an argument of its own length."""
    code, start = data[position], position + 1
    if code in _CONTAINERS:
        return start
    if code in _LENGTHS:
        count = _LENGTHS[code]
        end = start + count + int.from_bytes(data[start : start + count], "little")
    elif code in (0x8A, 0x8B):  # LONG1, LONG4
        count = 1 if code == 0x8A else 4
        length = int.from_bytes(data[start : start + count], "little")
        if length > _LARGEST_INT:
            raise InputError(f"{name}: {WANTED}; found an integer of {length} bytes")
        end = start + count + length
    elif code in _LINES:
        end = data.find(b"\n", start) + 1
        line = data[start : end - 1]
        if code in b"ILp" and (
            len(line) > 3 * _LARGEST_INT or (code == 0x70 and not _index(line, data))
        ):
            raise InputError(f"{name}: {WANTED}; found an integer out of range")
    elif code in _CLASSES:
        raise InputError(
            f"{name}: wanted a pickle of built-in containers and scalars, found the opcode {_CLASSES[code]}, "
            "which makes objects of other kinds; nothing was run"
        )
    else:
        raise InputError(f"{name}: {WANTED}; found a pickle with the opcode {code:#04x}")
    if not start <= end <= len(data):
        raise InputError(f"{name}: {WANTED}; found a pickle that is cut off")
    return end


def _index(line: bytes, data: bytes) -> bool:
    return line.isdigit() and int(line) <= len(data)


def _index_bytes(size: int) -> bytes:
    """A pattern for the upper two bytes of a memo index: there are no more entries than bytes in the file."""
    if size < 1 << 24:
        return b"[\\x00-\\x%02x]\\x00" % (size >> 16)
    return b".[\\x00-\\x%02x]" % (size >> 24 & 0xFF)
