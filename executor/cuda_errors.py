"""What torch raises where a card refuses memory or fails, as the errors of planner.errors."""

from __future__ import annotations

import re

import torch

from planner.errors import OutOfMemory, RunFailed

# torch 2.8 brought a class of its own; before that the text tells
_ACCELERATOR: tuple[type[Exception], ...] = tuple(
    found for found in (getattr(torch, "AcceleratorError", None),) if found is not None
)
_CARD = re.compile(r"CUDA (?:driver )?error|CUBLAS_STATUS_|CUDNN_STATUS_")
_NO_ROOM = re.compile(r"out of memory|_STATUS_ALLOC_FAILED", re.IGNORECASE)


def typed(where: str, error: RuntimeError) -> RunFailed | None:
    """The error for the user; None where it is none of the card's.

    What the allocator refuses is torch.OutOfMemoryError; the driver and the libraries beside it say it in words.
    """
    line = (str(error).splitlines() or ["no more is known"])[0]
    if not isinstance(error, _ACCELERATOR) and not _CARD.search(line):
        return None
    if _NO_ROOM.search(line):
        return OutOfMemory(
            f"{where}: the card has no room left beside the arena: {line}; "
            "close other programs or plan for a smaller budget"
        )
    if "no kernel image" in line:
        return RunFailed(
            f"{where}: torch {torch.__version__} has no code for this card ({line}); "
            "install a build that names its compute capability"
        )
    return RunFailed(
        f"{where}: the card failed: {line}; this process cannot use it any more: run again, "
        "with CUDA_LAUNCH_BLOCKING=1 to see which call it is"
    )
