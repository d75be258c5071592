"""Predicted beside recorded: a join of plan and record on step ids and phases."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from executor.record import PhaseRecord, Record
from planner.plan import Plan
from planner.units import format_gib, format_mib, format_seconds


@dataclass(frozen=True, slots=True)
class Row:
    """One phase. Recorded values are None where the phase did not run or nobody could tell."""

    phase: str
    expected_bytes: int
    bound_bytes: int
    recorded_bytes: int | None
    predicted_seconds: float
    recorded_seconds: float | None
    unaccounted_bytes: (
        int | None
    )  # device bytes that context, arena, host objects and kernels do not explain

    @property
    def passed_bound(self) -> bool:
        return self.recorded_bytes is not None and self.recorded_bytes > self.bound_bytes


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step that check runs watched."""

    id: str
    expected_bytes: int
    recorded_bytes: int | None
    predicted_outside_bytes: int
    recorded_outside_bytes: int | None
    predicted_seconds: float
    recorded_seconds: float  # of one repeat


@dataclass(frozen=True, slots=True)
class Comparison:
    device: str
    rows: tuple[Row, ...]
    steps: tuple[StepRow, ...]
    expected_bytes: int
    bound_bytes: int
    recorded_bytes: int | None
    budget_bytes: int | None
    expected_context_bytes: int
    recorded_context_bytes: int | None
    passed_budget: bool
    notes: tuple[str, ...]


def compare(plan: Plan, record: Record) -> Comparison:
    """Every phase and step of the plan with what the record has for it."""
    phases = {phase.phase: phase for phase in record.phases}
    steps = {step.id: step for step in record.steps}
    outside: dict[str, int | None] = {}
    for step in record.steps:
        if step.outside_bytes is not None:
            outside[step.phase] = max(step.outside_bytes, outside.get(step.phase) or 0)
    rows = []
    # a further question about the same images: its phases alone, and prefill over its own rows
    further = plan.prediction.further if record.reused_tokens else None
    kept_bytes = further.kept_bytes if further else 0
    for predicted in plan.prediction.phases:
        phase = phases.get(predicted.phase)
        if further and phase is None:
            continue
        seconds = predicted.seconds
        if further and predicted.phase == "prefill":
            seconds = further.question_prefill_seconds
        rows.append(
            Row(
                phase=predicted.phase,
                expected_bytes=predicted.expected_peak_bytes,
                bound_bytes=predicted.bound_peak_bytes + kept_bytes,
                recorded_bytes=phase.peak_bytes if phase else None,
                predicted_seconds=seconds,
                recorded_seconds=phase.seconds if phase else None,
                unaccounted_bytes=_unaccounted(phase, record, outside.get(predicted.phase)),
            )
        )
    joined = tuple(
        StepRow(
            id=step.id,
            expected_bytes=step.expected_bytes,
            recorded_bytes=steps[step.id].peak_bytes,
            predicted_outside_bytes=step.outside_bytes,
            recorded_outside_bytes=steps[step.id].outside_bytes,
            predicted_seconds=step.seconds,
            recorded_seconds=steps[step.id].seconds / max(1, steps[step.id].count),
        )
        for step in plan.steps
        if step.id in steps
    )
    return Comparison(
        device=record.device_name,
        rows=tuple(rows),
        steps=joined,
        expected_bytes=plan.prediction.expected_peak_bytes,
        bound_bytes=plan.prediction.bound_peak_bytes,
        recorded_bytes=record.peak_bytes,
        budget_bytes=record.budget_bytes,
        expected_context_bytes=plan.device.context_bytes,
        recorded_context_bytes=record.context_bytes,
        passed_budget=record.passed_budget,
        notes=record.notes,
    )


def render(comparison: Comparison) -> RenderableType:
    """The table that `execute` ends with, at most 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("phase")
    for heading in ("expected", "bound", "recorded", "error", "predicted", "took"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in comparison.rows:
        table.add_row(
            row.phase,
            format_gib(row.expected_bytes),
            format_gib(row.bound_bytes),
            _gib(row.recorded_bytes),
            _error(row.recorded_bytes, row.expected_bytes),
            format_seconds(row.predicted_seconds),
            "-" if row.recorded_seconds is None else format_seconds(row.recorded_seconds),
            style="bold red" if row.passed_bound else None,
        )
    table.add_section()
    table.add_row(
        "peak",
        format_gib(comparison.expected_bytes),
        format_gib(comparison.bound_bytes),
        _gib(comparison.recorded_bytes),
        _error(comparison.recorded_bytes, comparison.expected_bytes),
        style="bold",
    )
    lines = [
        f"context        {format_mib(comparison.expected_context_bytes)} predicted, "
        f"{_mib(comparison.recorded_context_bytes)} recorded"
    ]
    unaccounted = [
        f"{row.phase} {_mib(row.unaccounted_bytes)}"
        for row in comparison.rows
        if row.unaccounted_bytes is not None
    ]
    if unaccounted:
        lines.append("unaccounted    " + ", ".join(unaccounted))
    if comparison.budget_bytes is not None and comparison.recorded_bytes is not None:
        over = comparison.recorded_bytes - comparison.budget_bytes
        lines.append(
            f"budget         {format_gib(comparison.budget_bytes)}: "
            + (
                f"passed by {format_mib(over)}"
                if comparison.passed_budget
                else f"kept, {format_mib(-over)} of headroom"
            )
        )
    lines += [f"note           {note}" for note in comparison.notes]
    return Group(
        Text(f"predicted and recorded device bytes, {comparison.device}"),
        table,
        Text("\n".join(lines)),
    )


def _unaccounted(
    phase: PhaseRecord | None, record: Record, outside_bytes: int | None
) -> int | None:
    """Recorded peak minus all that was recorded one by one; kernels' bytes are part of it where nobody looked at them."""
    if phase is None or phase.peak_bytes is None or record.context_bytes is None:
        return None
    if phase.reserved_bytes is not None:
        return phase.peak_bytes - record.context_bytes - phase.reserved_bytes
    known = record.context_bytes + (phase.arena_bytes or 0) + phase.host_bytes
    return phase.peak_bytes - known - (outside_bytes or 0)


def _gib(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else format_gib(size_bytes)


def _mib(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else format_mib(size_bytes)


def _error(recorded: int | None, expected: int) -> str:
    if recorded is None or not expected:
        return "-"
    return f"{(recorded - expected) / expected:+.1%}"
