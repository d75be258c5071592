"""Small plans written by hand: two streamed units over two slots, a decode loop, one file of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from executor.make_checkpoint import make_random_checkpoint
from executor.prepare import Request
from planner import search, workload
from planner.checkpoint import spec
from planner.plan import DeviceTerms, Levers, Plan
from planner.plan.prediction import PhasePrediction, Prediction
from planner.plan.program import Buffer, Copy, Step, View
from planner.plan.shapes import (
    Image,
    ModelShape,
    TensorLocation,
    TextShape,
    TokenIds,
    Unit,
    UnitTensor,
    VisionShape,
    WindowRun,
    Workload,
)
from planner.plan.tiles import Tiles
from planner.profile import load_profile
from planner.schedule import Choice, PhaseResidency
from planner.units import MIB

MakePlan = Callable[..., Plan]


def step(
    id: str,
    *,
    kind: str = "text_mlp",
    unit: str | None = None,
    weights: str | None = None,
    reads: Sequence[str] = (),
    writes: Sequence[str] = (),
    waits: Sequence[str] = (),
) -> Step:
    phase = id.partition("/")[0].partition("[")[0]
    return Step.model_validate(
        {
            "id": id,
            "phase": phase,
            "kind": kind,
            "images": (),
            "unit": unit,
            "weights": weights,
            "reads": tuple(reads),
            "writes": tuple(writes),
            "waits": tuple(waits),
            "kernel": None,
            "outside": (),
            "live_bytes": 0,
            "resident_bytes": 0,
            "outside_bytes": 0,
            "host_bytes": 0,
            "expected_bytes": 100 * MIB,
            "seconds": 0.001,
        }
    )


def copy(
    need: str,
    unit: str,
    buffer: str,
    *,
    after: str | None = None,
    wraps: bool = False,
    once: bool = False,
    size_bytes: int = 0,
) -> Copy:
    phase: Any = need.partition("/")[0]
    return Copy(
        id=f"copy:{need}",
        phase=phase,
        unit=unit,
        buffer=buffer,
        after=after,
        wraps=wraps,
        once=once,
        size_bytes=size_bytes,
        seconds=0.0,
    )


def buffer(
    name: str,
    offset_bytes: int,
    size_bytes: int,
    *,
    views: Sequence[tuple[str, str, tuple[int, ...], int]] = (),
    lifetimes: Sequence[tuple[int, int]] = ((0, 10**6),),
    kind: Any = "scratch",
) -> Buffer:
    return Buffer(
        name=name,
        kind=kind,
        offset_bytes=offset_bytes,
        size_bytes=size_bytes,
        lifetimes=tuple(lifetimes),
        views=tuple(
            View(name=n, dtype=dtype, shape=shape, offset_bytes=at) for n, dtype, shape, at in views
        ),
    )


def unit(id: str, *tensors: tuple[str, str, tuple[int, ...], int]) -> Unit:
    """Tensors as (published name, local name, float32 shape, offset in the unit)."""
    made = []
    for name, local, shape, at in tensors:
        size_bytes = 4
        for extent in shape:
            size_bytes *= extent
        made.append(
            UnitTensor(
                name=name,
                local=local,
                shape=shape,
                row_start=0,
                row_stop=shape[0],
                offset_bytes=at,
                size_bytes=size_bytes,
            )
        )
    end = max((t.offset_bytes + t.size_bytes for t in made), default=0)
    return Unit(id=id, tensors=tuple(made), size_bytes=end)


def make_plan(
    *,
    steps: Sequence[Step] = (),
    copies: Sequence[Copy] = (),
    buffers: Sequence[Buffer] = (),
    units: Sequence[Unit] = (),
    arena_bytes: int | None = None,
    decode_repeats: int = 0,
    budget_bytes: int | None = None,
    context_bytes: int = 50 * MIB,
) -> Plan:
    """A plan of these parts around a model of no consequence."""
    if arena_bytes is None:
        arena_bytes = max((b.offset_bytes + b.size_bytes for b in buffers), default=4096)
    model = ModelShape(
        name="tiny",
        dtype="float32",
        vision=VisionShape(
            depth=1,
            hidden=32,
            heads=2,
            intermediate=48,
            out_hidden=32,
            in_channels=3,
            patch_px=14,
            temporal_patch=2,
            merge=2,
            window_px=112,
            full_attention_blocks=(0,),
        ),
        text=TextShape(
            layers=1,
            hidden=32,
            heads=4,
            kv_heads=2,
            head_dim=8,
            intermediate=48,
            vocabulary=64,
            rope_theta=1e6,
            mrope_section=(1, 1, 2),
            rms_norm_eps=1e-6,
            tied=False,
        ),
        token_ids=TokenIds(image=60, video=61, vision_start=62, vision_end=63, stop=(59,)),
        repetition_penalty=1.0,
        fingerprint="0" * 64,
    )
    image = Image(
        name="a.png",
        source_width_px=56,
        source_height_px=56,
        width_px=56,
        height_px=56,
        rows=4,
        cols=4,
        windows=(WindowRun(count=1, rows=16),),
    )
    tiles = Tiles(
        patch_rows=16,
        window_rows=16,
        query_rows=16,
        query_heads=2,
        vision_mlp_rows=16,
        merger_rows=4,
        prompt_rows=16,
        prompt_heads=2,
        prompt_mlp_rows=16,
        vocabulary_rows=64,
    )
    phase_fields: dict[str, Any] = dict.fromkeys(PhasePrediction.model_fields, 0)
    phases = tuple(
        PhasePrediction.model_validate(
            phase_fields
            | {"phase": phase, "expected_peak_bytes": 100 * MIB, "bound_peak_bytes": 120 * MIB}
        )
        for phase in ("load", "vision", "prefill", "decode")
    )
    return Plan(
        schema_version=1,
        request="plan --vram 1GB",
        model=model,
        workload=Workload(
            images=(image,),
            min_pixels=3136,
            max_pixels=3136,
            prompt_tokens=16,
            prompt_is_bound=False,
            max_new_tokens=decode_repeats + 1,
            context_tokens=32,
        ),
        device=DeviceTerms(
            profile="cpu",
            kind="cpu",
            budget_bytes=budget_bytes,
            context_bytes=context_bytes,
            context_error_bytes=0,
            max_tensor_bytes=2**31 - 1,
            allocator="native",
        ),
        levers=Levers(
            order="vision_then_llm",
            images_together=True,
            staging_depth=2,
            tiles=tiles,
            residency=(),
        ),
        units=tuple(units),
        buffers=tuple(buffers),
        host_buffers=(),
        steps=tuple(steps),
        copies=tuple(copies),
        decode_repeats=decode_repeats,
        prediction=Prediction(
            phases=phases,
            peak_step=steps[-1].id if steps else "",
            terms=(),
            expected_peak_bytes=100 * MIB,
            bound_peak_bytes=120 * MIB,
            arena_bytes=arena_bytes,
            live_peak_bytes=arena_bytes,
            seconds=0.1,
            seconds_lower_bound=0.1,
            candidates=1,
            smallest_budget_bytes=100 * MIB,
            variants=(),
        ),
    )


class Parts:
    """The builders above, for tests that put a plan together themselves."""

    step = staticmethod(step)
    copy = staticmethod(copy)
    buffer = staticmethod(buffer)
    unit = staticmethod(unit)
    plan = staticmethod(make_plan)


@pytest.fixture
def parts() -> type[Parts]:
    return Parts


ROWS, COLS = 16, 64  # a unit of 4 KiB, float32


class Streaming:
    """Units 0 to 3 streamed in decode through two slots, units 0 and 1 resident in prefill; unit i is filled with i + 1."""

    def __init__(self, folder: Path, *, repeats: int = 3) -> None:
        size = ROWS * COLS * 4
        self.path = folder / "weights.bin"
        self.values = [torch.full((ROWS, COLS), float(i + 1)) for i in range(4)]
        self.path.write_bytes(b"".join(v.numpy().tobytes() for v in self.values))
        self.locations = {
            f"w{i}": TensorLocation(self.path, i * size, size, (ROWS, COLS), "float32")
            for i in range(4)
        }
        slots = [f"staging/{i}" for i in range(2)]
        steps = [
            step(
                f"prefill/{i}",
                unit=f"u{i}",
                weights=slots[i],
                writes=("out",),
                waits=(f"copy:prefill/{i}",),
            )
            for i in range(2)
        ]
        steps += [
            step(
                f"decode/{i}",
                unit=f"u{i}",
                weights=slots[i % 2],
                writes=("out",),
                waits=(f"copy:decode/{i}",),
            )
            for i in range(4)
        ]
        copies = [copy(f"prefill/{i}", f"u{i}", slots[i]) for i in range(2)]
        copies += [
            copy(f"decode/{i}", f"u{i}", slots[i], after=f"decode/{i + 2}", wraps=True)
            for i in range(2)
        ]
        copies += [
            copy(f"decode/{i}", f"u{i}", slots[i % 2], after=f"decode/{i - 2}") for i in (2, 3)
        ]
        self.plan = make_plan(
            steps=steps,
            copies=copies,
            units=[unit(f"u{i}", (f"w{i}", "weight", (ROWS, COLS), 0)) for i in range(4)],
            buffers=[
                buffer("staging/0", 0, size, kind="staging"),
                buffer("staging/1", size, size, kind="staging"),
                buffer("out", 2 * size, size, views=[("out", "float32", (ROWS, COLS), 0)]),
            ],
            decode_repeats=repeats,
        )


@pytest.fixture
def streaming(tmp_path: Path) -> Streaming:
    return Streaming(tmp_path)


class Tiny:
    """A tiny random checkpoint, an image, and plans for them."""

    PROMPT = "What is this?"

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "tiny"
        make_random_checkpoint("tiny", self.folder)
        self.checkpoint = spec.read_checkpoint(self.folder)
        self.image = folder / "a.png"
        self.save_image(self.image, seed=0)
        self.profile = load_profile("cpu")
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def save_image(self, path: Path, *, seed: int, width: int = 196, height: int = 140) -> None:
        values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Pillow.fromarray(values).save(path)

    def plan(
        self,
        *,
        streamed: bool = False,
        images: int = 1,
        new_tokens: int = 5,
        budget_bytes: int | None = None,
    ) -> Plan:
        """The search's plan, or one with every unit streamed that can be."""
        key = (streamed, images, new_tokens, budget_bytes)
        if key not in self._plans:
            bounds = {
                "min_pixels": self.checkpoint.min_pixels,
                "max_pixels": self.checkpoint.max_pixels,
            }
            image = workload.parse_image(str(self.image), **bounds)
            asked = workload.make_workload(
                [image] * images,
                **bounds,
                text=self.PROMPT,
                tokenizer_json=self.checkpoint.tokenizer_json,
                max_new_tokens=new_tokens,
            )
            request = search.Request(self.checkpoint, asked, budget_bytes)
            plan = search.search(request, self.profile)
            if streamed:
                none = PhaseResidency(0, 0, 0)
                choice = Choice(
                    order="vision_then_llm",
                    images_together=False,
                    depth=2,
                    vision=none,
                    prefill=none,
                    decode=none,
                    tiles=plan.levers.tiles,
                )
                plan = search.build(request, self.profile, choice)
            self._plans[key] = plan
        return self._plans[key]

    def request(self, **changes: Any) -> Request:
        given: dict[str, Any] = {
            "locations": self.checkpoint.tensors,
            "images": (self.image,),
            "prompt": self.PROMPT,
            "tokenizer": self.folder,
            "fingerprint": self.checkpoint.shape.fingerprint,
            "stop": (),
        }
        return Request(**(given | changes))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))
