"""How finely: rows at once by kind of step, and how a tile cuts rows, windows and the rest of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from planner.plan.shapes import WindowRun
from planner.plan.words import Frozen


class Tiles(Frozen):
    """Rows processed at once, by kind of step; the last tile of a run may be short."""

    patch_rows: int
    window_rows: int
    query_rows: int
    query_heads: int  # heads per attention call in full-attention vision blocks
    vision_mlp_rows: int
    merger_rows: int  # image tokens
    prompt_rows: int
    prompt_heads: int  # key/value heads per attention call in prefill
    prompt_mlp_rows: int
    vocabulary_rows: int


class WindowTile(NamedTuple):
    """Rows `[start, stop)` of one image, made of whole windows: `runs` of (count, rows), in order."""

    start: int
    stop: int
    runs: tuple[tuple[int, int], ...]


def spans(rows: int, tile: int) -> Iterator[tuple[int, int]]:
    """`[start, stop)` of each tile over `rows` rows; the last one may be short."""
    for start in range(0, rows, tile):
        yield start, min(start + tile, rows)


def question_tile(tile: int, start: int, prompt_tokens: int, more: int) -> int:
    """Rows at once of what follows row `start` of a prompt: `tile`, or the most below it with which the last tile, filled up, ends within `more` rows behind the prompt."""
    left = prompt_tokens - start
    room = min(left + more, prompt_tokens)
    count = -(-left // tile)
    while count * tile > room:
        tile = -(-left // count)
        count += 1 if count * tile > room else 0
    return tile


def window_tiles(windows: tuple[WindowRun, ...], tile_rows: int) -> tuple[WindowTile, ...]:
    """Tiles of whole windows with at most `tile_rows` rows each, or one window where that is larger."""
    tiles: list[WindowTile] = []
    start = stop = 0
    runs: list[tuple[int, int]] = []
    for run in windows:
        left = run.count
        while left:
            room = (tile_rows - (stop - start)) // run.rows
            if room <= 0 and stop == start:
                room = 1
            take = min(left, room)
            if take > 0:
                runs.append((take, run.rows))
                stop += take * run.rows
                left -= take
            if left:
                tiles.append(WindowTile(start, stop, tuple(runs)))
                start, runs = stop, []
    if runs:
        tiles.append(WindowTile(start, stop, tuple(runs)))
    return tuple(tiles)
