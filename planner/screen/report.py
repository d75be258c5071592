"""The screen: a plan for people, and the plan as one JSON document, for programs."""

from __future__ import annotations

import shlex
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.lines import COLUMNS, wrapped
from planner.plan import Levers, Plan
from planner.plan.shapes import Workload
from planner.queues import APART, Beside
from planner.screen import tables
from planner.units import format_gib, format_seconds

if TYPE_CHECKING:
    from planner.screen.sweep import Frontier, Neighbour

ORDERS = {
    "all_first": "what is resident is loaded first, tower and LLM side by side (SUM)",
    "vision_then_llm": "vision tower, then the LLM in the same bytes (MAX)",
    "prefetch": "LLM weights move into bytes free while images are encoded (MAX)",
}


def as_json(plan: Plan) -> str:
    """The plan itself, as `--out` writes it."""
    return plan.dumps()


def render(
    plan: Plan,
    *,
    path: Path | None = None,
    blocks: bool = True,
    rates: str = "",
    cheaper: Neighbour | None = None,
    faster: Neighbour | None = None,
    beside: Beside = APART,
) -> RenderableType:
    """Verdict, phases, timeline, levers, the peak, the moves and other ways, in 80 columns.

    `path`: where the plan was saved. `blocks`: draw with block characters, otherwise ASCII alone. `rates`: where the
    seconds are known from. `cheaper` and `faster`: the neighbouring budgets. `beside`: how fast each queue is while
    both run.
    """
    parts: list[RenderableType] = [
        Text(_verdict(plan), style="bold green"),
        _facts(_request(plan, rates)),
    ]
    sections: list[RenderableType] = [
        Group(Text(f"phases, in {tables.scale(plan).name}", style="bold"), tables.phases(plan)),
        tables.timeline(plan, blocks=blocks, beside=beside),
        tables.peak(plan),
    ]
    if plan.prediction.moves:
        sections.append(tables.moves(plan))
    if plan.prediction.variants:
        sections.append(tables.others(plan, cheaper, faster))
    sections.append(Group(Text("how", style="bold"), _facts(_levers(plan))))
    sections.append(Group(Text("to run", style="bold"), Text(_run(plan, path))))
    for section in sections:
        parts += [Text(""), section]
    return Group(*parts)


def render_sweep(
    found: Frontier, workload: Workload, *, budget_bytes: int | None = None
) -> RenderableType:
    """Budget against seconds of one request, in 80 columns; the row for a budget is marked."""
    marked = ""
    if budget_bytes is not None:
        typed = typed_budget(found.request, budget_bytes)
        marked = f" What {typed} is good for is marked <--."
        if budget_bytes < found.points[0].budget_bytes:
            marked = f" {typed} is less than the first row's: nothing fits it."
    at_most = "at most " if workload.prompt_is_bound else ""
    tokens = f"{at_most}{_tokens(workload)}"
    return Group(
        Text(f"{found.model} on {found.device}: budget against seconds", style="bold"),
        _facts([*_images(workload), ("prompt", tokens)]),
        Text(""),
        tables.sweep(found, budget_bytes),
        Text(""),
        Text(
            wrapped(
                "Each row is the least budget found for its seconds, start-up included; below the "
                "first nothing fits, above the last nothing is gained. "
                f"{found.device} offers {format_gib(found.usable_bytes)}.{marked}"
            )
        ),
    )


def _facts(rows: list[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    width = COLUMNS - max(len(name) for name, _ in rows) - 4
    for name, value in rows:
        lines = wrapped(value, width=width)
        # rich breaks what it may break anywhere itself, for any terminal
        anywhere = fill(value, width, break_on_hyphens=False)
        table.add_row(Text(f"  {name}"), Text(value if lines == anywhere else lines))
    return table


# --- what is asked ------------------------------------------------------------------------------------------------


def typed_budget(request: str, budget_bytes: int, unit: tables.Scale = tables.IN_GIB) -> str:
    """`16GB (14.90 GiB)`: the budget as the command has it and in GiB; the latter alone where the command has none."""
    words = shlex.split(request)
    typed = words[words.index("--vram") + 1] if "--vram" in words[:-1] else ""
    shown = unit.named(budget_bytes)
    return shown if typed.replace(" ", "") in ("", shown.replace(" ", "")) else f"{typed} ({shown})"


def _verdict(plan: Plan) -> str:
    budget, unit = plan.device.budget_bytes, tables.scale(plan)
    if budget is None:
        return f"{plan.model.name} on {plan.device.profile} needs {unit.named(plan.prediction.bound_peak_bytes)}; no budget was given"
    return f"{plan.model.name} fits {typed_budget(plan.request, budget, unit)} on {plan.device.profile}"


def _request(plan: Plan, rates: str) -> list[tuple[str, str]]:
    prediction, workload = plan.prediction, plan.workload
    at_most = "at most " if workload.prompt_is_bound else ""
    known = f"; rates: {rates}" if rates else ""
    budget = plan.device.budget_bytes
    unit = tables.scale(plan)
    spare = 0 if budget is None else budget - prediction.bound_peak_bytes
    headroom = "" if budget is None else f", {unit.named(spare)} headroom"
    return [
        *_images(workload),
        (
            "prompt",
            f"{at_most}{_tokens(workload)}; KV cache for {workload.context_tokens}",
        ),
        (
            "memory",
            f"{unit.named(prediction.expected_peak_bytes)} expected, "
            f"{unit.named(prediction.bound_peak_bytes)} at most (bound){headroom}",
        ),
        ("seconds", f"{_seconds(plan)}{known}"),
        *_again(plan),
        (
            "search",
            f"{prediction.candidates} settings weighed: in the space searched none takes less "
            f"than {format_seconds(prediction.seconds_lower_bound)} here, "
            f"nor fits less than {unit.named(prediction.smallest_budget_bytes)}",
        ),
    ]


def _tokens(workload: Workload) -> str:
    new = workload.max_new_tokens
    return f"{workload.prompt_tokens} tokens in all, {new} new one{'s' * (new > 1)}"


def _seconds(plan: Plan) -> str:
    """How long the whole takes and a token."""
    text = f"about {format_seconds(plan.prediction.seconds)}"
    decode = [row for row in plan.prediction.phases if row.phase == "decode"]
    if decode and plan.decode_repeats:
        text += f", of it {format_seconds(decode[0].seconds / plan.decode_repeats)} a token"
    return text


def _again(plan: Plan) -> list[tuple[str, str]]:
    """What more of the same takes while the plan stays loaded; nothing where only whole runs would come."""
    further = plan.prediction.further
    if further is None or further.question_rows is None:
        return []
    one = len(plan.workload.images) == 1
    question, request = map(format_seconds, (further.question_seconds, further.request_seconds))
    about = f"a further question about the same image{'' if one else 's'}"
    return [("again", f"{about} {question}, {'another' if one else 'others'} {request}")]


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
    if plan.model.stored is not None:
        rows.append(
            (
                "dtype",
                f"{plan.model.dtype}; weights are converted from {plan.model.stored} as they are read",
            )
        )
    if plan.host_units:
        pinned = sum(unit.size_bytes for unit in plan.host_units)
        rows.append(
            ("host", f"{format_gib(pinned)} of streamed weights stay in pinned host memory (--ram)")
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


def _run(plan: Plan, path: Path | None) -> str:
    """The command that executes this plan, broken before column 80 as a shell takes it."""
    words = [f"execute {shlex.quote(str(path or 'plan.json'))}", "--model DIR"]
    if plan.device.alloc_conf:
        # without it the run would be refused
        words.insert(0, f"PYTORCH_ALLOC_CONF={plan.device.alloc_conf}")
    for image in plan.workload.images:
        size = f"{image.source_width_px}x{image.source_height_px}"
        words.append("--image " + ("FILE" if image.name == size else shlex.quote(image.name)))
    lines = [""]
    for word in [*words, "--prompt TEXT"]:
        if len(lines[-1]) + len(word) > COLUMNS - 5 and lines[-1]:
            lines.append("   ")
        lines[-1] += f" {word}"
    text = " " + " \\\n ".join(lines)
    return text + ("" if path else "\n  (first save the plan: add --out plan.json)")
