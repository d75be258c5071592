"""A two-part model small enough to plan in milliseconds, requests on it, and the pieces hand-made programs need."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from planner.checkpoint.spec import Checkpoint, builtin
from planner.checkpoint.template import template
from planner.fronts import START
from planner.plan import Plan
from planner.plan.shapes import ModelShape, TextShape, TokenIds, VisionShape, Workload
from planner.problem import Request
from planner.profile import DeviceProfile, load_profile
from planner.schedule import Choice, PhaseResidency
from planner.search import search
from planner.workload import make_workload, plan_image

ROOT = Path(__file__).parents[2]


def tiny_checkpoint(dtype: str = "float32", layers: int = 4, depth: int = 4) -> Checkpoint:
    """A checkpoint of shapes alone: windowed and full-attention blocks, grouped queries."""
    vision = VisionShape(
        depth=depth,
        hidden=64,
        heads=4,
        intermediate=92,
        out_hidden=64,
        in_channels=3,
        patch_px=14,
        temporal_patch=2,
        merge=2,
        window_px=112,
        full_attention_blocks=(1, depth - 1),
    )
    text = TextShape(
        layers=layers,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate=180,
        vocabulary=640,
        rope_theta=1e6,
        mrope_section=(2, 3, 3),
        rms_norm_eps=1e-6,
        tied=False,
    )
    shape = ModelShape(
        name="tiny",
        dtype=dtype,  # type: ignore[arg-type]
        vision=vision,
        text=text,
        token_ids=TokenIds(image=1, video=2, vision_start=3, vision_end=4, stop=(5,)),
        repetition_penalty=1.0,
        fingerprint="0" * 64,
    )
    return Checkpoint(
        directory=None,
        shape=shape,
        tensors={},
        tensor_shapes=template(vision, text),
        min_pixels=3136,
        max_pixels=12845056,
        tokenizer_json=None,
        tokenizer_bytes=100_000,
    )


def workload_of(
    sizes: Sequence[tuple[int, int]] = ((336, 252),),
    *,
    new: int = 4,
    prompt: int = 8,
    context: int | None = None,
    max_pixels: int = 12845056,
) -> Workload:
    """What is asked: images of these sizes, so many text tokens and new ones."""
    images = [
        plan_image(f"{width}x{height}", width, height, min_pixels=3136, max_pixels=max_pixels)
        for width, height in sizes
    ]
    return make_workload(
        images,
        min_pixels=3136,
        max_pixels=max_pixels,
        n_text_tokens=prompt,
        max_new_tokens=new,
        context_tokens=context,
    )


def checkpoint_of(model: str) -> Checkpoint:
    return tiny_checkpoint() if model == "tiny" else builtin(model)


def plan_of(
    model: str | Checkpoint,
    budget_bytes: int | None,
    device: str | DeviceProfile = "cpu",
    workload: Workload | None = None,
    **rest: Any,
) -> Plan:
    checkpoint = checkpoint_of(model) if isinstance(model, str) else model
    profile = load_profile(device) if isinstance(device, str) else device
    request = Request(checkpoint, workload or workload_of(), budget_bytes, **rest)
    return search(request, profile)


def choice_of(**changes: Any) -> Choice:
    """A setting of the levers: everything streamed through one slot, unless changed."""
    nothing = PhaseResidency(0, 0)
    fields: dict[str, Any] = {
        "order": "vision_then_llm",
        "images_together": True,
        "depth": 1,
        "vision": nothing,
        "prefill": nothing,
        "decode": nothing,
        "tiles": START.model_copy(update={"vocabulary_rows": 256}),
    }
    return Choice(**(fields | changes))


def toy_profile(draw: random.Random) -> DeviceProfile:
    """A card or a CPU, slow enough that tiny models take their time, with a link that is sometimes slow, sometimes fast beside it."""
    cpu = draw.random() < 0.3
    base = load_profile("cpu" if cpu else "rtx-5080-16gb")
    flops = 10 ** draw.uniform(8, 10)
    rates = [(1, max(int(flops / 30), 1)), (64, int(flops / 3)), (1024, int(flops))]
    link = int(10 ** draw.uniform(6, 8.5))
    table = {"bits16": rates, "float32": rates}
    changed = {
        "matmul_flops_per_s": table,
        "attention_flops_per_s": table,
        "bandwidth_bytes_per_s": 20 * link,
        "host_to_device_bytes_per_s": link,
        "page_cache_bytes_per_s": link * draw.randint(1, 6) // 2,
        "pin_bytes_per_s": 0 if cpu else link * draw.randint(1, 4),
        "disk_bytes_per_s": max(link // draw.randint(1, 3), 1),
        "launch_s": 1e-6,
        "default_ram_bytes": draw.choice([0, 2**30]),
    }
    return DeviceProfile.model_validate(base.model_dump() | changed)


@pytest.fixture(scope="session")
def kit() -> Any:
    """The helpers above; test modules cannot import a conftest under importmode importlib."""
    from types import SimpleNamespace

    return SimpleNamespace(
        root=ROOT,
        tiny=tiny_checkpoint,
        workload=workload_of,
        checkpoint=checkpoint_of,
        plan=plan_of,
        choice=choice_of,
        toy=toy_profile,
    )


@pytest.fixture(scope="session")
def streamed(kit: Any) -> Plan:
    """A tiny plan that streams in every phase through two slots, with some weights resident."""
    from planner.search import build

    choice = choice_of(
        depth=2,
        vision=PhaseResidency(1, 0),
        prefill=PhaseResidency(1, 0),
        decode=PhaseResidency(2, 1),
    )
    return build(Request(tiny_checkpoint(), workload_of(), None), load_profile("cpu"), choice)


Planned = Callable[..., Plan]
