"""What it costs: bytes and seconds by phase, what stands beside them in the report, and the sum of it."""

from __future__ import annotations

from typing import Literal

from planner.plan.words import Frozen


class MemoryTerm(Frozen):
    """One line of the device's memory at the peak."""

    name: str
    expected_bytes: int
    error_bytes: int  # how much more it may be
    source: str


class PhasePrediction(Frozen):
    """One row of the report. Bytes are maxima over the phase's steps, except the two peaks, which are sums at one step."""

    phase: Literal["load", "vision", "prefill", "decode"]
    weights_resident_bytes: int
    weights_streamed_bytes: int  # copied during the phase, all iterations
    activations_bytes: int
    kv_cache_bytes: int
    staging_bytes: int
    outside_bytes: int
    context_bytes: int
    allocated_peak_bytes: int  # in live blocks; on the CPU arena bytes alive and kernels' blocks
    reserved_peak_bytes: int  # held for blocks; on the CPU arena bytes held and kernels' blocks
    expected_peak_bytes: int
    bound_peak_bytes: int
    seconds: float
    compute_seconds: float
    copy_seconds: float


class Variant(Frozen):
    """The same request with one idea off; `fits` against the same budget."""

    name: str
    bound_bytes: int
    seconds: float
    fits: bool
    note: str


class Move(Frozen):
    """One thing the plan does to fit: how much less it needs than without it, and what that costs in seconds (negative: it is faster too)."""

    name: str
    saved_bytes: int
    paid_seconds: float


class Further(Frozen):
    """What further requests of a session cost: the same plan again in the same arena.

    `question_rows`: of a question about the same images the rows after the last image run, so many at once; None: keys
    and values are not kept, and every request runs as a whole. `kept_bytes`: what libraries keep for these rows beside
    the plan's own shapes, from the first such question on.
    """

    question_rows: int | None
    question_prefill_seconds: float
    question_seconds: float
    request_seconds: float  # of a request with other images
    kept_bytes: int
    bound_peak_bytes: int  # of the whole session


class Prediction(Frozen):
    phases: tuple[PhasePrediction, ...]
    peak_step: str
    terms: tuple[MemoryTerm, ...]  # of the peak step; they add up to expected_peak_bytes
    expected_peak_bytes: int
    bound_peak_bytes: int
    arena_bytes: int
    live_peak_bytes: int  # the packer's lower bound
    seconds: float
    seconds_lower_bound: float
    candidates: int
    smallest_budget_bytes: int
    variants: tuple[Variant, ...]
    moves: tuple[Move, ...] = ()
    further: Further | None = None
