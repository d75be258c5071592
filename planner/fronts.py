"""The lists of tiles, and of each kind of step the fastest tile that fits.

Kinds of steps never run at once: what is alive beside a kind's scratch does not depend on the tiles of the others. On
a card what kernels take outside the arena stays reserved: one cap on it holds for all kinds, and under it each kind
takes its own fastest. On the CPU it counts with its step alone, but the pages of the scratch of steps before are still
there: the fastest of all combinations that fit is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from planner.buffers import VISION_KINDS
from planner.plan.tiles import Tiles
from planner.plan.words import Kind, Phase
from planner.problem import Problem
from planner.workspace import gemm_shapes

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
    """One tile setting of one kind of step: seconds of all of the phase's steps of that kind with its `start`, bytes of one of them.

    `bytes`: its scratch in the arena. `outside`: the most that its blocks outside it take, and `blocks` of each group of
    images. `kept`: what the CPU's library keeps for its products. `start`: by how many seconds the run starts later
    than with the setting of that kind with which it starts soonest.
    """

    seconds: float
    bytes: int
    outside: int
    tiles: Mapping[str, int]
    kept: int
    blocks: Mapping[tuple[int, ...], int]
    start: float = 0.0


Options = Mapping[Kind, Sequence[Option]]


def vision_options(problem: Problem, groups: Sequence[tuple[int, ...]]) -> Options:
    """Of each kind of vision step its options, the fastest first; none that another beats in everything."""
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
    if not groups:
        return {}
    largest = max(image.patches for image in problem.workload.images)
    rows = dict.fromkeys(settings, largest) | {"merger": largest // 4}
    if len(groups) == 1:
        rows["vision_mlp"] = sum(image.patches for image in problem.workload.images)
    return {
        kind: _options(
            problem,
            kind,
            "vision",
            groups,
            _distinct(settings[kind], rows[kind], problem),
            counts[kind],
        )
        for kind in settings
        if counts[kind]
    }


def prefill_options(problem: Problem) -> Options:
    """The same for the language model over the prompt."""
    text, rows = problem.model.text, problem.workload.prompt_tokens
    heads = _divisors(text.kv_heads) if problem.on_cpu else [text.kv_heads]
    settings: dict[Kind, list[dict[str, int]]] = {
        "self_attn": [{"prompt_rows": r, "prompt_heads": h} for r in ROWS for h in heads],
        "text_mlp": [{"prompt_mlp_rows": r} for r in ROWS],
    }
    return {
        kind: _options(
            problem, kind, "prefill", [()], _distinct(settings[kind], rows, problem), text.layers
        )
        for kind in settings
    }


def fastest(
    options: Options, base: Mapping[Kind, int], room: float, cap: float
) -> dict[str, int] | None:
    """Of each kind the fastest tiles beside `base` bytes within `room`, and within `cap` outside the arena; None where a kind has none."""
    tiles: dict[str, int] = {}
    for kind, found in options.items():
        left = room - base[kind]
        chosen = next((o for o in found if o.bytes <= left and o.outside <= cap), None)
        if chosen is None:
            return None
        tiles.update(chosen.tiles)
    return tiles


Still = Mapping[tuple[Kind, Kind, tuple[int, ...]], int]  # planner.parts.Frame.still
Taken = Mapping[Kind, tuple[int, int]]  # scratch and blocks outside the arena


def fastest_held(
    options: Options, still: Still, room: float, fixed: Taken | None = None
) -> dict[str, int] | None:
    """On the CPU: the fastest combination of tiles with which no step holds more than `room`, in its blocks and the scratch of steps before; None where there is none.

    `fixed`: kinds of steps without options.
    """
    fixed = fixed or {}
    kinds = list(options)
    scratch = dict.fromkeys(kinds, room)  # of each kind at most
    outside: list[tuple[Kind, tuple[int, ...], float]] = []
    pairs: dict[tuple[Kind, Kind], list[tuple[tuple[int, ...], float]]] = {}
    for (before, kind, images), held in still.items():
        left = room - held
        if before in fixed and kind in fixed:
            if left < fixed[before][0] + fixed[kind][1]:
                return None
        elif kind in fixed:
            scratch[before] = min(scratch[before], left - fixed[kind][1])
        elif before in fixed:
            outside.append((kind, images, left - fixed[before][0]))
        else:
            pairs.setdefault((before, kind), []).append((images, left))
    found: list[Sequence[Option]] = []
    for kind in kinds:
        mine = [(images, left) for k, images, left in outside if k == kind]
        own = pairs.get((kind, kind), ())
        fitting = [
            option
            for option in options[kind]
            if option.bytes <= scratch[kind]
            and all(option.blocks[images] <= left for images, left in mine)
            and all(option.bytes + option.blocks[images] <= left for images, left in own)
        ]
        if not fitting:
            return None
        found.append(fitting)
    best = _combined(found, kinds, pairs)
    if best is None:
        return None
    tiles: dict[str, int] = {}
    for option in best:
        tiles.update(option.tiles)
    return tiles


def _combined(
    found: Sequence[Sequence[Option]],
    kinds: Sequence[Kind],
    pairs: Mapping[tuple[Kind, Kind], Sequence[tuple[tuple[int, ...], float]]],
) -> list[Option] | None:
    """Of each kind one option, fastest in all, so that those of each pair go together."""
    rest = [0.0]  # seconds of the fastest of all later kinds
    for each in reversed(found):
        rest.insert(0, rest[0] + each[0].seconds)
    best: list[Option] | None = None
    least = float("inf")
    chosen: list[Option] = []

    def goes(option: Option) -> bool:
        place = len(chosen)
        for number, other in enumerate(chosen):
            for images, left in pairs.get((kinds[number], kinds[place]), ()):
                if other.bytes + option.blocks[images] > left:
                    return False
            for images, left in pairs.get((kinds[place], kinds[number]), ()):
                if option.bytes + other.blocks[images] > left:
                    return False
        return True

    def choose(seconds: float) -> None:
        nonlocal best, least
        place = len(chosen)
        if place == len(found):
            best, least = list(chosen), seconds
            return
        for option in found[place]:
            if seconds + option.seconds + rest[place + 1] >= least:
                break
            if goes(option):
                chosen.append(option)
                choose(seconds + option.seconds)
                chosen.pop()

    choose(0.0)
    return best


def least_seconds(options: Options, cap: float) -> float:
    """Seconds of all steps with the fastest tiles within `cap` bytes outside the arena."""
    return sum(
        next((o.seconds for o in found if o.outside <= cap), float("inf"))
        for found in options.values()
    )


def caps(problem: Problem, *options: Options) -> list[float]:
    """Every limit on bytes outside the arena that makes a difference, the largest first; on the CPU none does."""
    if problem.on_cpu:
        return [float("inf")]
    kinds = [found for each in options for found in each.values()]
    least = max((min(o.outside for o in found) for found in kinds), default=0)
    distinct = {o.outside for found in kinds for o in found if o.outside >= least} | {least}
    return sorted(distinct, reverse=True)


def _options(
    problem: Problem,
    kind: Kind,
    phase: Phase,
    groups: Sequence[tuple[int, ...]],
    settings: Sequence[Mapping[str, int]],
    count: int,
) -> list[Option]:
    found = []
    whole = {"vocabulary_rows": problem.model.text.vocabulary}
    starts = [problem.start_s(START.model_copy(update=whole | dict(s))) for s in settings]
    for setting, start in zip(settings, starts, strict=True):
        start -= min(starts)
        tiles = START.model_copy(update=dict(setting))
        taken = {group: problem.taken(kind, phase, tiles, group) for group in groups}
        steps = sum(problem.seconds(kind, phase, tiles, group, 0) for group in groups) * count
        blocks = {group: outside for group, (_, outside) in taken.items()}
        kept_bytes = problem.kept_for(products(problem, kind, tiles))
        # one buffer for all groups, each group's own blocks
        scratch = max(size for size, _ in taken.values())
        largest = max(blocks.values())
        found.append(Option(steps + start, scratch, largest, setting, kept_bytes, blocks, start))
    found.sort(key=lambda o: (o.seconds, o.bytes, o.outside, o.kept))
    kept: list[Option] = []
    for option in found:
        if not any(
            o.bytes <= option.bytes
            and o.kept <= option.kept
            and all(size <= option.blocks[group] for group, size in o.blocks.items())
            for o in kept
        ):
            kept.append(option)
    return kept


def products(problem: Problem, kind: Kind, tiles: Tiles) -> frozenset[tuple[int, int, int]]:
    """The products of a kind's steps, whichever way images are handled."""
    if not problem.on_cpu:
        return frozenset()
    images = problem.workload.images if kind in VISION_KINDS else ()
    return gemm_shapes(kind, problem.model, tiles, images, problem.workload.prompt_tokens)


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
