"""What the planner hands to the executor: a program with offsets, waits and a prediction, as one JSON document.

Reading order: `words`, `shapes` (what is asked, what is run), `tiles` (how finely), `program` (where, in which order),
`prediction` (what it costs), Plan below (all of it). `sessions` says what of a plan a further request finds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from planner.errors import PlanFileError
from planner.files import write_text as write_text
from planner.plan.prediction import Prediction
from planner.plan.program import Buffer, Copy, HostBuffer, HostUnit, Step
from planner.plan.shapes import ModelShape, Unit, Workload
from planner.plan.tiles import Tiles
from planner.plan.words import Frozen, Order, Phase

SCHEMA_VERSION = 1
MOST_PLAN_BYTES = 2**26  # of a plan file; the longest, 72B with every unit on its own, has 2 MB


class Residency(Frozen):
    """How many units of a class are resident in a phase, of how many."""

    phase: Phase
    unit_class: str  # "vision.attn", "text.mlp", "text.lm_head"
    resident: int
    total: int


class Levers(Frozen):
    """What the search decided, for people; the executor follows steps, copies and buffers."""

    order: Order
    images_together: bool
    staging_depth: int
    tiles: Tiles
    residency: tuple[Residency, ...]


class Kept(Frozen):
    """A block outside the arena that a card holds from before the first step to the end; `declared` as in Outside."""

    name: str
    size_bytes: int
    declared: bool = False


class DeviceTerms(Frozen):
    """What the plan assumes of the device. `alloc_conf` is what PYTORCH_ALLOC_CONF must say; `kept` stands in the order of allocation."""

    profile: str
    kind: Literal["cpu", "cuda"]
    budget_bytes: int | None  # None: unlimited
    context_bytes: int
    context_error_bytes: int
    max_tensor_bytes: int
    allocator: str
    alloc_conf: str = ""
    kept: tuple[Kept, ...] = ()


class Plan(Frozen):
    schema_version: Literal[1]
    request: str  # the command that makes this plan
    model: ModelShape
    workload: Workload
    device: DeviceTerms
    levers: Levers
    units: tuple[Unit, ...]
    buffers: tuple[Buffer, ...]
    host_buffers: tuple[HostBuffer, ...]
    steps: tuple[Step, ...]
    copies: tuple[Copy, ...]
    host_units: tuple[HostUnit, ...] = ()
    decode_repeats: int
    prediction: Prediction

    def dumps(self) -> str:
        """The plan as JSON, one line per list entry, the same bytes for the same plan; `digest` last."""
        data = self.model_dump(mode="json")
        data["digest"] = digest(data)
        parts = []
        for key, value in data.items():
            if isinstance(value, list):
                rows = ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in value)
                parts.append(f'"{key}":[\n  {rows}\n]' if rows else f'"{key}":[]')
            else:
                parts.append(f'"{key}":{json.dumps(value, separators=(",", ":"))}')
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def save(self, path: Path) -> None:
        """Write `plan.json` whole or not at all."""
        write_text(path, self.dumps())

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan file; PlanFileError names the file, the field and the command that writes it anew."""
        try:
            text = _read(path).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanFileError(f"{path}: cannot be read as a plan: {error}") from None
        return cls.loads(text, name=str(path))

    @classmethod
    def loads(cls, text: str, *, name: str = "plan.json") -> Plan:
        """Read a plan from its JSON; `name` is what errors call it."""
        anew = f"write it anew with: plan --out {name}"
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanFileError(f"{name}: not a plan: it is not JSON ({error}); {anew}") from None
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise PlanFileError(
                f"{name}: wanted a plan of schema version {SCHEMA_VERSION}, found {version!r}; {anew}"
            )
        signed = data.pop("digest", None)
        try:
            plan = cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise PlanFileError(
                f"{name}: field {field}: {first['msg']} ({error.error_count()} in all); {anew}"
            ) from None
        # what a plan promises holds for the plan as the planner made it; a changed one is another plan, never checked
        if signed != digest(data):
            raise PlanFileError(f"{name}: it was changed after it was written; {anew}")
        return plan


def _read(path: Path) -> bytes:
    """The file's bytes; whatever lies under the name, not more than a plan has is read."""
    pieces, size_bytes = [], 0
    with open(path, "rb") as file:
        # piece by piece: one read takes memory for all that was asked for, however short the file
        while size_bytes <= MOST_PLAN_BYTES and (piece := file.read(2**20)):
            pieces.append(piece)
            size_bytes += len(piece)
    if size_bytes > MOST_PLAN_BYTES:
        raise PlanFileError(
            f"{path}: not a plan: wanted at most {MOST_PLAN_BYTES // 2**20} MiB, found more"
        )
    return b"".join(pieces)


def digest(data: Mapping[str, object]) -> str:
    """sha256 of a plan's JSON data without its `digest`, whatever its spacing and order of keys."""
    kept = {key: value for key, value in data.items() if key != "digest"}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
