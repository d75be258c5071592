"""Tiles that tests of several kinds run with: everything at once, the least there are, and none that divides anything."""

from __future__ import annotations

from planner.plan.tiles import Tiles

LARGER = Tiles(
    patch_rows=10**6,
    window_rows=10**6,
    query_rows=10**6,
    query_heads=10**6,
    vision_mlp_rows=10**6,
    merger_rows=10**6,
    prompt_rows=10**6,
    prompt_heads=10**6,
    prompt_mlp_rows=10**6,
    vocabulary_rows=10**6,
)
ONE_WINDOW = Tiles(
    patch_rows=64,
    window_rows=64,
    query_rows=64,
    query_heads=1,
    vision_mlp_rows=64,
    merger_rows=16,
    prompt_rows=1,
    prompt_heads=1,
    prompt_mlp_rows=1,
    vocabulary_rows=128,
)
ODD = Tiles(
    patch_rows=37,
    window_rows=81,
    query_rows=29,
    query_heads=1,
    vision_mlp_rows=53,
    merger_rows=5,
    prompt_rows=7,
    prompt_heads=1,
    prompt_mlp_rows=11,
    vocabulary_rows=100,
)
