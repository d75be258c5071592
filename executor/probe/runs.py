"""What runs of small random models tell: start-up, context, and what steps and copies take beyond their kernels."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from executor.probe.figures import measured_by
from executor.record import Record
from planner.errors import RunFailed
from planner.plan import Plan, write_text
from planner.plan.words import Kind
from planner.profile import DeviceProfile, dumps

PLAN = "import sys; sys.path[0] = sys.argv.pop(1); from planner.cli import main; sys.exit(main())"
EXECUTE = (
    "import sys; sys.path[0] = sys.argv.pop(1); from executor.cli import main; sys.exit(main())"
)

KINDS: tuple[Kind, ...] = get_args(Kind)


class Told(NamedTuple):
    """What a small model's runs told beside what their plan predicts from the tables alone."""

    start_s: float
    context_bytes: int | None
    steps_s: dict[Kind, float]
    copy_s: float


def told(profile: DeviceProfile, spec: str, folder: Path | None, repeats: int) -> Told:
    """Start-up, context and what steps and copies cost beside their kernels: a random checkpoint, planned with this profile and run."""
    from executor.make_checkpoint import make_random_checkpoint

    root = str(Path(__file__).resolve().parents[2])  # the packages lie side by side
    with tempfile.TemporaryDirectory(dir=folder, prefix=".probe-") as name:
        place = Path(name)
        make_random_checkpoint(spec, place / spec)
        write_text(place / "profile.json", dumps(profile))
        from PIL import Image as Pillow

        Pillow.new("RGB", (112, 112), (90, 120, 150)).save(place / "image.png")
        what = ["--model", str(place / spec), "--image", str(place / "image.png")]
        what += ["--prompt", "probe"]
        device = ["--device", str(place / "profile.json"), "--max-new-tokens", "16"]
        _call(PLAN, root, [*what, *device, "--out", str(place / "plan.json"), "--json"])
        plan = Plan.load(place / "plan.json")
        records = []
        for _ in range(repeats + 1):
            run = [str(place / "plan.json"), *what, "--record", str(place / "record.json")]
            _call(EXECUTE, root, [*run, "--quiet"])
            records.append(Record.load(place / "record.json"))
    records = records[1:]  # the first finds files that are not in memory yet
    starts = [
        phase.seconds for record in records for phase in record.phases if phase.phase == "load"
    ]
    contexts = [r.context_bytes for r in records if r.context_bytes is not None]
    context = None
    if contexts:
        # what the model adds is in the plan already
        context = (
            profile.context_bytes + round(statistics.median(contexts)) - plan.device.context_bytes
        )
    copies = [c.seconds / c.count for record in records for c in record.copies if c.count]
    # opening the image and priming are in the plan's load phase already
    beside = next(p.seconds for p in plan.prediction.phases if p.phase == "load") - profile.start_s
    start = max(0.05, statistics.median(starts) - beside)
    return Told(start, context, _beyond_kernels(plan, records), statistics.median(copies))


def _beyond_kernels(plan: Plan, records: Sequence[Record]) -> dict[Kind, float]:
    """Of each kind of step the seconds that the plan, which knows of kernels alone, does not have: with the time between steps."""
    steps = {step.id: step for step in plan.steps}
    between = statistics.median(
        (phase.seconds - phase.waited_seconds - sum(s.seconds for s in mine))
        / sum(s.count for s in mine)
        for record in records
        for phase in record.phases
        if (mine := [s for s in record.steps if s.phase == phase.phase])
    )
    found: dict[Kind, list[float]] = {}
    for phases in (("decode",), ("vision", "prefill")):
        known = set(found)  # where decode has a kind, it has many of them
        for record in records:
            for ran in record.steps:
                step = steps[ran.id]
                if ran.phase not in phases or step.kind in known:
                    continue
                # the first of a loop has new pages and code to find, where there are others
                count, seconds = ran.count, ran.seconds
                if count > 1:
                    count, seconds = count - 1, seconds - ran.first_seconds
                found.setdefault(step.kind, []).append(seconds / count - step.seconds)
    return {
        kind: max(0.0, statistics.median(found.get(kind, [0.0])) + max(0.0, between))
        for kind in KINDS
    }


def _call(program: str, root: str, arguments: Sequence[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, root, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    if done.returncode not in (0, 4):
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise RunFailed(f"--probe: a tiny model's run ended with {done.returncode}: {lines[-1]}")


def with_steps(
    profile: DeviceProfile, step_s: dict[Kind, tuple[float, float]], **changes: Any
) -> DeviceProfile:
    assert profile.measured is not None
    measured = profile.measured.model_copy(update={"step_s": step_s, **changes})
    return profile.model_copy(update={"measured": measured})


def with_told(profile: DeviceProfile, near: Told, far: Told) -> DeviceProfile:
    """With what runs told: of a model whose weights stay in the caches, and of one whose weights do not."""
    found = with_steps(
        profile,
        {kind: (near.steps_s[kind], far.steps_s[kind]) for kind in KINDS},
        copy_s=near.copy_s,
    )
    changes: dict[str, Any] = {"start_s": round(near.start_s, 3)}
    sources = {
        **profile.sources,
        "start_s": f"{measured_by()}: a tiny model's load phase less what its plan counts beside this figure",
    }
    if near.context_bytes is not None:
        changes["context_bytes"] = near.context_bytes
        sources["context_bytes"] = (
            f"{measured_by()}: a tiny model's, less what its plan counts beside this figure"
        )
    return found.model_copy(update={**changes, "sources": sources})
