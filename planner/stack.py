"""The language model's units at one tiling of lm_head: sizes and seconds by count, and how many residents have room in decode."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import compress
from operator import sub
from typing import TYPE_CHECKING, NamedTuple

from planner import buffers
from planner.fronts import START
from planner.plan.tiles import Tiles
from planner.schedule import Anchor, PhaseResidency, spread

if TYPE_CHECKING:
    from planner.space import Space

UNLIMITED = float("inf")
TALL = 8  # stacks of more layers begin with a resident unit, if they have any: where it lies matters little


def head_tiles(number: int) -> tuple[int, Anchor]:
    """(count, anchor) of a set of lm_head tiles. The last tile may be short: 1 is the last, 2 another, 3 another and the last, and so on."""
    return (number + 1) // 2, "late" if number % 2 else "early"


def residency_of(attn: int, mlp: int, head: int, anchor: Anchor) -> PhaseResidency:
    """So many attention and MLP halves, and this set of lm_head tiles."""
    count, head_anchor = head_tiles(head)
    return PhaseResidency(attn, mlp, count, anchor, head_anchor=head_anchor)


class Root(NamedTuple):
    depth: int
    vocabulary_rows: int
    less: int = 0  # bytes of the room that are not used


class Decoding(NamedTuple):
    """Residents of decode; `anchor` None: not worked out yet. `head`: see `head_tiles`."""

    root: Root
    attn: int
    mlp: int
    head: int
    anchor: Anchor | None = None

    def residency(self) -> PhaseResidency:
        return residency_of(self.attn, self.mlp, self.head, self.anchor or "late")


class Stack:
    """Sizes and seconds of the language model at one tiling of lm_head."""

    def __init__(self, space: Space, vocabulary_rows: int) -> None:
        self.space = space
        parts, problem = space.parts, space.problem
        pinned = problem.request.tiles or START
        self.tiles: Tiles = pinned.model_copy(update={"vocabulary_rows": vocabulary_rows})
        start = {
            rows: problem.start_s(pinned.model_copy(update={"vocabulary_rows": rows}))
            for rows in space.vocabulary_rows()
        }
        # seconds by which the run starts later than with the rows with which it starts soonest
        self.start = start[vocabulary_rows] - min(start.values())
        bare = parts.bare_text(True, vocabulary_rows)
        first = parts.bare_text(False, vocabulary_rows)
        self.layers, _, self.heads = parts.totals(vocabulary_rows)
        self.attn, self.mlp = bare.units[1], bare.units[2]
        self.norm = bare.units[2 * self.layers + 1]
        self._heads = bare.units[2 * self.layers + 2 : -1]
        self._units = [self.attn, self.mlp] * self.layers + self._heads
        self.steps = len(self._units) + 1
        numbers = range(2 * self.heads)
        self._head_bytes = [
            sum(self._heads[i] for i in spread(count, self.heads, anchor))
            for count, anchor in map(head_tiles, numbers)
        ]
        few = max(self.heads, self.layers) <= TALL and self._heads[-1] < self._heads[0]
        self.head_numbers = [n for n in numbers if few or not n or n % 2]  # in order of bytes
        self.least_head = min(self._heads)
        self.largest_unit = max(self.attn, self.mlp, *self._heads)
        self.total = sum(bare.units) - self.norm
        images = sum(parts.bare_vision(True).units) if problem.workload.images else 0
        self.brought = space.copied(images + self.total, first=True)  # every unit once, from disk
        taken = parts.scratch("decode", bare, self.tiles)
        on_cpu = problem.on_cpu
        self.decode_taken = {k: s + (o if on_cpu else 0) for k, (s, o) in taken.items()}
        taken = parts.scratch("prefill", first, self.tiles)
        # attention and MLP halves choose their tiles
        self.prefill_taken = {k: both for k, both in taken.items() if k not in space.prefill}
        held = [
            live - unwritten + self.decode_taken[kind]
            for live, unwritten, kind in zip(bare.live, bare.unwritten, bare.kinds, strict=True)
        ]
        self.fixed_decode = max(held) + self.norm
        self.least_decode: int = min(map(sub, bare.live, bare.unwritten)) + self.norm
        halves = [i for i, kind in enumerate(first.kinds) if kind in space.prefill]
        self.most_prefill = max(first.live[i] - first.unwritten[i] for i in halves)
        self.fixed_prefill = self.most_prefill + self.norm
        self.layer_cache = buffers.kv_cache(
            problem.model, problem.workload.context_tokens
        ).size_bytes
        self.lax = space.short or not space.repeats
        if self.lax:
            self.layer_cache = 2**60  # the closed form cannot tell how many fit
        if not space.repeats:
            self.fixed_prefill = 0  # residents are given up as they are used
        # attention in one call for all heads: no other number of calls is faster
        heads = pinned.prompt_heads if problem.request.tiles else problem.model.text.kv_heads
        self.fastest = self.tiles.model_copy(update={"prompt_heads": heads})
        seconds = parts.seconds("decode", bare, self.fastest)
        self.decode_compute = sum(seconds)
        self.one_attn, self.one_mlp = seconds[1], seconds[2]
        self.one_head = min(seconds[2 * self.layers + 2 : -1])
        seconds = parts.seconds("prefill", first, self.tiles)
        self.small_prefill = sum(
            s for s, kind in zip(seconds, first.kinds, strict=True) if kind not in space.prefill
        )

    def pin_bound(self, streamed: float) -> float:
        """Where at least so many bytes are streamed in decode, taking pinned memory for those that stay there takes at least so long."""
        problem = self.space.problem
        if not problem.pinned_bytes or not self.space.repeats:
            return 0.0
        most = max(problem.pinned_bytes - 2 * self.largest_unit, 0)
        return problem.costs.pin(int(min(streamed, most)))

    def head_bytes(self, number: int) -> int:
        """Of a set of resident tiles."""
        return self._head_bytes[number]

    def decode_peak(self, residency: PhaseResidency, depth: int, room: float = UNLIMITED) -> int:
        """The most bytes held in decode; on the CPU at least so many, and exactly only where there is room for them."""
        resident = residency.attn * self.attn + residency.mlp * self.mlp
        heads = residency.positions((self.layers, self.layers, self.heads))[2]
        resident += sum(self._heads[tile] for tile in heads)
        if self.space.problem.on_cpu:
            # in the end all slots are full
            full = self.least_decode + resident + self.slots(residency, depth)
            if full > room:
                return full
            parts, rows = self.space.parts, self.tiles.vocabulary_rows
            return parts.held("decode", parts.decode(residency, residency, depth, rows), self.tiles)
        return self.fixed_decode + resident + self.slots(residency, depth)

    def fillings(self, decoding: Decoding, room: float) -> Iterator[tuple[int, int, int]]:
        """Residents of prefill among those of decode, for so many MLP halves and all or no lm_head tiles the most attention halves that may fit."""
        for head in dict.fromkeys((decoding.head, 0)):
            for mlp in range(decoding.mlp, -1, -1):
                left = room - mlp * self.mlp - self.head_bytes(head)
                if left < 0:
                    continue
                attn = whole_units(left, self.attn, decoding.attn)
                if (attn, mlp, head) != (self.layers, self.layers, self.head_numbers[-1]):
                    # so many layers before the last all slots are in use
                    depth = decoding.root.depth
                    before = room + (depth + 1) * self.layer_cache
                    most = self.most_attn(depth, before, mlp, head, self.layers)
                    if most is None:
                        continue
                    attn = min(attn, most)
                yield attn, mlp, head
                if attn == decoding.attn:
                    break

    def most_attn(self, depth: int, room: float, mlp: int, head: int, most: int) -> int | None:
        """No more attention halves may fit beside so many others and the slots; None where not even these do."""
        left = room - mlp * self.mlp - self.head_bytes(head)
        least = [self.attn]
        if mlp < self.layers:
            least.append(self.mlp)
        if head < self.head_numbers[-1]:
            least.append(self.least_head)
        largest = max(least[1:], default=0)
        whole = left - (largest and largest + (depth - 1) * min(least[1:]))
        if whole >= self.layers * self.attn and most == self.layers:
            return self.layers
        left -= max(largest, self.attn) + (depth - 1) * min(least)
        if left < 0:
            return None
        return whole_units(left, self.attn, self.layers - 1 if most == self.layers else most)

    def slots(self, residency: PhaseResidency, depth: int) -> int:
        """Bytes of the staging slots that the others use in turn."""
        attn, mlp, head = residency.positions((self.layers, self.layers, self.heads))
        streamed = [True] * len(self._units)
        for layer in attn:
            streamed[2 * layer] = False
        for layer in mlp:
            streamed[2 * layer + 1] = False
        for tile in head:
            streamed[2 * self.layers + tile] = False
        sizes = list(compress(self._units, streamed))
        return sum(max(sizes[slot::depth]) for slot in range(min(depth, len(sizes))))

    def streamed(self, attn: int, mlp: int, head: int) -> int:
        """Bytes that are not resident."""
        resident = attn * self.attn + mlp * self.mlp + self.head_bytes(head)
        return self.total - resident

    def rest_bound(
        self,
        depth: int,
        streamed: float,
        attn: int | None = None,
        mlp: int = 0,
        head: int = 0,
    ) -> float:
        """Decode takes at least so long where so many bytes are streamed."""
        if not self.space.repeats:
            return 0.0
        period = self.period(streamed, depth)
        if depth == 1 and attn is not None:
            # nothing is copied while what came through the one slot computes
            serial = (self.layers - attn) * self.one_attn + (self.layers - mlp) * self.one_mlp
            serial += (self.heads - head_tiles(head)[0]) * self.one_head
            period = max(period, self._link(streamed) + serial)
        return self.space.repeats * period

    def period(self, streamed: float, depth: int) -> float:
        """An iteration of the loop takes at least so long where so many bytes are streamed."""
        # as many slots may have been refilled in the iteration before
        rest = self._link(max(streamed - depth * self.largest_unit, 0))
        least = self.space.problem.costs.beside.least(self.decode_compute, rest, self.steps)
        return max(least, self._link(streamed))

    def _link(self, size_bytes: float) -> float:
        """Copies of so many bytes take at least so long in decode."""
        return self.space.copied(size_bytes, first=False) if size_bytes else 0.0


def whole_units(room: float, size: int, most: int) -> int:
    """How many units of a size have room."""
    return most if room >= most * size else int(room // size)
