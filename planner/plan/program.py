"""Where (Buffer, its views, HostBuffer) and in which order (Step, Copy): what the executor runs.

Two queues run a plan. The *compute queue* runs `steps` in order; `Step.waits` names the copies that must have landed.
The *copy queue* runs `copies` in order; `Copy.after` names the step that must have completed before it may write.
The steps of the decode phase are one loop body, run `Plan.decode_repeats` times; `after` of a copy with `wraps` is
meant in the iteration before (in the first iteration: the end of prefill).

Time, for lifetimes, is the index of a step in `Plan.steps`; a lifetime is half-open, `[birth, death)`.
"""

from __future__ import annotations

from typing import Literal

from planner.plan.words import Frozen, Kernel, Kind, Phase

# --- where --------------------------------------------------------------------------------------------------------


class View(Frozen):
    """A tensor inside a buffer, contiguous, `offset_bytes` from the buffer's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int


BufferKind = Literal["weights", "staging", "kv_cache", "residual", "scratch"]


class Buffer(Frozen):
    """A range of the arena. `lifetimes` are the step intervals in which its content matters; outside them another buffer may use its bytes.

    Weights and staging buffers have no views of their own: a Unit's tensors are placed from `offset_bytes` on.
    """

    name: str
    kind: BufferKind
    offset_bytes: int
    size_bytes: int
    lifetimes: tuple[tuple[int, int], ...]
    views: tuple[View, ...]


class HostBuffer(Frozen):
    """Host memory that counts because the host is the device (the CPU): decoded images, tokenizer."""

    name: str
    size_bytes: int
    lifetimes: tuple[tuple[int, int], ...]


# --- in which order -----------------------------------------------------------------------------------------------


class Outside(Frozen):
    """Memory that a kernel takes itself, outside the arena, and gives back.

    Time is counted in the step's own allocations: `birth` is this one's number, `death` how many had been made when it
    was given back. `declared`: taken by a kernel's inside, where no walk of the executor's code on the CPU sees it.
    """

    name: str
    size_bytes: int
    birth: int
    death: int
    declared: bool = False


class Step(Frozen):
    """One module in one phase. `id` is `vision/blocks.7.attn`, `vision[1]/...` where images run one after another."""

    id: str
    phase: Phase
    kind: Kind
    images: tuple[int, ...]  # of a vision step: which images it processes
    unit: str | None  # weights it needs
    weights: str | None  # the buffer its unit lies in
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    waits: tuple[str, ...]
    kernel: Kernel | None
    outside: tuple[Outside, ...]
    # prediction; in decode: of the last iteration for bytes, of a steady one for seconds
    live_bytes: int  # arena bytes alive
    resident_bytes: int  # arena bytes the device holds (all on a card; pages touched on the CPU)
    outside_bytes: int
    host_bytes: int
    expected_bytes: int  # device bytes
    seconds: float  # without waiting for copies


class Copy(Frozen):
    """One unit's way into a buffer. It serves the first step that waits for it: `copy:prefill/layers.3.mlp`.

    `phase` says in which phase's part of the copy queue it stands; copies of `decode` with `once` run in the first
    iteration only (units that become resident after prefill, and all copies of decode that are not streamed).
    """

    id: str
    phase: Phase
    unit: str
    buffer: str
    after: str | None  # a step; None: as soon as the queue reaches it
    wraps: bool  # `after` is meant in the iteration before
    once: bool
    size_bytes: int
    seconds: float
    source: Literal["disk", "host"] = "disk"


class HostUnit(Frozen):
    """A unit that stays in pinned host memory once it was read: its first copy fills the place, its later copies have `source` host."""

    unit: str
    offset_bytes: int
    size_bytes: int
