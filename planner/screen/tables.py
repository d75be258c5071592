"""The tables of the screen; each has its title for the heading of its first column."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.table import Table
from rich.text import Text

from planner.lines import COLUMNS
from planner.plan import Plan
from planner.queues import APART, Beside
from planner.screen.gantt import bar, columns, gantt, widths
from planner.units import GIB, MIB, format_seconds

if TYPE_CHECKING:
    from planner.screen.sweep import Frontier, FrontierPoint, Neighbour

LABEL, SUMMARY = 10, 14  # columns left and right of the timeline


class Scale(NamedTuple):
    """The unit of a screen's sizes."""

    name: str
    unit_bytes: int
    digits: int

    def show(self, size_bytes: int) -> str:
        return f"{size_bytes / self.unit_bytes:.{self.digits}f}"

    def named(self, size_bytes: int) -> str:
        return f"{self.show(size_bytes)} {self.name}"

    def reads_zero(self, size_bytes: int) -> bool:
        return float(self.show(size_bytes)) == 0


IN_GIB, IN_MIB = Scale("GiB", GIB, 2), Scale("MiB", MIB, 1)


def scale(plan: Plan) -> Scale:
    """GiB, or MiB where the whole plan is smaller than one of these."""
    return IN_GIB if plan.prediction.bound_peak_bytes >= GIB else IN_MIB


def number(seconds: float) -> str:
    return f"{seconds:.2f}" if abs(seconds) < 1000 else f"{seconds:.0f}"


def table(headings: Sequence[tuple[str, bool]], *, gap: int = 1) -> Table:
    """A table with these headings; True: a column of numbers. The last column alone may wrap."""
    made = Table(
        box=None, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold"
    )
    for position, (heading, numeric) in enumerate(headings):
        last = position == len(headings) - 1
        made.add_column(heading, justify="right" if numeric else "left", no_wrap=not last)
    return made


def phases(plan: Plan) -> Table:
    """One row per phase: where its bytes are, its peaks, its seconds."""
    headings = (
        "weights\nresident",
        "weights\nstreamed",
        "activ-\nations",
        "KV\ncache",
        "stag-\ning",
        "work-\nspace",
        "con-\ntext",
        "peak\nexp.",
        "peak\nbound",
        "\nseconds",
    )
    made = table([("\nphase", False), *((heading, True) for heading in headings)])
    show = scale(plan).show
    for row in plan.prediction.phases:
        sizes = (
            row.weights_resident_bytes,
            row.weights_streamed_bytes,
            row.activations_bytes,
            row.kv_cache_bytes,
            row.staging_bytes,
            row.outside_bytes,
            row.context_bytes,
            row.expected_peak_bytes,
            row.bound_peak_bytes,
        )
        cells = [show(size) if size else "-" for size in sizes]
        made.add_row(row.phase, *cells, number(row.seconds))
    total = number(plan.prediction.seconds)
    peaks = show(plan.prediction.expected_peak_bytes), show(plan.prediction.bound_peak_bytes)
    made.add_row("all", *[""] * 7, *peaks, total, style="bold")
    return made


def timeline(plan: Plan, *, blocks: bool, beside: Beside = APART) -> Text:
    """Both queues and the bytes in use over the phases, each phase with a scale of its own."""
    drawn = gantt(plan, beside)
    names = [_phase_name(plan, name) for name, _, _ in drawn.phases]
    seconds = [stop - start for _, start, stop in drawn.phases]
    shown = [format_seconds(s) for s in seconds]
    labels = [max(pair, key=len) for pair in zip(names, shown, strict=True)]
    wide = widths(seconds, labels, COLUMNS - LABEL - SUMMARY - len(names))
    full = max(plan.device.budget_bytes or 0, plan.prediction.bound_peak_bytes)
    computing, copying = drawn.busy
    waits = sum(seconds[1:]) - computing
    summaries = (
        f" waits {_short(waits)}" if waits >= 0.005 * sum(seconds) else " never waits",
        f" busy {_short(copying)}" if copying else "",
        f" of {scale(plan).named(full)}",
    )
    rows = (
        ("compute", drawn.compute, 1.0, False, "blue"),
        ("copies", drawn.copies, 1.0, False, "yellow"),
        ("in use", drawn.alive, float(full), True, "green"),
    )
    mark = "\u2502" if blocks else "|"

    text = Text(no_wrap=True)

    def line(label: str, cells: Sequence[str], end: str = "", *, style: str = "") -> None:
        text.append(f"{label:{LABEL}}")
        for cell, width in zip(cells, wide, strict=True):
            text.append(mark)
            text.append(cell.ljust(width), style=style)
        text.append(mark + end)

    line("timeline", names, style="bold")
    text.append("\n")
    line("", shown)
    for (label, spans, top, most, colour), summary in zip(rows, summaries, strict=True):
        cells = [
            bar(columns(spans, start, stop, width, most=most), top, blocks=blocks)
            for (_, start, stop), width in zip(drawn.phases, wide, strict=True)
        ]
        text.append("\n")
        line(label, cells, summary, style=colour)
    return text


def _short(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"


def _phase_name(plan: Plan, name: str) -> str:
    return f"decode x{plan.decode_repeats}" if name == "decode" else name


def peak(plan: Plan) -> Table:
    """What the device holds at the peak, term by term, each with its error and where it is known from."""
    prediction, unit = plan.prediction, scale(plan)
    headings = [("alive at the peak", False), (unit.name, True), ("error", True)]
    made = table([*headings, ("known from", False)], gap=2)
    small = 0
    for term in prediction.terms:
        error = "" if unit.reads_zero(term.error_bytes) else unit.show(term.error_bytes)
        if unit.reads_zero(term.expected_bytes) and not error:
            small += term.expected_bytes
            continue
        # what follows are details and the sources' own references
        source = re.split("[:;,(]| by | that ", term.source)[0].strip()
        # on the CPU, where pages count from their first write
        name = term.name if term.expected_bytes >= 0 else "of it not yet written"
        made.add_row(name, unit.show(term.expected_bytes), error, source)
    if not unit.reads_zero(small):
        made.add_row("smaller terms together", unit.show(small), "", "")
    made.add_row(
        f"all, in {prediction.peak_step}",
        unit.show(prediction.expected_peak_bytes),
        unit.show(prediction.bound_peak_bytes - prediction.expected_peak_bytes),
        "",
        style="bold",
    )
    return made


def moves(plan: Plan) -> Table:
    """What each move of the plan saves and costs, beside the same plan without that one; those that read 0 are left out."""
    unit = scale(plan)
    title = "each move, beside the plan without it"
    made = table([(title, False), (f"{unit.name} saved", True), ("s paid", True)], gap=2)
    for move in plan.prediction.moves:
        free = abs(move.paid_seconds) < 0.005
        if not free or not unit.reads_zero(move.saved_bytes):
            saved = "0" if unit.reads_zero(move.saved_bytes) else unit.show(move.saved_bytes)
            made.add_row(move.name, saved, "0" if free else number(move.paid_seconds))
    return made


def others(plan: Plan, cheaper: Neighbour | None, faster: Neighbour | None) -> Table:
    """The same request otherwise: the neighbouring budgets, the ideas off, the usual way."""
    budget, prediction, unit = plan.device.budget_bytes, plan.prediction, scale(plan)
    headings = [("the same request, other ways", False), (f"needs {unit.name}", True)]
    headings.append(("seconds", True))
    made = table(headings if budget is None else [*headings, ("fits", False)], gap=2)
    rows = [("this plan", prediction.bound_peak_bytes, prediction.seconds, "yes")]
    for name, point in (("next cheaper budget", cheaper), ("next faster budget", faster)):
        if point is not None:
            fits = "yes" if budget is None or point.budget_bytes <= budget else "no"
            rows.append((f"{name} (estimate)", point.budget_bytes, point.seconds, fits))
    for variant in prediction.variants:
        fits = "yes" if variant.fits else "no"
        same = variant.note == "as in this plan"
        rows.append((variant.name, variant.bound_bytes, variant.seconds, "same" if same else fits))
    for name, size, seconds, fits in rows:
        made.add_row(name, unit.show(size), number(seconds), *([] if budget is None else [fits]))
    return made


def sweep(found: Frontier, budget_bytes: int | None = None) -> Table:
    """One row per point: budget, seconds in all and by phase, and the levers in a few words; the best one within a budget is marked."""
    fitting = [p for p in found.points if budget_bytes and p.budget_bytes <= budget_bytes]
    run = [row.phase for row in found.points[0].phases if row.phase != "load"]
    headings = [("budget\nGiB", True), ("\nseconds", True), *((f"\n{name}", True) for name in run)]
    made = table([*headings, (f"units resident in\n{', '.join(run)}; slots", False)], gap=2)
    for point in found.points:
        words = _in_words(point) + (" <--" if fitting and point is fitting[-1] else "")
        # more than the device offers
        style = "" if point.budget_bytes <= found.usable_bytes else "dim"
        seconds = [number(row.seconds) for row in point.phases if row.phase != "load"]
        made.add_row(
            IN_GIB.show(point.budget_bytes),
            number(point.seconds),
            *seconds,
            words,
            style=style,
        )
    return made


def _in_words(point: FrontierPoint) -> str:
    """`0/66, 13/95, 26/95; 2 slots`, or that all are resident."""
    counts: dict[str, list[int]] = {}
    run = {row.phase for row in point.phases}
    for row in point.levers.residency:
        if row.phase not in run:
            continue  # the vision tower, without images
        count = counts.setdefault(row.phase, [0, 0])
        count[0] += row.resident
        count[1] += row.total
    if all(resident == total for resident, total in counts.values()):
        return "all"
    words = ", ".join(f"{resident}/{total}" for resident, total in counts.values())
    slots = point.levers.staging_depth
    return f"{words}; {slots} slot{'s' * (slots > 1)}"
