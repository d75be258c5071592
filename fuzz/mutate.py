"""Spoilt input: bytes changed anywhere, or values changed inside what the bytes mean. All from one generator, so repeatable."""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Sequence
from random import Random
from typing import Any

NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 255, 256, 1000, 65535, 65536, 2**20, 2**31 - 1, 2**31, 2**32),
    *(2**40, 2**53, 2**53 + 1, 2**60, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**19, 10**30),
)
WORDS = (
    "",
    " ",
    "\0",
    "a",
    "x" * 300,
    "é",
    "\u202e",
    "../..",
    "/dev/zero",
    "nan",
    "-1",
    "%s%n",
    "{}",
)
LITERALS = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"-0.0",
    b"1e-400",
    b"9" * 400,
    b"null",
    b"[[[[",
    b"\xff",
)
_DIGITS = re.compile(rb"[0-9]+")


def spoil_bytes(data: bytes, chance: Random, others: Sequence[bytes] = ()) -> bytes:
    """A few changes that know nothing of what the bytes mean."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(made) + 1)
        end = min(len(made), at + chance.choice((1, 1, 2, 4, 8, 32, 200)))
        kind = chance.randrange(11)
        if kind == 0 and at < len(made):
            made[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and at < len(made):
            made[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        elif kind == 2:
            del made[at:end]
        elif kind == 3:
            made[at:at] = made[at:end] * chance.choice((1, 2, 50))
        elif kind == 4:
            made[at:at] = chance.randbytes(chance.choice((1, 3, 16)))
        elif kind == 5:
            del made[at:]
        elif kind == 6:
            width = chance.choice((1, 2, 4, 8))
            number = chance.choice(NUMBERS) % (1 << 8 * width)
            made[at : at + width] = number.to_bytes(width, chance.choice(("little", "big")))
        elif kind == 7:
            found = list(_DIGITS.finditer(made))
            if found:
                match = chance.choice(found)
                made[match.start() : match.end()] = str(chance.choice(NUMBERS)).encode()
        elif kind == 8:
            made[at:end] = chance.choice(LITERALS)
        elif kind == 9 and others:
            other = chance.choice(others)
            start = chance.randrange(len(other) + 1)
            made[at:end] = other[start : start + chance.choice((4, 32, 400))]
        elif kind == 10 and len(made) > 1:
            other_at = chance.randrange(len(made))
            made[at:end], made[other_at : other_at + 1] = (
                made[other_at : other_at + 1],
                made[at:end],
            )
    return bytes(made[: 4 * len(data) + 4096])


def spoil_value(value: Any, chance: Random) -> Any:
    """JSON data with a few values changed, keys dropped or renamed; `value` itself is changed where it can be."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        value = _spoil_once(value, chance)
    return value


def _spoil_once(value: Any, chance: Random) -> Any:
    where: Any = value
    path: list[tuple[Any, Any]] = []
    while isinstance(where, dict | list) and where and (not path or chance.random() < 0.85):
        key = (
            chance.choice(list(where)) if isinstance(where, dict) else chance.randrange(len(where))
        )
        path.append((where, key))
        where = where[key]
    if not path:
        return _instead(value, chance)
    holder, key = path[-1]
    kind = chance.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[chance.choice((*WORDS, key.upper(), key + "s"))] = holder.pop(key)
    elif kind == 2 and isinstance(holder, list):
        holder.insert(chance.randrange(len(holder) + 1), holder[chance.randrange(len(holder))])
    elif kind == 3 and len(path) > 1:
        other, name = chance.choice(path[:-1])
        holder[key] = _plain(other[name]) if chance.random() < 0.3 else name
    elif kind == 4 and isinstance(holder, list):
        chance.shuffle(holder)
    else:
        holder[key] = _instead(holder[key], chance)
    return value


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _instead(old: Any, chance: Random) -> Any:
    if isinstance(old, int) and not isinstance(old, bool) and chance.random() < 0.6:
        return chance.choice(
            (old + 1, old - 1, old * 2, old // 2, -old, *NUMBERS[:6], chance.choice(NUMBERS))
        )
    if isinstance(old, str) and chance.random() < 0.5:
        return chance.choice((old + "x", old[:-1], old * 2, old.upper(), chance.choice(WORDS)))
    return chance.choice(
        (
            *(
                None,
                True,
                False,
                0,
                -1,
                0.5,
                float("inf"),
                float("nan"),
                1e308,
                "",
                [],
                {},
                [[]],
                {"": 0},
            ),
            *(
                chance.choice(NUMBERS),
                chance.choice(WORDS),
                [old],
                [old, old],
                {"a": old},
                [0] * 40,
            ),
            str(old)[:50],
        )
    )


def as_json(value: Any, chance: Random) -> bytes:
    """The value as JSON text; now and then with a key that is there twice, or nested deeply."""
    text = json.dumps(value)
    kind = chance.randrange(40)
    if kind == 0 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]
    elif kind == 1:
        depth = chance.choice((10, 1000, 20000))
        text = "[" * depth + text + "]" * depth
    return text.encode()


def spoil_png(data: bytes, chance: Random) -> bytes:
    """One chunk of a PNG changed, its checksum made right again."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    index = 0 if chance.random() < 0.4 else chance.randrange(len(chunks))
    kind, body = chunks[index]
    if chance.random() < 0.2:
        kind = chance.choice(
            (
                b"IHDR",
                b"IDAT",
                b"iCCP",
                b"zTXt",
                b"eXIf",
                b"acTL",
                b"fcTL",
                b"tRNS",
                b"PLTE",
                b"sRGB",
            )
        )
    chunks[index] = (kind, spoil_bytes(body, chance))
    if chance.random() < 0.2:
        chunks.insert(chance.randrange(len(chunks)), chance.choice(chunks))
    made = [data[:8]]
    for kind, body in chunks:
        made.append(struct.pack(">I", len(body)) + kind + body)
        made.append(struct.pack(">I", zlib.crc32(kind + body)))
    return b"".join(made)
