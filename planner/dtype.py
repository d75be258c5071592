"""The dtype that a checkpoint is run in: its own, or float16 where it is stored in bfloat16 and the device has none."""

from __future__ import annotations

from dataclasses import replace

from planner.checkpoint.spec import Checkpoint
from planner.errors import InputError
from planner.profile import DeviceProfile

DTYPES = ("auto", "bfloat16", "float16")


def in_dtype(checkpoint: Checkpoint, device: DeviceProfile, wanted: str = "auto") -> Checkpoint:
    """The checkpoint as it is run on the device; InputError where its weights cannot be had in the wanted dtype there.

    `auto`: as it is stored, but float16 for bfloat16 on a device without it. Tensors, sizes and fingerprint stay those of
    the files: both dtypes take two bytes.
    """
    stored = checkpoint.shape.stored_dtype
    if wanted == "auto":
        wanted = "float16" if stored == "bfloat16" and not device.bf16 else stored
    if wanted == "bfloat16" and stored == "bfloat16" and not device.bf16:
        raise InputError(
            f"--dtype bfloat16: wanted a device that has it, found {device.id}, which has none; "
            "give --dtype float16, or another --device"
        )
    if wanted == stored:
        shape = checkpoint.shape.model_copy(update={"dtype": stored, "stored": None})
    elif (stored, wanted) == ("bfloat16", "float16"):
        shape = checkpoint.shape.model_copy(update={"dtype": wanted, "stored": stored})
    else:
        fitting = "float16 or bfloat16" if wanted == "float16" else wanted
        raise InputError(
            f"--dtype {wanted}: wanted weights stored in {fitting}, found {stored} in {checkpoint.shape.name}; leave it out"
        )
    return replace(checkpoint, shape=shape)
