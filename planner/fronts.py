"""Tile choices of a phase, reduced to their Pareto front of (transient bytes, seconds).

Kinds of steps never run at the same time, so a phase's transient bytes are the maximum over its kinds and its seconds
the sum. For every limit on bytes each kind takes its fastest tile below the limit; the distinct results are the front.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from planner.plan import Kind, Phase, Tiles
from planner.problem import Problem

ROWS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
WINDOW_ROWS = (64, 256, 512, 1024, 2048, 4096)
PATCH_ROWS = (256, 1024, 4096)
MERGER_ROWS = (64, 256, 1024, 4096)
VOCABULARY_ROWS = (2**20, 65536, 16384, 4096)

START = Tiles(
    patch_rows=1024,
    window_rows=1024,
    query_rows=1024,
    query_heads=1,
    vision_mlp_rows=1024,
    merger_rows=1024,
    prompt_rows=1024,
    prompt_heads=1,
    prompt_mlp_rows=1024,
    vocabulary_rows=1,
)


class Option(NamedTuple):
    """One tile setting of one kind of step: bytes of one step, seconds of all of the phase's steps of that kind."""

    bytes: int
    outside: int
    seconds: float
    tiles: dict[str, int]


class Point(NamedTuple):
    """One point of a phase's front; `outside` is the most that any of its steps takes outside the arena."""

    bytes: int
    outside: int
    seconds: float
    tiles: dict[str, int]


def front(kinds: Iterable[Sequence[Option]], cap: int | None) -> list[Point]:
    """Pareto front, fewest bytes first, seconds strictly falling; of options within `cap` bytes outside the arena, where a kind has one."""
    options = []
    for kind in kinds:
        within = [o for o in kind if cap is None or o.outside <= cap]
        options.append(within or [min(kind, key=lambda o: o.outside)])
    floor = max((min(o.bytes for o in kind) for kind in options), default=0)
    limits = sorted({o.bytes for kind in options for o in kind if o.bytes >= floor})
    points: list[Point] = []
    for limit in limits:
        chosen = [min((o for o in kind if o.bytes <= limit), key=_fastest) for kind in options]
        seconds = sum(option.seconds for option in chosen)
        if points and seconds >= points[-1].seconds:
            continue
        tiles: dict[str, int] = {}
        for option in chosen:
            tiles.update(option.tiles)
        most = max(option.outside for option in chosen)
        points.append(Point(max(option.bytes for option in chosen), most, seconds, tiles))
    return points


def _fastest(option: Option) -> tuple[float, int]:
    return (option.seconds, option.bytes)


def vision_front(
    problem: Problem,
    groups: Sequence[tuple[int, ...]],
    extra: dict[Kind, int],
    cap: int | None = None,
) -> list[Point]:
    """Front of the vision phase; `extra` bytes are alive besides during steps of a kind."""
    shape = problem.model.vision
    full = len(shape.full_attention_blocks)
    counts: dict[Kind, int] = {
        "patch_embed": 1,
        "window_attn": shape.depth - full,
        "full_attn": full,
        "vision_mlp": shape.depth,
        "merger": 1,
    }
    heads = _divisors(shape.heads) if problem.on_cpu else [shape.heads]
    settings: dict[Kind, list[dict[str, int]]] = {
        "patch_embed": [{"patch_rows": r} for r in PATCH_ROWS],
        "window_attn": [{"window_rows": r} for r in WINDOW_ROWS],
        "full_attn": [{"query_rows": r, "query_heads": h} for r in ROWS for h in heads],
        "vision_mlp": [{"vision_mlp_rows": r} for r in ROWS],
        "merger": [{"merger_rows": r} for r in MERGER_ROWS],
    }
    largest = max(image.patches for image in problem.workload.images)
    limits = {"merger": largest // 4}
    kinds = (
        [
            _option(problem, kind, "vision", groups, setting, counts[kind], extra.get(kind, 0))
            for setting in _distinct(settings[kind], limits.get(kind, largest), problem)
        ]
        for kind in settings
        if counts[kind]
    )
    return front(kinds, cap)


def prefill_front(problem: Problem, cap: int | None = None) -> list[Point]:
    """Front of the prefill phase."""
    text = problem.model.text
    heads = _divisors(text.kv_heads) if problem.on_cpu else [text.kv_heads]
    settings: dict[Kind, list[dict[str, int]]] = {
        "self_attn": [{"prompt_rows": r, "prompt_heads": h} for r in ROWS for h in heads],
        "text_mlp": [{"prompt_mlp_rows": r} for r in ROWS],
    }
    kinds = (
        [
            _option(problem, kind, "prefill", [()], setting, text.layers, 0)
            for setting in _distinct(settings[kind], problem.workload.prompt_tokens, problem)
        ]
        for kind in settings
    )
    return front(kinds, cap)


def _option(
    problem: Problem,
    kind: Kind,
    phase: Phase,
    groups: Sequence[tuple[int, ...]],
    setting: dict[str, int],
    count: int,
    extra: int,
) -> Option:
    tiles = START.model_copy(update=setting)
    sizes = [problem.transient(kind, phase, tiles, group) for group in groups]
    seconds = sum(problem.seconds(kind, phase, tiles, group, 0) for group in groups) * count
    size, outside = max(s for s, _ in sizes) + extra, max(o for _, o in sizes)
    return Option(size, outside, seconds, setting)


def _distinct(
    settings: Sequence[dict[str, int]], rows: int, problem: Problem
) -> list[dict[str, int]]:
    """Settings whose tiles differ for this many rows; only the pinned one where the request pins tiles."""
    pinned = problem.request.tiles
    if pinned is not None:
        return [{key: getattr(pinned, key) for key in settings[0]}]
    kept: dict[tuple[int, ...], dict[str, int]] = {}
    for setting in settings:
        key = tuple(min(v, rows) if k.endswith("_rows") else v for k, v in setting.items())
        kept.setdefault(key, setting)
    return list(kept.values())


def _divisors(count: int) -> list[int]:
    return [n for n in range(count, 0, -1) if count % n == 0]
