"""Offsets of buffers in one stretch of memory.

`offsets` lays out a plan's arena and is the solver behind `plan pack` (`cli`); both try the exact `search`.
"""

from planner.layout.offsets import SECONDS, Layout, Packing, Span, pack, place

__all__ = ["SECONDS", "Layout", "Packing", "Span", "pack", "place"]
