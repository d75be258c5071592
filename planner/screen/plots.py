"""Pictures of plans: where the memory goes, step by step. matplotlib is imported only when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.files import write_bytes
from planner.plan import Plan
from planner.plan.program import Buffer
from planner.units import GIB, format_gib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from planner.screen.sizes import SizePoint
    from planner.screen.sweep import Frontier

# the report's words
CONTEXT, KERNELS, ALLOCATOR, VISION, LLM, STAGING, CACHE, RESIDUAL, TILE, HOST, REST = (
    "context",
    "kernels' own blocks",
    "library workspaces and kernels' blocks",
    "vision weights",
    "LLM weights",
    "staging of streamed weights",
    "KV cache",
    "residual streams",
    "activations of a tile",
    "images on the host",
    "rest of the arena",
)
BOUND, BUDGET = "bound", "budget"
# bottom to top; Okabe and Ito 2008, https://jfly.uni-koeln.de/color/, and greys for what no lever moves
COLOURS = {
    CONTEXT: "#7f7f7f",
    KERNELS: "#b3b3b3",
    ALLOCATOR: "#b3b3b3",
    LLM: "#0072B2",
    VISION: "#56B4E9",
    STAGING: "#E69F00",
    CACHE: "#D55E00",
    RESIDUAL: "#009E73",
    TILE: "#F0E442",
    HOST: "#CC79A7",
    REST: "#ececec",
}
_KINDS = {"staging": STAGING, "kv_cache": CACHE, "residual": RESIDUAL, "scratch": TILE}
_WIDTH, _HEIGHT = 6.4, 4.6  # inches of one picture
_NARROW = 3.3  # inches of one of several
_DPI = 100
_FONT = 11  # points; legible at half the width


def kind(buffer: Buffer) -> str:
    """What the buffer is called in a legend; weights by the stage that they belong to."""
    if buffer.kind == "weights":
        return VISION if buffer.name.startswith("weights/visual/") else LLM
    return _KINDS[buffer.kind]


def device_bytes(plan: Plan) -> dict[str, list[int]]:
    """Device bytes of each step by kind, bottom of the stack first; at each step they add up to the step's expected bytes.

    Arena bytes that are alive but not on the device yet (on the CPU: rows of the KV cache that only decode writes,
    weights that are still to arrive) are taken off the first of these kinds. What the plan has nothing of is left out.
    """
    steps = plan.steps
    stack = {name: [0] * len(steps) for name in COLOURS}
    for buffer in plan.buffers:
        row = stack[kind(buffer)]
        for birth, death in buffer.lifetimes:
            for index in range(birth, death):
                row[index] += buffer.size_bytes
    for index, step in enumerate(steps):
        rest = step.resident_bytes - step.live_bytes
        stack[REST][index] = max(rest, 0)
        missing = max(-rest, 0)
        for name in (CACHE, LLM, VISION, STAGING, RESIDUAL, TILE):
            taken = min(missing, stack[name][index])
            stack[name][index] -= taken
            missing -= taken
        stack[CONTEXT][index] = plan.device.context_bytes
        stack[HOST][index] = step.host_bytes
        # a card's allocator keeps the largest step's blocks for the whole run; on the CPU a step has its own
        outside = KERNELS if plan.device.kind == "cpu" else ALLOCATOR
        known = plan.device.context_bytes + step.resident_bytes + step.host_bytes
        stack[outside][index] = step.expected_bytes - known
    return {name: row for name, row in stack.items() if any(row)}


def lifetimes(plan: Plan) -> Figure:
    """What the device holds at each step, by kind, under the lines of the budget and of the bound."""
    return compare({"": plan})


def compare(plans: Mapping[str, Plan]) -> Figure:
    """`lifetimes` of several plans side by side, with one scale of bytes; each under its title."""
    figure, row = _figure(len(plans))
    handles: dict[str, Any] = {}
    for axes, (title, plan) in zip(row, plans.items(), strict=True):
        handles |= _draw_stack(axes, plan)
        _draw_phases(axes, plan, f"{title}\n{_verdict(plan)}" if title else _verdict(plan))
    row[0].set_ylabel("GiB on the device", fontsize=_FONT)
    tops = [max(p.prediction.bound_peak_bytes, p.device.budget_bytes or 0) for p in plans.values()]
    row[0].set_ylim(0, 1.06 * max(tops) / GIB)
    _legend(figure, handles)
    return figure


def offsets(plan: Plan) -> Figure:
    """The arena: each buffer a rectangle, its lifetime wide and its size high, at its offset."""
    from matplotlib.patches import Rectangle

    figure, (axes,) = _figure(1)
    handles: dict[str, Any] = {}
    for buffer in plan.buffers:
        name = kind(buffer)
        for birth, death in buffer.lifetimes:
            corner = (birth, buffer.offset_bytes / GIB)
            size = (death - birth, buffer.size_bytes / GIB)
            rectangle = Rectangle(corner, *size, facecolor=COLOURS[name], linewidth=0)
            handles.setdefault(name, axes.add_patch(rectangle))
    _draw_phases(axes, plan, f"arena of {format_gib(plan.prediction.arena_bytes)}")
    axes.set_ylabel("offset in the arena, GiB", fontsize=_FONT)
    axes.set_ylim(0, plan.prediction.arena_bytes / GIB)
    _legend(figure, handles)
    return figure


def _figure(count: int, *, share: bool = True) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    size = max(_WIDTH, _NARROW * count), _HEIGHT
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    return figure, figure.subplots(1, count, sharey=share, squeeze=False)[0]


def _verdict(plan: Plan) -> str:
    bound, budget = plan.prediction.bound_peak_bytes, plan.device.budget_bytes
    fits = "" if budget is None else ", fits" if bound <= budget else ", does not fit"
    return f"at most {format_gib(bound)}{fits}"


def _draw_stack(axes: Axes, plan: Plan) -> dict[str, Any]:
    """Areas and lines; their handles by name, for a legend."""
    handles: dict[str, Any] = {}
    edges = range(len(plan.steps) + 1)
    below = [0.0] * len(edges)
    for name, row in device_bytes(plan).items():
        # a step is as wide as one; the last value is drawn up to the right edge
        above = [b + size / GIB for b, size in zip(below, [*row, row[-1]], strict=True)]
        handles[name] = axes.fill_between(
            edges, below, above, step="post", facecolor=COLOURS[name], linewidth=0
        )
        below = above
    bound = plan.prediction.bound_peak_bytes / GIB
    handles[BOUND] = axes.axhline(bound, color="black", linewidth=1.2, linestyle=":")
    if plan.device.budget_bytes is not None:
        budget = plan.device.budget_bytes / GIB
        handles[BUDGET] = axes.axhline(budget, color="black", linewidth=1.6, linestyle="--")
    return handles


def _draw_phases(axes: Axes, plan: Plan, title: str) -> None:
    """Marks between phases, their names under the axis, and the title."""
    middles, names, start = [], [], 0
    for phase, group in groupby(plan.steps, key=lambda step: step.phase):
        stop = start + sum(1 for _ in group)
        if start:
            axes.axvline(start, color="black", linewidth=0.8)
        middles.append((start + stop) / 2)
        names.append(
            f"decode \N{MULTIPLICATION SIGN}{plan.decode_repeats}" if phase == "decode" else phase
        )
        start = stop
    axes.set_xlim(0, len(plan.steps))
    axes.set_xticks(middles, names)
    axes.set_xlabel(f"{len(plan.steps)} steps", fontsize=_FONT)
    axes.tick_params(axis="x", length=0)
    axes.tick_params(labelsize=_FONT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=_FONT)


def _legend(figure: Figure, handles: Mapping[str, Any]) -> None:
    names = [name for name in (*COLOURS, BOUND, BUDGET) if name in handles]
    figure.legend(
        [handles[name] for name in names],
        names,
        loc="outside lower center",
        ncols=2 if len(figure.axes) == 1 else 4,
        frameon=False,
        fontsize=_FONT,
    )


# --- budget against seconds ---------------------------------------------------------------------------------------

# Okabe and Ito's eight without yellow, which is hard to see as a line; marks tell them apart in grey, too
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")


def pareto(frontiers: Mapping[str, Frontier]) -> Figure:
    """Budget against seconds, one line per frontier; hollow marks need more than the device offers."""
    figure, (axes,) = _figure(1)
    for number, (title, frontier) in enumerate(frontiers.items()):
        colour, mark = _LINES[number % len(_LINES)], _MARKS[number % len(_MARKS)]
        sizes = [point.budget_bytes / GIB for point in frontier.points]
        seconds = [point.seconds for point in frontier.points]
        # a guide for the eye: between two points lie more
        axes.plot(sizes, seconds, color=colour, linewidth=1.0, alpha=0.6)
        offered = frontier.usable_bytes / GIB
        for inside in (True, False):
            axes.plot(
                [size for size in sizes if (size <= offered) == inside],
                [s for size, s in zip(sizes, seconds, strict=True) if (size <= offered) == inside],
                color=colour,
                marker=mark,
                markersize=5,
                markerfacecolor=colour if inside else "white",
                linestyle="none",
                label=title if inside else None,
            )
    axes.set_xlabel("budget, GiB", fontsize=_FONT)
    axes.set_ylabel("seconds", fontsize=_FONT)
    _logarithmic(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=_FONT)
    return figure


def by_pixels(points: Sequence[SizePoint]) -> Figure:
    """What the usual way and the plan need, and how long they take, against the size of the image."""
    figure, (left, right) = _figure(2, share=False)
    megapixels = [point.megapixels for point in points]
    rows = {
        "the usual way": [point.usual for point in points],
        "the plan": [point.planned for point in points],
    }
    for number, (title, predictions) in enumerate(rows.items()):
        style = {"color": _LINES[1 - number], "marker": _MARKS[number], "markersize": 5}
        sizes = [p.bound_peak_bytes / GIB for p in predictions]
        left.plot(megapixels, sizes, label=title, **style)  # type: ignore[arg-type]
        right.plot(megapixels, [p.seconds for p in predictions], **style)  # type: ignore[arg-type]
    smallest = [point.planned.smallest_budget_bytes / GIB for point in points]
    left.plot(
        megapixels,
        smallest,
        color=_LINES[2],
        marker=_MARKS[2],
        markersize=5,
        label="the least plan",
    )
    left.axhline(
        points[0].budget_bytes / GIB, color="black", linewidth=1.6, linestyle="--", label=BUDGET
    )
    for axes, name in ((left, "GiB on the device, bound"), (right, "seconds")):
        axes.set_ylim(bottom=0)
        axes.set_xlabel("megapixels", fontsize=_FONT)
        axes.set_ylabel(name, fontsize=_FONT)
        _gridded(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=_FONT)
    return figure


def _logarithmic(axes: Axes) -> None:
    """Powers of two along x, 1, 2 and 5 along y, in plain numbers, on a light grid."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    _gridded(axes)


def _gridded(axes: Axes) -> None:
    axes.tick_params(labelsize=_FONT)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write a picture whole or not at all, the same bytes for the same picture; RunFailed where it cannot be written."""
    from matplotlib import rc_context

    kind_ = path.suffix.lower().removeprefix(".")
    dates: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "svg": {"Date": None},
        "pdf": {"CreationDate": None},
    }
    made = BytesIO()
    with rc_context({"svg.hashsalt": "stowplan"}):  # ids in the file, else random
        figure.savefig(made, format=kind_, metadata=dates[kind_])
    write_bytes(path, made.getvalue())
