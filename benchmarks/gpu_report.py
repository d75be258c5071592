"""One report on this machine's card: tests, probe, predicted beside recorded, how well copies hide. `make gpu` calls it.

    python benchmarks/gpu_report.py [--device cuda|cpu] [--quick] [--out DIR] [--work DIR] [--seconds 570]

Writes report.md, probe.json (the device profile, for plan --device), and plans/ and records/ of every run to the folder
--out. Random checkpoints are made in a folder that is deleted at the end. Everything that touches the card is a process
of its own, so that each starts with no context, and a fault ends none but itself. What does not come to an end within
--seconds is left out, and a line says so. The exit code is 0 where the report was written, whatever it found.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from executor.record import Record
from planner.plan import Plan, write_text
from planner.profile import DeviceProfile, dumps, load_profile
from planner.units import GIB, MIB

ROOT = Path(__file__).resolve().parent.parent
PHOTO = ROOT / "examples" / "earth_3840x2160.jpg"
PROMPT = "Describe this image."
PACKAGES = {
    "pynvml": "nvidia-ml-py: without it device bytes are the whole card's, other programs' counted in",
    "pytest": "the tests",
    "matplotlib": "a picture of the peaks",
    "transformers": "none of this report; the tests on the CPU compare with it",
}
# set for the library or by a platform, they change what a card holds; a plan refuses to run under them
CHANGE_BYTES = (
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING"),
    *("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE"),
)
ABOUT = """
import json, platform, torch
found = {"python": platform.python_version(), "system": platform.platform(), "torch": torch.__version__}
found |= {"cuda": torch.version.cuda, "card": None}
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    found |= {"card": p.name, "capability": [p.major, p.minor], "sm": p.multi_processor_count}
    found |= {"total": total, "free": free, "uuid": str(getattr(p, "uuid", None))}
print("ABOUT" + json.dumps(found))
"""
BASE = "from executor.probe import base_profile; from planner.profile import dumps; import sys; sys.stdout.write(dumps(base_profile(sys.argv[1])))"
SHORT_PROBE = "import sys; from pathlib import Path; from executor.probe import run_probe; run_probe(Path(sys.argv[1]), device=sys.argv[2], short=True, quiet=True)"


class Left(Exception):
    """A part of the report that could not be made; its text is the line that stands there instead."""


class Size(NamedTuple):
    """What is run: checkpoints by name of make-random-checkpoint, image sizes, budgets between least and unlimited."""

    models: tuple[str, ...]
    images: tuple[str, ...]
    budgets: int
    new_tokens: int


TESTS_S = 150.0  # kept for the tests, which come last
FULL = Size(("tiny", "small", "3b"), ("448x448", "1920x1080", "3840x2160"), 3, 8)
QUICK = Size(("tiny",), ("448x448",), 2, 4)


class Cell(NamedTuple):
    """One run."""

    model: str
    image: str
    budget: str
    plan: Plan
    record: Record


@dataclass
class Report:
    """Lines so far, where things go, and until when."""

    device: str
    size: Size
    out: Path
    work: Path
    ends: float
    lines: list[str] = field(default_factory=list)
    profile: Path = Path("none")
    cells: list[Cell] = field(default_factory=list)
    half: str = ""  # dtype suffix of 16-bit checkpoints
    free_bytes: int | None = None

    def say(self, *lines: str) -> None:
        self.lines += lines
        for line in lines:
            print(line, flush=True)

    def part(self, title: str, make: Callable[[Report], None]) -> None:
        """One section; what it cannot tell is a line of it."""
        self.say("", f"## {title}")
        begun = time.monotonic()
        try:
            make(self)
        except Left as error:
            self.say(f"Left out: {error}")
        self.say("", f"({time.monotonic() - begun:.0f} s)")

    def call(self, *arguments: str, seconds: float = 600.0, fine: Sequence[int] = (0,)) -> str:
        """What a Python of its own says on stdout; Left with its last line where it fails or time runs out."""
        rest = min(seconds, self.ends - time.monotonic())
        if rest < 2:
            raise Left("no time left for it (--seconds)")
        environment = {k: v for k, v in os.environ.items() if k not in CHANGE_BYTES}
        paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        try:
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=rest,
            )
        except subprocess.TimeoutExpired:
            raise Left(f"not at an end after {rest:.0f} s: {' '.join(arguments)[:120]}") from None
        if done.returncode not in fine:
            said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
            first = next((line for line in said if line.startswith("error: ")), said[-1])
            raise Left(f"exit code {done.returncode}: {first}")
        return done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where the report was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="the smallest of everything")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"))
    parser.add_argument("--work", type=Path, help="where checkpoints are made, 8 GB at most")
    parser.add_argument("--seconds", type=float, default=570.0, help="for everything together")
    options = parser.parse_args(arguments)
    ends = time.monotonic() + options.seconds
    out = options.out.resolve()
    for folder in (out, out / "plans", out / "records"):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-report-", dir=options.work) as work:
        size = QUICK if options.quick else FULL
        report = Report(options.device, size, out, Path(work), ends)
        report.say(f"# Stowplan on {options.device}, {time.strftime('%Y-%m-%d %H:%M')}")
        report.part("Machine", machine)
        report.part("Probe", probe)
        report.part("Runs: predicted beside recorded", runs)
        report.part("Context", context)
        report.part("Streaming: seconds beside max(compute, bytes / link)", streaming)
        report.part("Tests", tests)
        report.part("Picture", picture)
    write_text(out / "report.md", "\n".join(report.lines) + "\n")
    print(f"wrote {out / 'report.md'}")
    return 0


# --- machine and probe --------------------------------------------------------------------------------------------


def machine(report: Report) -> None:
    import json

    said = report.call("-c", ABOUT)
    about = json.loads(said.rpartition("ABOUT")[2])
    report.say("", *(f"- {key}: {value}" for key, value in about.items()))
    report.say(*(f"- not here: {name} ({why})" for name, why in PACKAGES.items() if not _has(name)))
    unset = [name for name in CHANGE_BYTES if name in os.environ]
    if unset:
        report.say(f"- set here, and unset for all runs below: {', '.join(unset)}")
    if report.device == "cuda" and about["card"] is None:
        # nothing of what follows would be a card's
        report.ends = 0.0
        raise Left(
            "torch sees no card, so nothing below can run; give --device cpu to try the script"
        )
    if report.device == "cuda":
        report.free_bytes = about["free"]
        report.half = "" if about["capability"][0] >= 8 else ":float16"


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def probe(report: Report) -> None:
    report.profile = report.out / "probe.json"
    try:
        if report.size is QUICK:
            report.call("-c", SHORT_PROBE, str(report.profile), report.device)
        else:
            given = ["--device", report.device, "--model", str(report.work), "--quiet"]
            command = ["-m", "executor.cli", "--probe", "--out", str(report.profile), *given]
            report.call(*command, seconds=240)
    except Left as error:
        report.say(f"Left out: {error}", "The runs below go by the profile that comes nearest.")
        write_text(report.profile, report.call("-c", BASE, report.device))
    found = load_profile(str(report.profile))
    report.say(
        "",
        f"- {found.name}: {found.bandwidth_bytes_per_s / 1e9:.0f} GB/s memory, "
        f"{found.matmul_flops_per_s.bits16[-1][1] / 1e12:.1f} TFLOP/s in 16 bits",
        f"- to the device {found.host_to_device_bytes_per_s / 1e9:.1f} GB/s, page cache "
        f"{found.page_cache_bytes_per_s / 1e9:.1f}, disk {found.disk_bytes_per_s / 1e9:.2f}; smallest call {found.launch_s * 1e6:.1f} us",
        f"- {found.sources.get('host_to_device_bytes_per_s', '')}",
    )


# --- runs ---------------------------------------------------------------------------------------------------------


def runs(report: Report) -> None:
    head = ["expected", "bound", "recorded", "allocated", "reserved", "predicted", "took"]
    report.say(
        "",
        "Device peaks in MiB; allocated and reserved as recorded less predicted in bytes, of the whole run.",
        "",
        f"| checkpoint | image | budget | {' | '.join(head)} |",
        f"|---|---|---|{'---:|' * len(head)}",
    )
    ends = report.ends
    if report.size is FULL:
        report.ends -= TESTS_S
    for model in report.size.models:
        folder = report.work / model
        dtype = report.half if model != "tiny" else ""
        try:
            command = ["--make-random-checkpoint", f"{model}{dtype}", str(folder), "--quiet"]
            report.call("-m", "executor.cli", *command)
        except Left as error:
            report.say(f"| {model} | | | left out: {error} |")
            continue
        for size in report.size.images:
            try:
                _image_runs(report, model, folder, size)
            except Left as error:
                report.say(f"| {model} | {size} | | left out: {error} |")
        shutil.rmtree(folder, ignore_errors=True)
    report.ends = ends
    over = [cell for cell in report.cells if _recorded(cell) > _bound(cell)]
    report.say("", f"{len(report.cells)} runs, {len(over)} over their bound.")
    for cell in over:
        report.say(
            f"- over: {cell.model}, {cell.image}, {cell.budget}: by {(_recorded(cell) - _bound(cell)) / MIB:.1f} MiB"
        )
    notes = dict.fromkeys(note for cell in report.cells for note in cell.record.notes)
    report.say(*(f"- note: {note}" for note in notes))


def _image_runs(report: Report, model: str, folder: Path, size: str) -> None:
    """Budgets from just above the least to all that is free."""
    image = report.work / f"{size}.jpg"
    if not image.exists():
        width, height = (int(part) for part in size.split("x"))
        with Image.open(PHOTO) as photo:
            photo.resize((width, height)).save(image, quality=90)
    most = None
    if report.free_bytes is not None:
        most = report.free_bytes - GIB // 4  # a desktop's windows come and go
    free = _plan(report, folder, image, most)
    low = free.prediction.smallest_budget_bytes + MIB
    high = free.prediction.bound_peak_bytes
    count = max(1, report.size.budgets - 1)
    budgets = [low + (high - low) * step // count for step in range(count)]
    for said, budget in [*((f"{b / MIB:.0f} MiB", b) for b in budgets), ("all", most)]:
        try:
            _run(report, model, folder, image, said, _plan(report, folder, image, budget))
        except Left as error:
            report.say(f"| {model} | {size} | {said} | left out: {error} |")


def _plan(report: Report, folder: Path, image: Path, budget: int | None) -> Plan:
    command = ["--model", str(folder), "--image", str(image), "--prompt", PROMPT, "--json"]
    command += ["--max-new-tokens", str(report.size.new_tokens), "--device", str(report.profile)]
    command += [] if budget is None else ["--vram", f"{budget}B"]
    return Plan.loads(report.call("-m", "planner.cli", *command))


def _run(report: Report, model: str, folder: Path, image: Path, said: str, plan: Plan) -> None:
    name = f"{model}-{image.stem}-{said.replace(' ', '')}.json"
    plan_file, record_file = report.out / "plans" / name, report.out / "records" / name
    plan.save(plan_file)
    what = ["--model", str(folder), "--image", str(image), "--prompt", PROMPT, "--quiet"]
    command = ["-m", "executor.cli", str(plan_file), *what, "--record", str(record_file)]
    report.call(
        *command, fine=(0, 4)
    )  # a budget that was passed is a finding, and the record is there
    record = Record.load(record_file)
    cell = Cell(model, image.stem, said, plan, record)
    report.cells.append(cell)
    expected, bound = plan.prediction.expected_peak_bytes, _bound(cell)
    figures = [f"{value / MIB:.1f}" for value in (expected, bound, _recorded(cell))]
    figures += [_difference(cell, "allocated"), _difference(cell, "reserved")]
    figures += [f"{plan.prediction.seconds:.2f} s", f"{record.seconds:.2f} s"]
    report.say(f"| {model} | {image.stem} | {said} | {' | '.join(figures)} |")


def _bound(cell: Cell) -> int:
    return cell.plan.prediction.bound_peak_bytes


def _recorded(cell: Cell) -> int:
    return cell.record.peak_bytes or 0


def _difference(cell: Cell, what: str) -> str:
    """Recorded less predicted; a dash where the device has no such allocator."""
    found = [getattr(phase, f"{what}_bytes") for phase in cell.record.phases]
    if not found or None in found:
        return "-"
    wanted = [getattr(phase, f"{what}_peak_bytes") for phase in cell.plan.prediction.phases]
    return f"{max(found) - max(wanted):+d}"


# --- what the runs tell -------------------------------------------------------------------------------------------


def context(report: Report) -> None:
    """Measured beside the profile's, and the profile with what was measured."""
    known = [cell for cell in report.cells if cell.record.context_bytes is not None]
    if not known:
        raise Left("no run told it")
    profile: DeviceProfile = load_profile(str(report.profile))
    report.say("", "| checkpoint | image | profile, MiB | measured, MiB |", "|---|---|---:|---:|")
    apart = []
    for cell in known:
        measured = cell.record.context_bytes or 0
        apart.append(measured - cell.plan.device.context_bytes)
        report.say(
            f"| {cell.model} | {cell.image} | {cell.plan.device.context_bytes / MIB:.1f} | {measured / MIB:.1f} |"
        )
    error = profile.context_error_bytes
    outside = sum(abs(one) > error for one in apart)
    report.say(
        "", f"{outside} of {len(apart)} outside the profile's error of {error / MIB:.0f} MiB."
    )
    middle = (max(apart) + min(apart)) // 2
    update = {
        "context_bytes": profile.context_bytes + middle,
        "context_error_bytes": max(8 * MIB, 2 * (max(apart) - middle)),
        "sources": {
            **profile.sources,
            "context_bytes": f"measured {time.strftime('%Y-%m-%d')}: the middle of {len(apart)} runs",
        },
    }
    write_text(
        report.profile,
        dumps(DeviceProfile.model_validate(profile.model_copy(update=update).model_dump())),
    )
    report.say("probe.json now has the measured one.")


def streaming(report: Report) -> None:
    """Of each phase that copies: wall time beside what compute and the link would take, each alone."""
    profile = load_profile(str(report.profile))
    link = profile.host_to_device_bytes_per_s
    rates = {"host": link, "disk": min(link, profile.page_cache_bytes_per_s)}
    report.say(
        "",
        f"Link: {rates['disk'] / 1e9:.1f} GB/s for what is read (the files lie in the page cache), {link / 1e9:.1f} GB/s "
        "for what stays in pinned host memory. Compute: the steps' own seconds, without waiting.",
        "",
        "| checkpoint | image | budget | phase | streamed, MiB | compute, s | bytes / link, s | wall, s | wall / max |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    )
    for cell in report.cells:
        planned = {copy.id: copy for copy in cell.plan.copies}
        for phase in cell.record.phases:
            copies = [c for c in cell.record.copies if planned[c.id].phase == phase.phase]
            moved = sum(copy.size_bytes for copy in copies)
            if phase.phase == "load" or not moved:
                continue
            compute = sum(s.seconds for s in cell.record.steps if s.phase == phase.phase)
            alone = sum(copy.size_bytes / rates[planned[copy.id].source] for copy in copies)
            figures = [
                f"{moved / MIB:.0f}",
                f"{compute:.3f}",
                f"{alone:.3f}",
                f"{phase.seconds:.3f}",
            ]
            figures.append(f"{phase.seconds / max(compute, alone, 1e-9):.2f}")
            report.say(
                f"| {cell.model} | {cell.image} | {cell.budget} | {phase.phase} | {' | '.join(figures)} |"
            )


def tests(report: Report) -> None:
    if not _has("pytest"):
        raise Left("pytest is not installed")
    marks = "gpu" if report.device == "cuda" else "not gpu and not full"
    where = ["tests/gpu"] if report.device == "cuda" else ["tests/gpu/test_contract.py"]
    # a card's torch may warn of things that a test run elsewhere takes for errors
    given = ["-q", "-m", marks, "-W", "default", "-p", "no:cacheprovider", "--tb=line", "-rfE"]
    said = report.call("-m", "pytest", *where, *given, fine=(0, 1))
    last = said.strip().splitlines()
    report.say("", "```", *last[-40:], "```")


def picture(report: Report) -> None:
    if not _has("matplotlib"):
        raise Left("matplotlib is not installed")
    if not report.cells:
        raise Left("there are no runs")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.3 * len(report.cells)))
    names = [f"{cell.model} {cell.image} {cell.budget}" for cell in report.cells]
    places = range(len(names))
    axes.barh(places, [_bound(c) / MIB for c in report.cells], color="#dddddd", label="bound")
    axes.barh(places, [_recorded(c) / MIB for c in report.cells], height=0.4, label="recorded")
    axes.set_yticks(list(places), names, fontsize=7)
    axes.set_xlabel("device peak, MiB")
    axes.legend(fontsize=7)
    figure.savefig(report.out / "peaks.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    report.say("", "![peaks](peaks.png)")


if __name__ == "__main__":
    sys.exit(main())
