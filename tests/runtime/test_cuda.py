"""What of the CUDA device can be tried without a card."""

from __future__ import annotations

from pathlib import Path

import pytest

from executor.device import Chunk
from executor.queues import pieces_of


@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 100, 1000])
def test_pinned_pieces_bring_every_byte_to_its_place(piece_bytes: int) -> None:
    stored = bytes(range(200))
    chunk = Chunk(Path("f"), 30, ((100, 164), (0, 36), (300, 301)))
    arena = bytearray(400)
    for part in pieces_of(chunk, piece_bytes):
        assert part.size_bytes <= piece_bytes
        piece = stored[part.offset_bytes : part.offset_bytes + part.size_bytes]
        for at, start, stop in part.moves:
            arena[start:stop] = piece[at : at + stop - start]
    assert arena[100:164] == stored[30:94]
    assert arena[0:36] == stored[94:130]
    assert arena[300:301] == stored[130:131]
    assert sum(arena) == sum(stored[30:131])
