"""What is fuzzed: readers of files and words that others wrote. Each either succeeds or raises an error of planner.errors."""

from __future__ import annotations

from collections.abc import Callable

from fuzz.checkpoints import config_target, header_target, index_target, profile_target
from fuzz.inputs import image_target, tokenizer_target, units_target
from fuzz.plans import plan_target, record_target
from fuzz.tables import pack_target, snapshot_target
from fuzz.target import Place, Target

TARGETS: dict[str, Callable[[Place], Target]] = {
    "safetensors": header_target,
    "index": index_target,
    "config": config_target,
    "profile": profile_target,
    "plan": plan_target,
    "record": record_target,
    "image": image_target,
    "units": units_target,
    "tokenizer": tokenizer_target,
    "snapshot": snapshot_target,
    "pack": pack_target,
}
