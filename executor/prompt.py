"""The prompt as token ids and positions, and new tokens back as text."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.errors import CheckpointError, InputError
from planner.plan.shapes import Image, TokenIds

# Qwen2.5-VL's chat template for one user turn; planner/workload.py counts the same pieces
SYSTEM_TEXT = "system\nYou are a helpful assistant."
USER_TEXT = "user\n"
ASSISTANT_TEXT = "assistant\n"


def load_tokenizer(path: Path) -> Any:
    """The `tokenizers.Tokenizer` of a checkpoint's tokenizer.json (or of the directory that holds it).

    CheckpointError where the file is missing or damaged. Control tokens written out in a text (`<|image_pad|>`) are
    encoded as the characters they are. The last one is kept for the next call with the same content: tokenizers
    (0.23) leaves memory behind for each one that is made and used, 1 to 4 KB with 600 words and more with 150,000.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; download the checkpoint's tokenizer.json")
    try:
        # not the time of its change: two within one tick of the clock look the same
        content = hashlib.sha256()
        with open(file, "rb") as opened:
            while piece := opened.read(2**18):
                content.update(piece)
        return _tokenizer(file, content.digest())
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(
            f"{file}: cannot be read as a tokenizer ({error}); download it again"
        ) from None


@lru_cache(maxsize=1)
def _tokenizer(file: Path, content: bytes) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def build_prompt(
    tokenizer: Any, text: str, images: Sequence[Image], token_ids: TokenIds
) -> list[int]:
    """Ids of the whole prompt: system text, then one user turn with the images before the text, then the assistant's start.

    Each image is vision_start, one pad per image token, vision_end. Control tokens enter by id, so nothing that the
    user writes can become one. InputError for an empty text.
    """
    if not text.strip():
        raise InputError("--prompt: wanted a question, found an empty text")
    start, end = _control(tokenizer, "<|im_start|>"), _control(tokenizer, "<|im_end|>")

    def encode(piece: str) -> list[int]:
        try:
            ids: list[int] = tokenizer.encode(piece, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):  # lone surrogates
            raise InputError("--prompt: wanted UTF-8 text, found bytes that are not") from None
        except Exception as error:  # tokenizers raises nothing narrower
            raise CheckpointError(
                f"tokenizer.json: cannot encode text ({error}); download the checkpoint's again"
            ) from None
        return ids

    newline = encode("\n")
    pads: list[int] = []
    for image in images:
        pads += [token_ids.vision_start, *[token_ids.image] * image.tokens, token_ids.vision_end]
    # without images no control token stands between them, and the tokenizer may merge across
    user = [*encode(USER_TEXT), *pads, *encode(text)] if images else encode(USER_TEXT + text)
    ids = [start, *encode(SYSTEM_TEXT), end, *newline, start, *user, end, *newline, start]
    ids += encode(ASSISTANT_TEXT)
    if ids.count(token_ids.image) != sum(image.tokens for image in images):
        raise CheckpointError(
            "tokenizer.json: its <|image_pad|> is not marked special, so that text could pose as an image; "
            "download the checkpoint's tokenizer.json again"
        )
    return ids


def _control(tokenizer: Any, token: str) -> int:
    number: int | None = tokenizer.token_to_id(token)
    if number is None:
        raise CheckpointError(
            f"tokenizer.json: wanted a token {token}, found none; it is not Qwen2.5-VL's, download it again"
        )
    return number


def positions(
    ids: Sequence[int], images: Sequence[Image], token_ids: TokenIds
) -> tuple[npt.NDArray[np.int64], int]:
    """M-RoPE positions (3, S) on the axes (time, row, column), and rope_delta: new token i stands at S + i + rope_delta.

    Text counts up on all axes at once. An image that begins at p has time p, rows p + 0..., columns p + 0... over its
    merged grid, and the text after it goes on at p + the longer side. Source: Wang et al. 2024, arXiv:2409.12191.
    """
    found = np.asarray(ids, dtype=np.int64)
    result = np.empty((3, len(ids)), dtype=np.int64)
    here = place = 0  # in ids; in position
    is_pad = found == token_ids.image
    for image in images:
        pads = np.flatnonzero(is_pad[here:])
        begin = here + int(pads[0]) if pads.size else len(ids)
        stop = begin + image.tokens
        if stop > len(ids) or not is_pad[begin:stop].all():
            raise InputError(
                f"{image.name}: wanted {image.tokens} image tokens in a row in the prompt, found fewer"
            )
        result[:, here:begin] = np.arange(place, place + begin - here)
        place += begin - here
        rows, cols = image.rows // 2, image.cols // 2
        result[0, begin:stop] = place
        result[1, begin:stop] = place + np.arange(rows).repeat(cols)
        result[2, begin:stop] = place + np.tile(np.arange(cols), rows)
        place += max(rows, cols)
        here = stop
    if is_pad[here:].any():
        raise InputError(f"wanted image tokens of {len(images)} images in the prompt, found more")
    result[:, here:] = np.arange(place, place + len(ids) - here)
    delta = int(result.max()) + 1 - len(ids) if len(ids) else 0
    return result, delta


class Detokenizer:
    """Text as tokens come: characters appear once all their bytes are there."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {
            number: "" if token.special else token.content
            for number, token in tokenizer.get_added_tokens_decoder().items()
        }
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this token completes; nothing for control tokens and ids beyond the vocabulary."""
        if token in self._added:
            return self._decoder.decode(self._added[token].encode("utf-8"))
        piece: str | None = self._tokenizer.id_to_token(token) if token >= 0 else None
        if piece is None:
            return ""
        return self._decoder.decode(bytes_of(piece))

    def finish(self) -> str:
        """What is left of a character that never became whole, as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary. Source: GPT-2's encoder.py."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {byte: chr(byte) for byte in plain}
    others = (byte for byte in range(256) if byte not in alphabet)
    alphabet.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return [alphabet[byte] for byte in range(256)]


_BYTES = {character: byte for byte, character in enumerate(byte_alphabet())}


def bytes_of(piece: str) -> bytes:
    """The bytes that an entry of a byte-level vocabulary stands for."""
    try:
        return bytes([_BYTES[character] for character in piece])
    except KeyError:  # not byte-level: an entry that is its own text
        return piece.encode("utf-8")
