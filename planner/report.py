"""The report of a plan, for people, and the plan as one JSON document, for programs."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.plan import Levers, Plan, Workload
from planner.units import GIB, format_gib, format_seconds

ORDERS = {
    "all_first": "what is resident is loaded first, vision tower and LLM side by side (SUM)",
    "vision_then_llm": "vision tower, then the LLM in the same bytes (MAX)",
    "prefetch": "LLM weights move into bytes that are free while images are encoded (MAX)",
}


def as_json(plan: Plan) -> str:
    """The plan itself, as `--out` writes it."""
    return plan.dumps()


def render(plan: Plan, *, path: Path | None = None) -> RenderableType:
    """Verdict, levers, phases, the peak and the ideas switched off, in 80 columns. `path`: where the plan was saved."""
    parts: list[RenderableType] = [Text(_verdict(plan), style="bold"), _facts(_request(plan))]
    sections: list[tuple[str, RenderableType]] = [
        ("how", _facts(_levers(plan))),
        ("phases, in GiB; seconds are estimates", _phases(plan)),
        (f"alive at the peak, {plan.prediction.peak_step}", _peak(plan)),
    ]
    if plan.prediction.variants:
        sections.append(("the same request with an idea off, in GiB", _variants(plan)))
    sections.append(("to run", Text(_run(plan, path))))
    for title, body in sections:
        parts += [Text(""), Text(title, style="bold"), body]
    return Group(*parts)


def _facts(rows: list[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(Text(f"  {name}"), Text(value))
    return table


# --- what is asked ------------------------------------------------------------------------------------------------


def _verdict(plan: Plan) -> str:
    budget, peak = plan.device.budget_bytes, plan.prediction.bound_peak_bytes
    if budget is None:
        return f"{plan.model.name} on {plan.device.profile} needs {format_gib(peak)}; no budget was given"
    return (
        f"{plan.model.name} fits {format_gib(budget)} on {plan.device.profile} "
        f"({format_gib(budget - peak)} headroom)"
    )


def _request(plan: Plan) -> list[tuple[str, str]]:
    prediction, workload = plan.prediction, plan.workload
    at_most = "at most " if workload.prompt_is_bound else ""
    return [
        *_images(workload),
        (
            "prompt",
            f"{at_most}{workload.prompt_tokens} tokens in all, {workload.max_new_tokens} new ones; "
            f"KV cache for {workload.context_tokens}",
        ),
        (
            "peak",
            f"{format_gib(prediction.expected_peak_bytes)} expected, "
            f"{format_gib(prediction.bound_peak_bytes)} at most (bound), everything included",
        ),
        (
            "seconds",
            f"about {format_seconds(prediction.seconds)}, an estimate; lower bound of the "
            f"{prediction.candidates} weighed {format_seconds(prediction.seconds_lower_bound)}",
        ),
        (
            "smallest",
            f"{format_gib(prediction.smallest_budget_bytes)} is the least budget that has a plan",
        ),
    ]


def _images(workload: Workload) -> list[tuple[str, str]]:
    """One row per image; equal images side by side share one."""
    counts: dict[tuple[str, str], int] = {}
    for image in workload.images:
        size = f"{image.source_width_px}x{image.source_height_px}"
        name = size if image.name == size else f"{image.name} {size}"
        seen = f"{image.width_px}x{image.height_px}"
        key = (name, f"{seen} px, {image.patches} patches, {image.tokens} tokens")
        counts[key] = counts.get(key, 0) + 1
    rows = [
        ("image", (f"{count} x " if count > 1 else "") + f"{name} -> {seen}")
        for (name, seen), count in counts.items()
    ]
    return rows or [("image", "none")]


# --- how ----------------------------------------------------------------------------------------------------------


def _levers(plan: Plan) -> list[tuple[str, str]]:
    levers = plan.levers
    streams = any(copy.buffer.startswith("staging/") for copy in plan.copies)
    slots = levers.staging_depth
    rows = [("order", ORDERS[levers.order])] if plan.workload.images else []
    if len(plan.workload.images) > 1:
        rows.append(("images", "together" if levers.images_together else "one after another"))
    rows.append(
        ("staging", f"{slots} slot{'s' * (slots > 1)}" if streams else "none: nothing is streamed")
    )
    for phase in ("vision", "prefill", "decode"):
        counts = [r for r in levers.residency if r.phase == phase]
        if counts and (phase != "vision" or plan.workload.images):
            resident = ", ".join(
                f"{r.unit_class.partition('.')[2]} {r.resident}/{r.total}" for r in counts
            )
            rows.append((phase, f"resident {resident}"))
    return [*rows, ("tiles", _tiles(levers, plan))]


def _tiles(levers: Levers, plan: Plan) -> str:
    tiles, model = levers.tiles, plan.model
    parts = []
    if plan.workload.images:
        heads = f" x {tiles.query_heads} heads" if tiles.query_heads < model.vision.heads else ""
        parts += [
            f"patches {tiles.patch_rows}",
            f"windows {tiles.window_rows}",
            f"queries {tiles.query_rows}{heads}",
            f"vision MLP {tiles.vision_mlp_rows}",
            f"merger {tiles.merger_rows}",
        ]
    heads = f" x {tiles.prompt_heads} KV heads" if tiles.prompt_heads < model.text.kv_heads else ""
    parts += [
        f"prompt {tiles.prompt_rows}{heads}",
        f"prompt MLP {tiles.prompt_mlp_rows}",
        f"vocabulary {tiles.vocabulary_rows} rows",
    ]
    return ", ".join(parts)


# --- tables -------------------------------------------------------------------------------------------------------


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f}"


def _number(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 1000 else f"{seconds:.0f}"


def _table(columns: list[tuple[str, bool]], *, gap: int = 1) -> Table:
    """A table with these headings; True: a column of numbers. The last column alone may wrap."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0))
    for heading, number in columns:
        last = heading == columns[-1][0]
        table.add_column(heading, justify="right" if number else "left", no_wrap=not last)
    return table


def _phases(plan: Plan) -> Table:
    headings = (
        "weights\nresident",
        "weights\nstreamed",
        "activ-\nations",
        "KV\ncache",
        "stag-\ning",
        "own\nblocks",
        "con-\ntext",
        "peak\nexp.",
        "peak\nbound",
        "\nseconds",
    )
    table = _table([("\nphase", False), *((heading, True) for heading in headings)])
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
        table.add_row(row.phase, *(_gib(size) for size in sizes), _number(row.seconds))
    total = _number(plan.prediction.seconds)
    peaks = _gib(plan.prediction.expected_peak_bytes), _gib(plan.prediction.bound_peak_bytes)
    table.add_row("all", *[""] * 7, *peaks, total, style="bold")
    return table


def _peak(plan: Plan) -> Table:
    table = _table(
        [("term", False), ("GiB", True), ("at most +", True), ("known from", False)], gap=2
    )
    for term in plan.prediction.terms:
        error = _gib(term.error_bytes) if term.error_bytes else ""
        source = term.source.partition(":")[0]  # what follows are the sources' own references
        table.add_row(term.name, _gib(term.expected_bytes), error, source)
    prediction = plan.prediction
    error = _gib(prediction.bound_peak_bytes - prediction.expected_peak_bytes)
    table.add_row("all", _gib(prediction.expected_peak_bytes), error, "", style="bold")
    return table


def _variants(plan: Plan) -> Table:
    budget, prediction = plan.device.budget_bytes, plan.prediction
    headings = [
        ("variant", False),
        ("bound", True),
        ("seconds", True),
        ("fits", False),
        ("", False),
    ]
    table = _table(headings if budget is not None else [*headings[:3], headings[4]], gap=2)
    rows = [("this plan", prediction.bound_peak_bytes, prediction.seconds, True, "")]
    rows += [(v.name, v.bound_bytes, v.seconds, v.fits, v.note) for v in prediction.variants]
    for name, size, seconds, fits, note in rows:
        verdict = [] if budget is None else ["yes" if fits else "no"]
        table.add_row(name, _gib(size), _number(seconds), *verdict, note)
    return table


def _run(plan: Plan, path: Path | None) -> str:
    """The command that executes this plan."""
    words = ["execute", str(path or "plan.json")]
    command = shlex.join(words) + " --model DIR"
    for image in plan.workload.images:
        size = f"{image.source_width_px}x{image.source_height_px}"
        command += " --image " + ("FILE" if image.name == size else shlex.quote(image.name))
    command += " --prompt TEXT"
    return f"  {command}" + ("" if path else "\n  (first save the plan: add --out plan.json)")
