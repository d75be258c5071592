"""Ten settings of the levers that differ in every one of them."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from planner.checkpoint import spec
from planner.plan.tiles import Tiles
from planner.plan.words import Order
from planner.schedule import Choice, PhaseResidency
from tests.tiles import LARGER, ODD, ONE_WINDOW


class Setting(NamedTuple):
    """One setting of every lever; residency as shares of a stack's attention units, MLP units and lm_head tiles."""

    order: Order
    together: bool
    depth: int
    vision: tuple[float, float]
    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    tiles: Tiles

    def choice(self, checkpoint: spec.Checkpoint) -> Choice:
        shape = checkpoint.shape
        blocks, layers = shape.vision.depth, shape.text.layers
        tiles = self.tiles.model_copy(
            update={
                "query_heads": min(self.tiles.query_heads, shape.vision.heads),
                "prompt_heads": min(self.tiles.prompt_heads, shape.text.kv_heads),
                "vocabulary_rows": min(self.tiles.vocabulary_rows, shape.text.vocabulary),
            }
        )
        heads = ceil(shape.text.vocabulary / tiles.vocabulary_rows)

        def text(attn: float, mlp: float, head: float) -> PhaseResidency:
            return PhaseResidency(ceil(attn * layers), ceil(mlp * layers), ceil(head * heads))

        attn, mlp = self.vision
        return Choice(
            order=self.order,
            images_together=self.together,
            depth=self.depth,
            vision=PhaseResidency(ceil(attn * blocks), ceil(mlp * blocks)),
            prefill=text(*self.prefill),
            decode=text(*self.decode),
            tiles=tiles,
        )


def _rows(tiles: Tiles, prompt: int) -> Tiles:
    return tiles.model_copy(update={"prompt_rows": prompt, "prompt_mlp_rows": prompt})


ALL, NONE = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
SETTINGS = {
    "all resident, nothing tiled": Setting("all_first", True, 1, (1, 1), ALL, ALL, LARGER),
    "all streamed, one slot, one window": Setting(
        "vision_then_llm", True, 1, (0, 0), NONE, NONE, ONE_WINDOW
    ),
    "all streamed, two slots, odd tiles": Setting(
        "vision_then_llm", False, 2, (0, 0), NONE, NONE, ODD
    ),
    "all streamed, three slots, nothing tiled": Setting(
        "vision_then_llm", True, 3, (0, 0), NONE, NONE, _rows(LARGER, 7)
    ),
    "vision streamed, LLM prefetched": Setting(
        "prefetch", True, 2, (0, 0), ALL, ALL, _rows(ODD, 10**6)
    ),
    "vision resident, LLM streamed": Setting(
        "vision_then_llm", False, 1, (1, 1), NONE, NONE, _rows(ONE_WINDOW, 7)
    ),
    "half of each, LLM first": Setting(
        "all_first", False, 3, (0.5, 0.5), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), ONE_WINDOW
    ),
    "half prefetched, grows after prefill": Setting(
        "prefetch", False, 2, (0, 0.5), (0.3, 0.3, 0), (0.7, 0.7, 1), _rows(LARGER, 1)
    ),
    "nothing in prefill, everything in decode": Setting(
        "vision_then_llm", True, 3, (1, 0), NONE, ALL, ODD
    ),
    "attention and lm_head stay, MLPs streamed": Setting(
        "all_first", True, 2, (0, 1), (1, 0, 1), (1, 0, 1), _rows(ODD, 10**6)
    ),
}
