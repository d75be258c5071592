"""What `plan` prints: the screen of one plan, or the sweep of all budgets; as text, JSON or a picture."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from planner.devices import rates_from
from planner.errors import InputError
from planner.lines import print_report
from planner.plan import Plan
from planner.problem import Request
from planner.profile import DeviceProfile
from planner.screen import report

PICTURES = (".png", ".svg", ".pdf")


def show_plan(
    plan: Plan, request: Request, device: DeviceProfile, *, json: bool, path: Path | None
) -> None:
    """Print the plan as one JSON document, or its screen; `path` is where it was saved."""
    if json:
        sys.stdout.write(report.as_json(plan))
        return
    from planner.costs import Costs
    from planner.screen.sweep import neighbours

    cheaper, faster = neighbours(request, device, plan)
    screen = report.render(
        plan,
        path=path,
        blocks=_blocks(),
        rates=rates_from(device),
        cheaper=cheaper,
        faster=faster,
        beside=Costs(plan.model, device).beside,
    )
    print_report(screen)


def check_sweep(picture: Path | None, snapshot: Path | None) -> None:
    """InputError for options that a sweep cannot follow, before anything is searched."""
    if snapshot is not None:
        raise InputError("--snapshot: wanted one plan, found --sweep; leave one of them out")
    if picture is None:
        return
    if picture.suffix.lower() not in PICTURES:
        raise InputError(
            f"--out {picture}: wanted a picture of the sweep, a name in {', '.join(PICTURES)}; "
            "for the figures: --sweep --json"
        )
    if find_spec("matplotlib") is None:
        raise InputError(
            f"--out {picture}: wanted matplotlib, which draws it, found none; "
            "install it with: pip install 'stowplan[notebooks]'"
        )


def show_sweep(
    request: Request, device: DeviceProfile, *, json: bool, picture: Path | None, marked: bool
) -> None:
    """Print budget against seconds as a table or one JSON document, and draw it where `picture` says. `marked`: show where the request's budget stands."""
    from planner.screen.sweep import swept

    found = swept(request, device)
    if picture is not None:
        from planner.screen.plots import pareto, save

        save(pareto({f"{found.model} on {found.device}": found}), picture)
        print(f"wrote {picture}", file=sys.stderr)
    if json:
        sys.stdout.write(found.dumps())
    else:
        print_report(
            report.render_sweep(
                found, request.workload, budget_bytes=request.budget_bytes if marked else None
            )
        )


def _blocks() -> bool:
    """Whether to draw with block characters: on a terminal that has them."""
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    return sys.stdout.isatty() and encoding == "utf8"
