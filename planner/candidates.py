"""Settings of the levers with their bytes and seconds in closed form, before any graph or layout is built.

    tile fronts → settings of the vision phase, settings of prefill and decode → their combinations

The lower bound of a phase is max(compute, bytes copied / link).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from planner.fronts import START, VOCABULARY_ROWS, Point, prefill_front, vision_front
from planner.plan import Kind, Tiles
from planner.problem import Problem, kv_bytes
from planner.schedule import Choice, PhaseResidency, spread

VISIONS = 4  # vision settings that are combined with every text setting

_LAYER: tuple[Kind, Kind] = ("self_attn", "text_mlp")


class Candidate(NamedTuple):
    """A setting with seconds of its parts, and its bytes by the closed form.

    `compute_s` and `copy_s` may overlap, in part (phases one after another) or wholly; `rest_s` is decode. Through one
    staging slot nothing is copied while what came through it computes: such compute and copies are `compute_s` both.
    `moved_s` are all copies' seconds: of candidates with equal bounds, more copies hide less surely.
    """

    compute_s: float
    copy_s: float
    rest_s: float
    moved_s: float
    bytes: int
    vision: Choice  # its vision part holds
    text: Choice  # its other parts hold, and the depth

    @property
    def bound_s(self) -> float:
        return max(self.compute_s, self.copy_s) + self.rest_s

    @property
    def choice(self) -> Choice:
        prompt = {
            key: value
            for key, value in self.text.tiles.model_dump().items()
            if key.startswith(("prompt_", "vocabulary_"))
        }
        return replace(
            self.text,
            images_together=self.vision.images_together,
            vision=self.vision.vision,
            tiles=self.vision.tiles.model_copy(update=prompt),
        )


def candidates(problem: Problem, allowance: int | None, cap: int | None) -> Iterator[Candidate]:
    """Settings that fit the allowance (arena and outside bytes at once) by the closed form."""
    visions = _vision_candidates(problem, allowance, cap)
    texts = _text_candidates(problem, allowance, cap)
    for vision, text in product(_shortest(visions), texts):
        yield Candidate(
            vision.compute_s + text.compute_s,
            vision.copy_s + text.copy_s,
            text.rest_s,
            vision.moved_s + text.moved_s,
            max(vision.bytes, text.bytes),
            vision.vision,
            text.text,
        )


@dataclass(frozen=True, slots=True)
class _Stack:
    """Sizes of a stack of blocks: `layers` times an attention and an MLP unit, and lm_head tiles behind it."""

    layers: int
    attn: int
    mlp: int
    heads: tuple[int, ...] = ()

    def sequence(
        self, attn: frozenset[int], mlp: frozenset[int], head: frozenset[int]
    ) -> list[int]:
        """Sizes of the streamed units in the order of use, given the residents' positions."""
        sizes = []
        for layer in range(self.layers):
            if layer not in attn:
                sizes.append(self.attn)
            if layer not in mlp:
                sizes.append(self.mlp)
        return sizes + [size for i, size in enumerate(self.heads) if i not in head]


def _slots_bytes(sizes: Sequence[int], depth: int) -> int:
    """Bytes of `depth` staging slots that these units use in turn."""
    return sum(max(sizes[slot::depth]) for slot in range(min(depth, len(sizes))))


def _shortest(visions: Sequence[Candidate]) -> list[Candidate]:
    """Of each vision residency and way of handling images, the shortest; the shortest few of these."""
    best: dict[tuple[bool, PhaseResidency], Candidate] = {}
    for candidate in visions:
        key = (candidate.vision.images_together, candidate.vision.vision)
        if key not in best or (candidate.bound_s, candidate.bytes) < (
            best[key].bound_s,
            best[key].bytes,
        ):
            best[key] = candidate
    return sorted(best.values(), key=lambda c: (c.bound_s, c.bytes))[:VISIONS]


def _vision_candidates(problem: Problem, allowance: int | None, cap: int | None) -> list[Candidate]:
    """Per way of handling images, residency and depth: the fastest tiles that fit."""
    workload, model = problem.workload, problem.model
    shape = model.vision
    nothing = PhaseResidency(0, 0)
    if not workload.images:
        choice = Choice("vision_then_llm", True, 1, nothing, nothing, nothing, START)
        return [Candidate(0.0, 0.0, 0.0, 0.0, 0, choice, choice)]
    sizes = problem.unit_sizes(model.text.vocabulary)
    stack = _Stack(shape.depth, sizes["visual/blocks.0.attn"], sizes["visual/blocks.0.mlp"])
    ends = sizes["visual/patch_embed"], sizes["visual/merger"]
    element = problem.costs.element
    out = workload.prompt_tokens * model.text.hidden * element
    everything = tuple(range(len(workload.images)))
    modes = [[everything]] + ([[(i,) for i in everything]] if len(everything) > 1 else [])
    found = []
    for groups in modes:
        together = len(groups) == 1
        rows = max(sum(workload.images[i].patches for i in group) for group in groups)
        persistent = rows * shape.hidden * element + ends[0] + (0 if together else out + ends[1])
        extra: dict[Kind, int] = {"merger": out + ends[1] if together else 0}
        points = vision_front(problem, groups, extra, cap)
        # with one group every unit is used once: resident or streamed, it is copied once
        counts = {(0, 0), (shape.depth, shape.depth)}
        if not together:
            counts |= {
                (a, m) for a in range(0, shape.depth + 1, 4) for m in range(0, shape.depth + 1, 4)
            }
        for attn, mlp in sorted(counts):
            streamed = stack.sequence(
                spread(attn, shape.depth), spread(mlp, shape.depth), frozenset()
            )
            once = attn * stack.attn + mlp * stack.mlp
            moved = once + sum(streamed) * len(groups) + sum(ends)
            for depth in (1, 2, 3) if streamed else (1,):
                held = persistent + once + _slots_bytes(streamed, depth)
                point = _fastest(points, allowance, held)
                if point is None:
                    continue
                copy_s = problem.costs.copy(moved, first=True, cached=False)
                tiles = START.model_copy(update=point.tiles)
                residency = PhaseResidency(attn, mlp)
                choice = Choice(
                    "vision_then_llm", together, depth, residency, nothing, nothing, tiles
                )
                compute_s = point.seconds
                if streamed and depth == 1:
                    serial = _blocks_compute(problem, groups, tiles, residency)
                    copies = sum(streamed) * len(groups)
                    serial += problem.costs.copy(copies, first=True, cached=False)
                    compute_s = max(compute_s, serial)
                size = held + point.bytes
                found.append(Candidate(compute_s, copy_s, 0.0, copy_s, size, choice, choice))
    return found


def _blocks_compute(
    problem: Problem,
    groups: Sequence[tuple[int, ...]],
    tiles: Tiles,
    residency: PhaseResidency,
) -> float:
    """At least so many seconds do the streamed blocks of the vision tower compute."""
    depth, full = problem.model.vision.depth, len(problem.model.vision.full_attention_blocks)
    seconds = 0.0
    for group in groups:
        window, whole, mlp = (
            problem.seconds(kind, "vision", tiles, group, 0)
            for kind in ("window_attn", "full_attn", "vision_mlp")
        )
        if residency.attn:
            seconds += (depth - residency.attn) * min(window, whole)
        else:
            seconds += (depth - full) * window + full * whole
        seconds += (depth - residency.mlp) * mlp
    return seconds


def _fastest(points: Sequence[Point], allowance: int | None, held: int) -> Point | None:
    """The fastest point of a front beside `held` bytes."""
    if allowance is None:
        return points[-1]
    return next((p for p in reversed(points) if held + p.bytes <= allowance), None)


def _text_candidates(problem: Problem, allowance: int | None, cap: int | None) -> list[Candidate]:
    """Residency in prefill and decode, depth, prompt tiles, vocabulary tiles."""
    model, workload = problem.model, problem.workload
    text, element = model.text, problem.costs.element
    points = prefill_front(problem, cap)
    prompt_s = {
        point.seconds: tuple(
            problem.seconds(kind, "prefill", START.model_copy(update=point.tiles), (), 0)
            for kind in _LAYER
        )
        for point in points
    }
    cache = text.layers * kv_bytes(model, workload.context_tokens)
    x = workload.prompt_tokens * text.hidden * element
    repeats = workload.max_new_tokens - 1
    found: list[Candidate] = []
    pinned = problem.request.tiles
    choices = VOCABULARY_ROWS if pinned is None else (pinned.vocabulary_rows,)
    for vocabulary_rows in dict.fromkeys(min(r, text.vocabulary) for r in choices):
        if vocabulary_rows * text.hidden * element > problem.profile.max_tensor_bytes:
            continue
        sizes = problem.unit_sizes(vocabulary_rows)
        heads = tuple(size for unit, size in sizes.items() if unit.startswith("text/lm_head["))
        stack = _Stack(
            text.layers, sizes["text/layers.0.self_attn"], sizes["text/layers.0.mlp"], heads
        )
        total = sum(sizes[u] for u in sizes if u.startswith("text/"))
        bring = problem.costs.copy(total, first=True, cached=False)
        tiles_of = {
            point.seconds: START.model_copy(
                update=point.tiles | {"vocabulary_rows": vocabulary_rows}
            )
            for point in points
        }
        blocks = [*[stack.attn, stack.mlp] * text.layers, *heads]
        tiny = text.vocabulary * element + 8 * text.hidden * element
        compute = _decode_compute(problem, vocabulary_rows, len(heads)) if repeats else 0.0
        one = _decode_units(problem, vocabulary_rows)
        decode_held = cache + tiny + _decode_scratch(problem)
        prefill_held = cache + x + tiny
        for depth in (1, 2, 3):
            for head in (len(heads), 0) if repeats else (len(heads),):
                for mlp in range(text.layers, -1, -1) if repeats else (text.layers,):
                    decode = _largest_attn(stack, mlp, head, depth, allowance, decode_held, repeats)
                    if decode is None:
                        continue
                    residency, resident, streamed = decode
                    link = problem.costs.copy(streamed, first=False, cached=problem.cached)
                    per_token = max(compute, link)
                    if depth == 1:
                        left = text.layers - residency.attn, text.layers - mlp, len(heads) - head
                        serial = sum(count * unit for count, unit in zip(left, one, strict=True))
                        per_token = max(per_token, link + serial)
                    prefill = _prefill(
                        problem, stack, points, residency, depth, allowance, prefill_held
                    )
                    if prefill is None:
                        continue
                    point, first, missing, held = prefill
                    grow = problem.costs.copy(missing, first=False, cached=problem.cached)
                    rest = (grow if repeats else 0.0) + repeats * per_token
                    rest_copies = (grow if repeats else 0.0) + repeats * link
                    choice = Choice(
                        "vision_then_llm",
                        True,
                        depth,
                        PhaseResidency(0, 0),
                        first,
                        residency if repeats else first,
                        tiles_of[point.seconds],
                    )
                    size = max(held + point.bytes, decode_held + resident)
                    compute_s = point.seconds
                    if depth == 1:
                        kept = first.attn * stack.attn + first.mlp * stack.mlp
                        kept += sum(sorted(heads)[len(heads) - first.head :])
                        serial = problem.costs.copy(sum(blocks) - kept, first=True, cached=False)
                        attn_s, mlp_s = prompt_s[point.seconds]
                        serial += (text.layers - first.attn) * attn_s
                        compute_s = max(compute_s, serial + (text.layers - first.mlp) * mlp_s)
                    moved = bring + rest_copies
                    found.append(Candidate(compute_s, bring, rest, moved, size, choice, choice))
    return found


def _decode_compute(problem: Problem, vocabulary_rows: int, heads: int) -> float:
    tiles = START.model_copy(update={"vocabulary_rows": vocabulary_rows})
    layers = problem.model.text.layers
    seconds = layers * sum(
        problem.seconds(kind, "decode", tiles, (), 0) for kind in ("self_attn", "text_mlp")
    )
    seconds += heads * problem.seconds("lm_head", "decode", tiles, (), vocabulary_rows)
    return seconds + sum(
        problem.seconds(kind, "decode", tiles, (), 0) for kind in ("embed_tokens", "norm", "sample")
    )


def _decode_units(problem: Problem, vocabulary_rows: int) -> tuple[float, float, float]:
    """Seconds of one attention unit, one MLP unit and one (at least) lm_head tile in decode."""
    attn, mlp = (problem.seconds(kind, "decode", START, (), 0) for kind in _LAYER)
    rest = problem.model.text.vocabulary % vocabulary_rows or vocabulary_rows
    return attn, mlp, problem.seconds("lm_head", "decode", START, (), rest)


def _decode_scratch(problem: Problem) -> int:
    return max(problem.transient(kind, "decode", START, ())[0] for kind in _LAYER)


def _largest_attn(
    stack: _Stack,
    mlp: int,
    head: int,
    depth: int,
    allowance: int | None,
    held: int,
    repeats: int,
) -> tuple[PhaseResidency, int, int] | None:
    """Given resident MLPs and lm_head tiles: the most resident attention units, resident + staging bytes, streamed bytes."""
    heads = spread(head, len(stack.heads))
    head_bytes = sum(stack.heads[i] for i in heads)
    largest = stack.layers
    if allowance is not None:
        # one slot at least for what is streamed; from there count down
        slot = stack.mlp if mlp < stack.layers else 0
        room = (allowance - held - mlp * stack.mlp - head_bytes - slot) // stack.attn
        largest = min(largest, room)
    for attn in range(largest, -1, -1):
        resident = attn * stack.attn + mlp * stack.mlp + head_bytes
        if allowance is not None and held + resident > allowance:
            continue
        streamed = stack.sequence(spread(attn, stack.layers), spread(mlp, stack.layers), heads)
        if 0 < len(streamed) <= depth and repeats > 1:
            continue  # as many slots as units: they would be resident
        slots = _slots_bytes(streamed, depth) if streamed else 0
        if allowance is None or held + resident + slots <= allowance:
            return PhaseResidency(attn, mlp, head), resident + slots, sum(streamed)
    return None


def _prefill(
    problem: Problem,
    stack: _Stack,
    points: Sequence[Point],
    decode: PhaseResidency,
    depth: int,
    allowance: int | None,
    held: int,
) -> tuple[Point, PhaseResidency, int, int] | None:
    """The front's point and the residents of prefill with the fewest seconds: point, residency, bytes still missing in decode, bytes held."""
    best: tuple[float, Point, PhaseResidency, int, int] | None = None
    for point in reversed(points):
        found = _prefill_residents(stack, decode, depth, allowance, held + point.bytes)
        if found is None:
            continue
        residency, missing, size = found
        seconds = point.seconds + problem.costs.copy(missing, first=False, cached=problem.cached)
        if best is None or seconds < best[0]:
            best = (seconds, point, residency, missing, held + size)
        if not missing:
            break  # slower tiles could only leave more room, and none is needed
    return best[1:] if best else None


def _prefill_residents(
    stack: _Stack, decode: PhaseResidency, depth: int, allowance: int | None, held: int
) -> tuple[PhaseResidency, int, int] | None:
    """The most units of decode's resident ones that fit beside `held`: residency, bytes left out, bytes of residents and slots."""
    everything = decode.attn * stack.attn + decode.mlp * stack.mlp
    heads = len(stack.heads)
    streams_something = (decode.attn, decode.mlp, decode.head) != (
        stack.layers,
        stack.layers,
        heads,
    )
    largest = _slots_bytes([max(stack.attn, stack.mlp)] * depth, depth)
    for mlp in range(decode.mlp, -1, -1):
        for attn in (decode.attn, 0):
            for head in dict.fromkeys((decode.head, 0)):
                head_bytes = sum(stack.heads[:head])
                resident = attn * stack.attn + mlp * stack.mlp + head_bytes
                complete = (attn, mlp, head) == (decode.attn, decode.mlp, decode.head)
                if complete and not streams_something:
                    slots = 0
                elif attn == stack.layers and mlp == stack.layers:
                    slots = sum(sorted(stack.heads)[-depth:])
                elif attn == 0 and mlp == 0 and depth == 2:
                    slots = stack.attn + stack.mlp
                else:
                    slots = largest
                if head < heads and slots < max(stack.heads):
                    slots = slots // depth * (depth - 1) + max(stack.heads)
                if allowance is None or held + resident + slots <= allowance:
                    missing = everything + sum(stack.heads[: decode.head]) - resident
                    return PhaseResidency(attn, mlp, head), missing, resident + slots
    return None
