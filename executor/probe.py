"""Measure this machine and write it down as a device profile that `plan --device FILE` accepts.

    kernels (probe_kernels) · memory: copies, first touch, page cache, disk · runs of small models: start-up, context, steps

Where a figure cannot be measured it keeps what the profile that comes with the package says, and its source says so.
"""

from __future__ import annotations

import mmap
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from executor import memory
from executor.attention import attend
from executor.image import PixelSource, open_image
from executor.ops import linear, rms_norm
from executor.probe_kernels import FULL, SHORT, Bench, Busy, kernels, sampling
from executor.record import Record
from executor.threads import start_thread
from planner.errors import InputError, RunFailed
from planner.plan import Image, Kernel, Kind, Plan, WindowRun, write_text
from planner.profile import DeviceProfile, Kernels, Measured, dumps, load_profile
from planner.units import GIB, MIB

READ_BYTES = 64 * MIB  # executor.weights reads in such pieces
TELLS_DISTURBED = 0.1  # of the cores, taken by others: then the figures are worth little
PLAN = "import sys; sys.path[0] = sys.argv.pop(1); from planner.cli import main; sys.exit(main())"
EXECUTE = (
    "import sys; sys.path[0] = sys.argv.pop(1); from executor.cli import main; sys.exit(main())"
)

KINDS: tuple[Kind, ...] = get_args(Kind)

Say = Callable[[str], None]


class Rates(NamedTuple):
    """Bytes per second of memory and files; 0 or None where nothing could be measured."""

    host_to_device: int
    pageable: int | None  # a card: from memory that is not pinned
    page_cache: int
    disk: int | None
    first_touch: int
    beside: tuple[float, float]


class Told(NamedTuple):
    """What a small model's runs told beside what their plan predicts from the tables alone."""

    start_s: float
    context_bytes: int | None
    steps_s: dict[Kind, float]
    copy_s: float


def probe(
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    short: bool = False,
    folder: Path | None = None,
    on_progress: Say = lambda what: None,
) -> DeviceProfile:
    """The profile of this machine. `folder` lies on the disk that checkpoints are read from; `short` takes seconds and is for tests."""
    sizes = SHORT if short else FULL
    base = _base(device)
    memory.fix_malloc_thresholds()
    busy = Busy()
    where = torch.device(device)
    synchronize = torch.cuda.synchronize if device == "cuda" else _nothing
    with torch.inference_mode():
        buffer, keep = _buffer(sizes.buffer_bytes, where)
        bench = Bench(buffer, sizes, _kernel(base), synchronize, on_progress)
        half = kernels(bench, torch.bfloat16 if base.bf16 else torch.float16)
        whole = kernels(bench, torch.float32)
        on_progress("memory and files")
        rates = _rates(bench, folder, 8 * MIB if short else 256 * MIB)
        create = _create_s(bench)
        opening = _image_pixels_per_s(folder, 256 if short else 1536)
        drawn = sampling((640, 4096) if short else (640, 4096, 151_936), sizes.seconds)
        pixels = _pixel_values_per_s(112 if short else 448)
        del bench, buffer, keep
    measured = Measured(
        bits16=half,
        float32=whole,
        pixel_values_per_s=pixels,
        sample=drawn,
        step_s=dict.fromkeys(KINDS, (20e-6, 20e-6)),
        copy_s=50e-6,
        first_touch_bytes_per_s=rates.first_touch,
        create_s=create,
        image_pixels_per_s=opening,
        beside=rates.beside,
    )
    found = _profile(base, measured, rates, device)
    if device == "cpu":
        on_progress("runs of small models")
        bare = _with_steps(found, dict.fromkeys(KINDS, (0.0, 0.0)))
        repeats = 1 if short else 5
        near = _told(bare, "tiny", folder, repeats)
        far = near if short else _told(bare, "mini", folder, repeats)
        found = _with_told(found, near, far)
    others = busy.of_others()
    if others is not None and others[0] > TELLS_DISTURBED * others[1]:
        share = others[0] / others[1]
        note = f"{found.note}; other processes took {share:.0%} of the cores meanwhile: measure again on a quiet machine"
        found = found.model_copy(update={"note": note})
    return DeviceProfile.model_validate(found.model_dump())


def run_probe(
    out: Path | None,
    *,
    device: str | None = None,
    folder: Path | None = None,
    short: bool = False,
    quiet: bool = False,
) -> DeviceProfile:
    """Measure, then write the profile to `out` or stdout, with a summary on stderr."""
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet, highlight=False)
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise RunFailed("--probe --device cuda: this torch sees no card; probe with --device cpu")
    begun = time.perf_counter()
    with console.status("probing") as status:
        profile = probe(
            device="cuda" if chosen == "cuda" else "cpu",
            short=short,
            folder=folder or (out.parent if out else None),
            on_progress=lambda what: status.update(f"probing: {what}"),
        )
    text = dumps(profile)
    if out is None:
        sys.stdout.write(text)
    else:
        write_text(out, text)
    console.print(summary(profile))
    console.print(
        f"{time.perf_counter() - begun:.0f} s"
        + (
            f"; plan with: plan --device {out}"
            if out
            else "; keep it with: execute --probe --out FILE"
        )
    )
    return profile


def summary(profile: DeviceProfile) -> Any:
    """A table of the figures that people ask for first."""
    from rich import box
    from rich.table import Table

    table = Table(title=profile.name, box=box.SIMPLE_HEAD, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = (
        ("memory read by one-row products", f"{profile.bandwidth_bytes_per_s / 1e9:.1f} GB/s"),
        *(
            (f"products of {count} rows, {name}", f"{rate / 1e12:.2f} TFLOP/s")
            for name, points in (
                ("16 bits", profile.matmul_flops_per_s.bits16),
                ("float32", profile.matmul_flops_per_s.float32),
            )
            for count, rate in (points[0], points[-1])
        ),
        *(
            (f"attention of {count} rows, {name}", f"{rate / 1e12:.2f} TFLOP/s")
            for name, points in (
                ("16 bits", profile.attention_flops_per_s.bits16),
                ("float32", profile.attention_flops_per_s.float32),
            )
            for count, rate in (points[0], points[-1])
        ),
        ("smallest call", f"{profile.launch_s * 1e6:.1f} us"),
        ("copies to the device", f"{profile.host_to_device_bytes_per_s / 1e9:.1f} GB/s"),
        ("page cache", f"{profile.page_cache_bytes_per_s / 1e9:.1f} GB/s"),
        ("disk, cold", f"{profile.disk_bytes_per_s / 1e9:.2f} GB/s"),
        ("start-up", f"{profile.start_s:.2f} s"),
        ("context", f"{profile.context_bytes / MIB:.0f} MiB"),
    )
    for row in rows:
        table.add_row(*row)
    return table


# --- memory and files ---------------------------------------------------------------------------------------------


def _nothing() -> None:
    pass


def _buffer(size_bytes: int, device: torch.device) -> tuple[Tensor, object]:
    """Memory as the arena's: on the CPU private pages of the ordinary size."""
    if device.type == "cuda":
        return torch.empty(size_bytes, dtype=torch.uint8, device=device), None
    available = memory.available_bytes()
    if available is not None and available < size_bytes + GIB // 2:
        raise RunFailed(
            f"--probe: wanted {(size_bytes + GIB // 2) / GIB:.1f} GiB of free memory, "
            f"the system has {available / GIB:.1f}; close other programs"
        )
    mapping = _pages(size_bytes)
    return torch.frombuffer(mapping, dtype=torch.uint8), mapping


def _pages(size_bytes: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size_bytes)
    mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):
            mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return mapping


def _rates(bench: Bench, folder: Path | None, size_bytes: int) -> Rates:
    """Copies, page cache, disk, new pages."""
    size_bytes = min(size_bytes, bench.memory.numel())
    pageable = None
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as file:
        piece = os.urandom(MIB)
        for _ in range(size_bytes // MIB):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        host = bench.memory[:size_bytes]
        if bench.device.type == "cuda":
            host = torch.empty(size_bytes, dtype=torch.uint8)
        disk = _cold(file.fileno(), host)
        page_cache = _typical(lambda: _read(file.fileno(), host), size_bytes, 7)
        to_device = page_cache
        beside = _beside(bench, file.fileno(), host, page_cache)
        if bench.device.type == "cuda":
            pageable = _transfer(bench, host)
            to_device = _transfer(bench, host.pin_memory())
    touch = 0 if bench.device.type == "cuda" else _first_touch(size_bytes)
    return Rates(to_device, pageable, page_cache, disk, touch, beside)


def _read(handle: int, target: Tensor) -> None:
    view = memoryview(target.numpy())  # type: ignore[arg-type]
    for start in range(0, len(view), READ_BYTES):
        wanted = view[start : start + READ_BYTES]
        if hasattr(os, "preadv"):
            os.preadv(handle, [wanted], start)
        else:
            os.lseek(handle, start, os.SEEK_SET)
            wanted[:] = os.read(handle, len(wanted))


def _best(call: Callable[[], object], size_bytes: int, repeats: int) -> int:
    """Units per second, the best of some repeats."""
    return max(1, round(size_bytes / min(_laps(call, repeats))))


def _typical(call: Callable[[], object], size_bytes: int, repeats: int) -> int:
    """Units per second, the median of some repeats after one that does not count."""
    return max(1, round(size_bytes / statistics.median(_laps(call, repeats + 1)[1:])))


def _laps(call: Callable[[], object], repeats: int) -> list[float]:
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def _cold(handle: int, target: Tensor) -> int | None:
    """Bytes per second of a file that is not in the page cache; None where it cannot be put out of it."""
    if not hasattr(os, "posix_fadvise"):
        return None
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    return _best(lambda: _read(handle, target), target.numel(), 1)


def _transfer(bench: Bench, host: Tensor) -> int:
    """Bytes per second of one large copy to the card."""
    target = bench.memory[: host.numel()]

    def call() -> None:
        target.copy_(host, non_blocking=True)
        bench.synchronize()

    call()
    return _best(call, host.numel(), 5)


def _first_touch(size_bytes: int) -> int:
    """Bytes per second of writing to new pages, beyond the writing itself."""
    times = []
    for _ in range(5):
        mapping = _pages(size_bytes)
        fresh = torch.frombuffer(mapping, dtype=torch.uint8)
        # one thread, as the reader is
        laps = []
        for _ in range(2):
            start = time.perf_counter()
            fresh[:: memory.PAGE_BYTES] = 1
            laps.append(time.perf_counter() - start)
        times.append(max(laps[0] - laps[1], 1e-9))
        del fresh
        mapping.close()
    return round(size_bytes / statistics.median(times))


def _beside(bench: Bench, handle: int, target: Tensor, rate: int) -> tuple[float, float]:
    """How fast steps and a reader are while both run, in proportion to each alone; a card's do not share anything."""
    if bench.device.type != "cpu":
        return 1.0, 1.0
    rows, width, heads = (256, 64, 4) if bench.sizes is SHORT else (1024, 1280, 16)
    count = 5 if bench.sizes is SHORT else 24
    x, y, out = (bench.numbers(rows, width, dtype=torch.bfloat16) for _ in range(3))
    wide = [bench.numbers(rows, 3 * width, dtype=torch.bfloat16) for _ in range(2)]
    up = bench.numbers(3 * width, width, dtype=torch.bfloat16)
    down = bench.numbers(width, 3 * width, dtype=torch.bfloat16)
    ones, norm32 = torch.ones(width, dtype=torch.bfloat16), torch.empty(256, width)
    qkv = wide[0].view(rows // 64, 64, 3, heads, width // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def work() -> float:
        """What a block of the vision tower does: many calls of all sizes, between which cores wait for each other."""
        start = time.perf_counter()
        for _ in range(count):
            rms_norm(x, ones, y, scratch=norm32, eps=1e-6)
            linear(y, up, None, out=wide[0])
            attend(q, k, v, kernel=bench.kernel, scale=0.1)
            linear(y, up, None, out=wide[1])
            torch.ops.aten.silu_(wide[1])
            wide[1].mul_(wide[0])
            linear(wide[1], down, None, out=out)
            y.add_(out)
        return time.perf_counter() - start

    work()
    shares = []
    for _ in range(1 if bench.sizes is SHORT else 7):
        alone = work()
        moved, stop = [0], threading.Event()

        def read(moved: list[int] = moved, stop: threading.Event = stop) -> None:
            view = memoryview(target.numpy())  # type: ignore[arg-type]
            while not stop.is_set():
                for start in range(0, len(view), READ_BYTES):
                    if stop.is_set():
                        return
                    moved[0] += os.preadv(handle, [view[start : start + READ_BYTES]], start)

        if not hasattr(os, "preadv"):
            return 0.5, 1.0
        reader = threading.Thread(target=read)
        start_thread(reader, "a reader beside steps")
        beside = work()
        stop.set()
        reader.join()
        shares.append((alone / beside, moved[0] / rate / beside))
    found = (statistics.median(share) for share in zip(*shares, strict=True))
    compute, copy = (round(min(1.0, max(0.01, share)), 3) for share in found)
    return compute, copy


def _pixel_values_per_s(side_px: int) -> int:
    """Patch values a second that the host cuts out of an image and normalises."""
    import numpy as np

    image = _image(side_px, side_px)
    source = PixelSource(np.full((side_px, side_px, 3), 100, dtype=np.uint8), image)
    out = torch.empty(image.patches, source.patch_values, dtype=torch.bfloat16)
    source.rows(0, image.patches, out)
    return _best(lambda: source.rows(0, image.patches, out), out.numel(), 5)


def _create_s(bench: Bench) -> float:
    """What the first product of a shape takes more than the second: the library makes code for it."""
    found = []
    weight = bench.numbers(640, 640, dtype=torch.bfloat16)
    for rows in (97, 161, 225, 289, 353):
        x = bench.numbers(rows, 640, dtype=torch.bfloat16)
        out = torch.empty_like(x)
        laps = []
        for _ in range(3):
            start = time.perf_counter()
            torch.mm(x, weight.t(), out=out)
            bench.synchronize()
            laps.append(time.perf_counter() - start)
        found.append(max(0.0, laps[0] - min(laps[1:])))
    return statistics.median(found)


def _image_pixels_per_s(folder: Path | None, side_px: int) -> int:
    """Pixels of a file a second: decoded, and resized a little."""
    import numpy as np
    from PIL import Image as Pillow

    to = side_px // 28 * 28 - 28
    noise = np.random.default_rng(1).integers(0, 255, (side_px // 8, side_px // 8, 3), np.uint8)
    image = _image(side_px, to)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-", suffix=".jpg") as file:
        Pillow.fromarray(noise).resize((side_px, side_px)).save(file, "JPEG", quality=90)
        file.flush()
        open_image(Path(file.name), image)
        return _best(lambda: open_image(Path(file.name), image), side_px**2, 3)


def _image(source_px: int, side_px: int) -> Image:
    """A square image; its windows matter to nobody here."""
    side = side_px // 14
    return Image(
        name="probe",
        source_width_px=source_px,
        source_height_px=source_px,
        width_px=side_px,
        height_px=side_px,
        rows=side,
        cols=side,
        windows=(WindowRun(count=side * side // 4, rows=4),),
    )


# --- small models -------------------------------------------------------------------------------------------------


def _told(profile: DeviceProfile, spec: str, folder: Path | None, repeats: int) -> Told:
    """Start-up, context and what steps and copies cost beside their kernels: a random checkpoint, planned with this profile and run."""
    from executor.make_checkpoint import make_random_checkpoint

    root = str(Path(__file__).resolve().parent.parent)  # the packages lie side by side
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


# --- the profile --------------------------------------------------------------------------------------------------


def _base(device: str) -> DeviceProfile:
    """The profile that this machine's figures go into."""
    if device == "cpu":
        return load_profile("cpu")
    name = torch.cuda.get_device_name()
    memory_gb = round(torch.cuda.get_device_properties(0).total_memory / 2**30)
    for wanted in (f"{name} {memory_gb}GB", name):
        with suppress(InputError):
            return load_profile(wanted)
    major, minor = torch.cuda.get_device_capability()
    like = {7: "t4-16gb", 9: "h100-pcie-80gb", 8: "rtx-4090-24gb"}.get(major, "rtx-5080-16gb")
    return load_profile(like).model_copy(
        update={"name": name, "compute_capability": f"{major}.{minor}"}
    )


def _kernel(base: DeviceProfile) -> Kernel:
    if base.kind == "cpu":
        return "cpu_flash"
    return "flash" if float(base.compute_capability or 0) >= 8 else "efficient"


def _with_steps(
    profile: DeviceProfile, step_s: dict[Kind, tuple[float, float]], **changes: Any
) -> DeviceProfile:
    assert profile.measured is not None
    measured = profile.measured.model_copy(update={"step_s": step_s, **changes})
    return profile.model_copy(update={"measured": measured})


def _with_told(profile: DeviceProfile, near: Told, far: Told) -> DeviceProfile:
    """With what runs told: of a model whose weights stay in the caches, and of one whose weights do not."""
    found = _with_steps(
        profile,
        {kind: (near.steps_s[kind], far.steps_s[kind]) for kind in KINDS},
        copy_s=near.copy_s,
    )
    changes: dict[str, Any] = {"start_s": round(near.start_s, 3)}
    sources = {
        **profile.sources,
        "start_s": f"{_measured_by()}: a tiny model's load phase less what its plan counts beside this figure",
    }
    if near.context_bytes is not None:
        changes["context_bytes"] = near.context_bytes
        sources["context_bytes"] = (
            f"{_measured_by()}: a tiny model's, less what its plan counts beside this figure"
        )
    return found.model_copy(update={**changes, "sources": sources})


def _profile(base: DeviceProfile, measured: Measured, rates: Rates, device: str) -> DeviceProfile:
    """The base with everything measured put in, and the roofline's figures read off the tables."""
    said = _measured_by()
    half, whole = measured.bits16, measured.float32
    changes: dict[str, Any] = {
        "id": re.sub(r"-probed$", "", base.id) + "-probed",
        "name": _processor() if device == "cpu" else base.name,
        "note": f"{_processor()}, {torch.get_num_threads()} threads"
        if device == "cpu"
        else base.note,
        "measured": measured,
        "matmul_flops_per_s": {"bits16": _products(half), "float32": _products(whole)},
        "attention_flops_per_s": {"bits16": _attention(half), "float32": _attention(whole)},
        "bandwidth_bytes_per_s": _bandwidth(half),
        "launch_s": min(half.passes["add"][0][1], whole.passes["add"][0][1]),
        "host_to_device_bytes_per_s": rates.host_to_device,
        "page_cache_bytes_per_s": rates.page_cache,
    }
    sources = dict(base.sources)
    sources |= {
        "bandwidth_bytes_per_s": f"{said}: 16-bit weights of one-row products, far apart",
        "matmul_flops_per_s": f"{said}: the largest weights; all of them in `measured`",
        "attention_flops_per_s": f"{said}: no mask, the largest heads and most keys; all of them in `measured`",
        "launch_s": f"{said}: the smallest addition",
        "page_cache_bytes_per_s": f"{said}: preadv in pieces of 64 MiB, one reader, the file in memory. "
        "On a CPU weights count as in the page cache where twice their bytes fit in usable_bytes",
        "host_to_device_bytes_per_s": f"{said}: as page_cache_bytes_per_s"
        if device == "cpu"
        else f"{said}: pinned; {(rates.pageable or 0) / 1e9:.1f} GB/s where it is not pinned",
        "measured": f"{said}: median of repeated calls of the executor's own functions",
    }
    if rates.disk is not None:
        changes["disk_bytes_per_s"] = rates.disk
        sources["disk_bytes_per_s"] = f"{said}: preadv of a file put out of the page cache before"
    if device == "cpu":
        total = _total_bytes()
        changes |= {
            "threads": torch.get_num_threads(),
            "amx": _has_amx(),
            **({"memory_total_bytes": total, "usable_bytes": total - 2 * GIB} if total else {}),
        }
        if total:
            sources["memory_total_bytes"] = f"{said}: MemTotal of the system"
    else:
        free, total = torch.cuda.mem_get_info()
        properties = torch.cuda.get_device_properties(0)
        changes |= {
            "usable_bytes": min(total, base.memory_total_bytes),
            "sm_count": properties.multi_processor_count,
        }
        if total > base.memory_total_bytes:
            changes |= {"memory_total_bytes": total, "usable_bytes": total}
        ask = getattr(torch.backends.cuda, "cublas_workspace_size", None)  # torch 2.13
        if ask is not None:
            changes["workspace_bytes"] = ask()
            sources["workspace_bytes"] = f"{said}: torch's own figure"
        sources["usable_bytes"] = f"{said}: the driver's total ({free} bytes of it free then)"
        sources["sm_count"] = f"{said}: the driver's"
    return DeviceProfile.model_validate(
        {**base.model_dump(), **_plain(changes), "sources": sources}
    )


def _plain(changes: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.model_dump() if hasattr(value, "model_dump") else value
        for key, value in changes.items()
    }


def _products(found: Kernels) -> tuple[tuple[int, int], ...]:
    """(rows, FLOP/s) of the largest weights, never falling: beyond a dip more rows would be cut into fewer."""
    grid, weights = found.product, found.product.second[-1]
    one = found.vector.seconds[-1][-1]
    points = [(1, 2 * weights / one)]
    points += [
        (rows, 2 * rows * weights / row[-1])
        for rows, row in zip(grid.first, grid.seconds, strict=True)
    ]
    return _rising(points)


def _attention(found: Kernels) -> tuple[tuple[int, int], ...]:
    head = found.attention[-1]
    keys = head.full.second[-1]
    cached, seconds = head.decode[-1]
    points = [(1, 4 * cached * head.head_dim / seconds)]
    points += [
        (rows, 4 * rows * keys * head.head_dim / row[-1])
        for rows, row in zip(head.full.first, head.full.seconds, strict=True)
    ]
    return _rising(points)


def _rising(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, int], ...]:
    best, found = 1.0, []
    for rows, rate in points:
        best = max(best, rate)
        found.append((rows, round(best)))
    return tuple(found)


def _bandwidth(found: Kernels) -> int:
    grid = found.vector
    return max(1, round(2 * grid.second[-1] / grid.seconds[-1][-1]))


def _measured_by() -> str:
    return (
        f"measured {time.strftime('%Y-%m-%d')} by execute --probe, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )


def _processor() -> str:
    """The processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "CPU"


def _has_amx() -> bool:
    with suppress(OSError):
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return False


def _total_bytes() -> int | None:
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    return None
