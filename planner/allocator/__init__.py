"""torch's CUDA caching allocator on one device, without a device.

`simulator` decides by the rules of `settings` over the blocks of `heap` and the pages of `expandable`; `stats` counts.
"""

from planner.allocator.heap import Block
from planner.allocator.settings import Settings, parse_settings
from planner.allocator.simulator import CachingAllocator

__all__ = ["Block", "CachingAllocator", "Settings", "parse_settings"]
