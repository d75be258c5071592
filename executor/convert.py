"""Weights stored in bfloat16 and computed with in float16: converted in host memory, where they were read, in place.

Both take two bytes, so nothing else about a copy changes. Every bfloat16 value from 2^-14 to 65504 is exact in float16;
smaller ones lose bits down to 2^-25, below which they become 0; larger ones have no place, and are refused.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from executor.files import Files
from planner.errors import CheckpointError
from planner.plan.shapes import ModelShape, TensorLocation

MOST = torch.finfo(torch.float16).max
# values at once: up to so many torch stays in the calling thread (at::internal::GRAIN_SIZE), so that the reader's own
# pool of threads never comes into being; by way of float32, for which there are vector instructions
PIECE_VALUES = 32768


def weight_files(
    model: ModelShape, locations: Mapping[str, TensorLocation], readers: int = 1
) -> Files:
    """Files that give weights in the dtype that the model computes in, read by so many threads."""
    if model.stored_dtype == model.dtype:
        return Files(readers)
    return Float16Files(locations, readers)


class Float16Files(Files):
    """Files of bfloat16 whose reads give float16; CheckpointError names the tensor that it cannot hold."""

    def __init__(self, locations: Mapping[str, TensorLocation], readers: int = 1) -> None:
        super().__init__(readers)
        self._tensors = sorted(
            (str(place.path), place.offset_bytes, name) for name, place in locations.items()
        )

    def _share(self, path: Path, handle: int, offset_bytes: int, targets: list[memoryview]) -> None:
        super()._share(path, handle, offset_bytes, targets)
        between = torch.empty(PIECE_VALUES, dtype=torch.float32)
        for target in targets:
            stored = torch.frombuffer(target, dtype=torch.bfloat16)
            self._convert(path, offset_bytes, stored, between)
            offset_bytes += len(target)

    def _convert(self, path: Path, offset_bytes: int, stored: Tensor, between: Tensor) -> None:
        made = stored.view(torch.float16)
        for start in range(0, stored.numel(), PIECE_VALUES):
            part = stored[start : start + PIECE_VALUES]
            wide = between[: part.numel()]
            wide.copy_(part)
            # both are not a number where any value is
            least, most = torch.aminmax(wide)
            if not (float(least) >= -MOST and float(most) <= MOST):
                raise self._refusal(path, offset_bytes + 2 * start, wide)
            made[start : start + PIECE_VALUES].copy_(wide)

    def _refusal(self, path: Path, offset_bytes: int, wide: Tensor) -> CheckpointError:
        at = int((~(wide.abs() <= MOST)).nonzero()[0])
        place = (str(path), offset_bytes + 2 * at, "\U0010ffff")
        name = self._tensors[max(0, bisect_right(self._tensors, place) - 1)][2]
        return CheckpointError(
            f"{path}: tensor {name}: wanted values that float16 can hold, {MOST:.0f} at most, found {float(wide[at]):.6g}; "
            "run this checkpoint in bfloat16, on a device that has it"
        )
