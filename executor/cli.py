"""`execute`: run a plan on images and a prompt; the answer on stdout, everything else on stderr."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import planner
from executor.threads import leave_cores
from planner.arguments import Parser
from planner.errors import DoesNotFit, InputError, LessIsFree, RunFailed, StowplanError
from planner.files import check_target, reaching_stdout
from planner.signals import Interrupted, ending_signals
from planner.units import MIB, format_gib, format_seconds

# what takes time to import comes inside the functions, so that an interrupt meanwhile is one line, too
if TYPE_CHECKING:
    from rich.console import Console

    from executor.prepare import Request
    from executor.run import Result
    from planner.checkpoint.spec import Checkpoint
    from planner.plan import Plan

PASSED_BUDGET, INTERRUPTED = 4, 130
# options of a plan's command that a plan made anew keeps; the others are given by the run
KEPT = (
    *("--device", "--dtype", "--ram", "--allocator"),
    *("--max-pixels", "--max-new-tokens", "--context-tokens"),
)
PLAN_COMMAND = (
    "import sys; sys.path[0] = sys.argv.pop(1); from planner.cli import main; sys.exit(main())"
)

EPILOG = """\
exit codes: 0 ran, 1 the run failed, 2 usage or bad input, 3 the plan does not fit (any more),
4 ran but passed the budget, 130 interrupted (143 by SIGTERM, 129 by SIGHUP)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one `execute`. Never a traceback for a user's mistake."""
    # numpy asks for huge pages for arrays of 4 MiB and more, also on the heap: what is freed there would stay resident
    os.environ.setdefault("NUMPY_MADVISE_HUGEPAGE", "0")
    leave_cores()
    try:
        with ending_signals(for_good=arguments is None):
            return _main(sys.argv[1:] if arguments is None else arguments)
    except StowplanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except MemoryError as error:
        print(f"error: memory was refused: {str(error) or 'no more is known'}", file=sys.stderr)
        return RunFailed.exit_code
    except KeyboardInterrupt as error:
        print("interrupted; everything was released, nothing half written", file=sys.stderr)
        return error.exit_code if isinstance(error, Interrupted) else INTERRUPTED
    except BrokenPipeError:
        # whoever read the answer has gone; without this Python complains once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.make_random_checkpoint:
        others = _given(options, "--make-random-checkpoint", "--quiet")
        if others:
            raise InputError(
                f"--make-random-checkpoint writes a checkpoint and ends: give only --quiet beside it, not {others[0]}"
            )
        return _make_checkpoint(*options.make_random_checkpoint, quiet=options.quiet)
    if options.probe:
        return _probe(options)
    _check_options(options)
    from planner.plan import Plan

    checkpoint = _checkpoint(options)
    plan = Plan.load(options.plan) if options.plan else _plan_on_the_spot(options)
    try:
        return _execute(options, plan, checkpoint)
    except LessIsFree as error:
        if not options.replan:
            raise
        if not options.quiet:
            print(f"note: {str(error).splitlines()[0]}; planning anew", file=sys.stderr)
        return _execute(options, _plan_anew(options, plan, error.budget_bytes), checkpoint)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "execute",
        "Run a plan exactly as it stands, on CUDA or on the CPU, and print recorded peaks beside predicted ones.",
        EPILOG,
    )
    add = parser.add_argument
    add(
        "plan",
        nargs="?",
        type=Path,
        metavar="plan.json",
        help="a plan written by: plan --out plan.json",
    )
    add(
        "--vram",
        metavar="SIZE",
        help="without a plan file: plan for this budget first (16GB, 6GiB)",
    )
    add("--model", metavar="DIR", help="the checkpoint's folder, or a hub id in the local cache")
    add("--image", type=Path, action="append", default=[], metavar="FILE", help="once per image")
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="the question; several are answered one after another, and the images are encoded once",
    )
    add(
        "--device",
        choices=("cpu", "cuda"),
        help="where to run (default: as the plan says, else cpu)",
    )
    add(
        "--max-new-tokens",
        type=_whole,
        metavar="N",
        help="default: as many as the plan has room for",
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 (default): the likeliest token",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest ids of this probability",
    )
    add("--seed", type=_whole, default=0, metavar="N", help="of the draws")
    add(
        "--record",
        type=Path,
        metavar="FILE",
        help="write what was recorded, as JSON; of a second question to FILE with -2 before its suffix, and so on",
    )
    add(
        "--save-outputs",
        type=Path,
        metavar="FILE",
        help="write image features, logits and tokens, as safetensors; named as with --record",
    )
    add(
        "--check",
        action="store_true",
        help="watch every step's peak, writes and allocations (slower)",
    )
    add(
        "--replan",
        action="store_true",
        help="where less memory is free now than the plan needs, plan anew for what is free, and run that",
    )
    add("--quiet", action="store_true", help="only the answer and errors")
    add("--download", action="store_true", help="fetch --model from the hub first")
    add(
        "--probe",
        action="store_true",
        help="measure this machine (some two minutes, up to 1 GB) and write a device profile for plan --device FILE; "
        "the disk is that of --model DIR where it is given",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="with --probe: write the profile here (default: stdout)",
    )
    add(
        "--make-random-checkpoint",
        nargs=2,
        metavar=("SPEC", "DIR"),
        help="write a checkpoint of random weights (tiny, tiny-tied, mini, small, 3b, 7b) and end",
    )
    return parser


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted a whole number, found {text!r}") from None


def _given(options: argparse.Namespace, *but: str) -> list[str]:
    """The options that were given another value than their default, but for these."""
    parser = _parser()
    return [
        "a plan" if name == "plan" else option
        for name, value in vars(options).items()
        if (option := f"--{name.replace('_', '-')}") not in but
        and value != parser.get_default(name)
    ]


def _check_options(options: argparse.Namespace) -> None:
    if options.out:
        raise InputError("--out belongs to --probe; for the record of a run give --record")
    if options.plan and options.vram:
        raise InputError("a plan file and --vram were given; give one of them")
    if not options.plan and not options.vram:
        raise InputError("nothing to run: give a plan file, or --vram to plan on the spot")
    if not options.model:
        raise InputError("--model is missing: give the folder of the checkpoint")
    if options.prompt is None:
        raise InputError("--prompt is missing: give the question")
    for path in options.image:
        if os.path.isdir(path):
            raise InputError(f"--image {path}: wanted an image file, found a directory")
        if not os.path.isfile(path):  # also for a name that no file can have
            raise InputError(f"--image {path}: no such file")
    read = [*options.image, *filter(None, [options.plan])]
    written: set[Path] = set()
    for number in range(1, len(options.prompt) + 1):
        for option, path in (
            ("--record", options.record),
            ("--save-outputs", options.save_outputs),
        ):
            target = _numbered(path, number)
            _check_target(option, target, read)
            if target in written:
                raise InputError(
                    f"{option} {target}: wanted a file of its own, found the name of another one that this run writes"
                )
            written |= {target} if target else set()


def _check_target(option: str, path: Path | None, reads: Sequence[str | Path] = ()) -> None:
    if path is not None:
        check_target(option, path, reads)


def _checkpoint(options: argparse.Namespace) -> Checkpoint:
    from planner.checkpoint import spec
    from planner.checkpoint.hub import download

    if options.download:
        return spec.read_checkpoint(download(options.model), name=options.model.rpartition("/")[2])
    checkpoint = spec.resolve_model(options.model)
    if not checkpoint.tensors:
        raise InputError(
            f"--model {options.model}: names a built-in shape without weights; to run, give a checkpoint's folder"
        )
    return checkpoint


def _plan_on_the_spot(options: argparse.Namespace) -> Plan:
    if options.device == "cuda":
        raise InputError(
            "--vram with --device cuda: the card's profile is not known here; "
            "make a plan with: plan --device NAME --out plan.json"
        )
    new_tokens = 128 if options.max_new_tokens is None else options.max_new_tokens
    return _plan_beside(
        options, f"--vram={options.vram}", f"--max-new-tokens={new_tokens}", "--device=cpu"
    )


def _plan_anew(options: argparse.Namespace, plan: Plan, budget_bytes: int) -> Plan:
    """The plan that the plan's own command makes for another budget, with the checkpoint, images and prompt of this run."""
    if budget_bytes < MIB:
        raise DoesNotFit("nothing is free on the device, so there is nothing to plan for")
    parser = Parser("execute", "", add_help=False)
    for name in KEPT:
        parser.add_argument(name)
    try:
        kept, _ = parser.parse_known_args(shlex.split(plan.request))
    except ValueError as error:
        raise InputError(
            f"request: wanted the command that makes the plan, found {plan.request!r} ({error}); make the plan anew with: plan --out"
        ) from None
    return _plan_beside(
        options,
        f"--vram={budget_bytes // MIB}MiB",
        *(
            f"{name}={value}"
            for name, value in zip(KEPT, vars(kept).values(), strict=True)
            if value is not None
        ),
    )


def _plan_beside(options: argparse.Namespace, *words: str) -> Plan:
    """The plan for these images and this prompt, made by `plan` in a process of its own.

    What the search imports and leaves in the heap would otherwise stay in this process, and the plan's own context is
    predicted without it.
    """
    import subprocess

    from planner.plan import Plan

    # a file that is called 3840x2160 is still a file
    images = [str(path) if path.is_absolute() else f"./{path}" for path in options.image]
    arguments = [
        # with = also for a prompt that begins with a dash
        *(f"--model={options.model}", f"--prompt={_longest(options)}"),
        *(f"--image={name}" for name in images or ["none"]),
        *(*words, "--json"),
    ]
    # the same planner as this one, whatever lies in the working directory
    root = str(Path(planner.__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", PLAN_COMMAND, root, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    if done.returncode == 0:
        return Plan.loads(done.stdout, name="the plan made on the spot")
    message = done.stderr.strip()
    if message.startswith("error: "):
        kinds = {InputError.exit_code: InputError, DoesNotFit.exit_code: DoesNotFit}
        raise kinds.get(done.returncode, RunFailed)(message.removeprefix("error: "))
    last = (message.splitlines() or ["it said nothing"])[-1]
    raise RunFailed(f"planning ended with exit code {done.returncode}: {last}")


def _longest(options: argparse.Namespace) -> str:
    """The question with most tokens, or most bytes where there is no tokenizer: a plan has room for one."""
    prompts: list[str] = options.prompt
    file = Path(options.model) / "tokenizer.json"
    # what is no UTF-8 is refused by the planner
    texts = [prompt.encode("utf-8", "replace") for prompt in prompts]
    sizes = [len(text) for text in texts]
    if len(prompts) > 1 and file.is_file():
        from executor.prompt import load_tokenizer

        tokenizer = load_tokenizer(file)
        sizes = [len(tokenizer.encode(text.decode()).ids) for text in texts]
    return prompts[sizes.index(max(sizes))]


def _numbered(path: Path | None, number: int) -> Path | None:
    """The name of the file for one of several questions: `r.json`, `r-2.json`, ..."""
    if path is None or number == 1:
        return path
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _execute(options: argparse.Namespace, plan: Plan, checkpoint: Checkpoint) -> int:
    from rich.console import Console

    from executor.compare import compare, render
    from executor.generate import Sampling
    from executor.memory import process_age_s
    from executor.prepare import Request
    from executor.run import Session, run

    console = Console(stderr=True, quiet=options.quiet, highlight=False)
    sampling = Sampling(
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        repetition_penalty=plan.model.repetition_penalty,
    )
    request = Request(
        locations=checkpoint.tensors,
        images=tuple(options.image),
        prompt=options.prompt[0],
        tokenizer=checkpoint.tokenizer_json,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        device=options.device or plan.device.kind,
        fingerprint=checkpoint.shape.fingerprint,
        save_outputs=options.save_outputs,
        check=options.check,
        age_s=process_age_s(),
        on_token=_say,
    )
    console.print(
        f"{plan.model.name} on {plan.device.kind}: {format_gib(plan.prediction.bound_peak_bytes)} at most, "
        f"{format_seconds(plan.prediction.seconds)} predicted"
    )
    passed = False
    with ExitStack() as stack:
        answer: Callable[[Request], Result] = partial(run, plan)
        if len(options.prompt) > 1:
            session = stack.enter_context(Session(plan, request))
            session.check(options.prompt)
            answer = session.answer
        for number, prompt in enumerate(options.prompt, start=1):
            outputs = _numbered(options.save_outputs, number)
            asked = replace(request, prompt=prompt, save_outputs=outputs)
            record = _with_progress(console, plan, asked, answer).record
            _write("\n")
            console.print(render(compare(plan, record)))
            target = _numbered(options.record, number)
            if target:
                record.save(target)
            if record.passed_budget:
                print(
                    f"error: passed the budget: {format_gib(record.peak_bytes or 0)} recorded, "
                    f"{format_gib(record.budget_bytes or 0)} allowed",
                    file=sys.stderr,
                )
                passed = True
    return PASSED_BUDGET if passed else 0


def _with_progress(
    console: Console, plan: Plan, request: Request, answer: Callable[[Request], Result]
) -> Result:
    """Run with a bar for what comes before the answer; it is gone when the first token is there."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    before = [step.id for step in plan.steps if step.phase != "decode"]
    if console.quiet or not console.is_terminal:
        return answer(request)
    bar = Progress(
        TextColumn("{task.description:<32}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        # drawn when a step begins, not by a thread: nothing competes with the steps
        auto_refresh=False,
    )
    task = bar.add_task("start", total=len(before))
    place = {step: index for index, step in enumerate(before)}

    def on_step(step: str) -> None:
        if step in place:
            bar.update(task, completed=place[step], description=step)
            bar.refresh()

    say: Callable[[int, str], None] = request.on_token or (lambda token, piece: None)

    def on_token(token: int, piece: str) -> None:
        bar.stop()
        say(token, piece)

    with bar:
        return answer(replace(request, on_step=on_step, on_token=on_token))


def _say(token: int, piece: str) -> None:
    _write(piece)


def _write(text: str) -> None:
    """Put text on stdout at once; RunFailed where it takes none."""
    with reaching_stdout():
        sys.stdout.write(text)


def _probe(options: argparse.Namespace) -> int:
    """Measure this machine; nothing else is asked for at the same time."""
    others = _given(options, "--probe", "--out", "--device", "--model", "--quiet")
    if others:
        raise InputError(
            "--probe measures the machine and runs nothing: give only --out, --device and --model beside it, "
            f"not {others[0]}"
        )
    _check_target("--out", options.out)
    if options.out is not None and options.out.suffix.lower() != ".json":
        raise InputError(
            f"--out {options.out}: wanted a name ending in .json, as plan --device takes it"
        )
    folder = Path(options.model) if options.model else None
    if folder is not None and not os.path.isdir(folder):
        raise InputError(
            f"--model {options.model}: no such folder; wanted one on the disk to measure"
        )
    from executor.probe import run_probe

    run_probe(options.out, device=options.device, folder=folder, quiet=options.quiet)
    return 0


def _make_checkpoint(spec: str, directory: str, *, quiet: bool) -> int:
    from executor.make_checkpoint import make_random_checkpoint

    size_bytes = make_random_checkpoint(spec, Path(directory))
    if not quiet:
        print(f"{directory}: {format_gib(size_bytes)} of random weights ({spec})", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
