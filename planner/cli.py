"""`plan`: what fits a budget, how, and at what price; the report or one JSON document on stdout, the rest on stderr."""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from planner.arguments import Parser, count, tokens
from planner.errors import BudgetTooSmall, InputError, RunFailed, StowplanError
from planner.files import check_target, reaching_stdout
from planner.lines import wrapped
from planner.signals import Interrupted, ending_signals
from planner.units import MIB, format_gib, parse_bytes

if TYPE_CHECKING:
    from planner.checkpoint.spec import Checkpoint
    from planner.plan.shapes import Workload
    from planner.problem import Request
    from planner.profile import DeviceProfile

INTERRUPTED = 130
DEFAULT_MODEL = "7b"
DEFAULT_IMAGE = "3840x2160"
DEFAULT_DEVICE = "rtx-5080-16gb"
# modules with a main(arguments) that returns the exit code and raises what this module's main catches
COMMANDS = {
    "devices": "planner.devices",
    "pack": "planner.layout.cli",
    "replay": "planner.replay.cli",
}

EPILOG = """\
other commands: plan devices, plan replay FILE (a torch memory snapshot), plan pack FILE.csv --capacity N (offsets of
buffers); each has a --help of its own

`plan --vram 16GB` alone plans the 7B model with one 3840x2160 image, 64 prompt tokens beyond the template and 128
new ones on an RTX 5080 16GB. Sizes: 16GB is 16 * 10^9 bytes, 16GiB is 16 * 2^30.

exit codes: 0 fits, 1 the plan could not be written, 2 usage or bad input, 3 does not fit, 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one `plan`. Never a traceback for a user's mistake."""
    if arguments is None:
        gc.disable()  # this process ends soon; looking for cycles takes a tenth of its time
        atexit.register(gc.freeze)  # and as long again at its end, if it may
    try:
        with ending_signals(for_good=arguments is None):
            return _main(list(sys.argv[1:] if arguments is None else arguments))
    except StowplanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except MemoryError as error:
        print(f"error: memory was refused: {str(error) or 'no more is known'}", file=sys.stderr)
        return RunFailed.exit_code
    except KeyboardInterrupt as error:
        print("interrupted; nothing half written", file=sys.stderr)
        return error.exit_code if isinstance(error, Interrupted) else INTERRUPTED
    except BrokenPipeError:
        # whoever read the report has gone; without this Python complains once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main(words: list[str]) -> int:
    if words and words[0] in COMMANDS:
        command: Callable[[list[str]], int] = import_module(COMMANDS[words[0]]).main
        return command(words[1:])
    _plan(_parser().parse_args(words))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="plan",
        description="Plan how a Qwen2.5-VL fits a memory budget: no GPU, no weights, under a second.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add(
        "--vram",
        metavar="SIZE",
        help="bytes the whole process may hold on the device, such as 16GB or 6GiB, or auto: what is free now less a margin (default: what the device offers; no limit on the CPU)",
    )
    add(
        "--model",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="3b, 7b, 32b, 72b, the folder of a checkpoint, or a hub id in the local cache (default: 7b)",
    )
    add(
        "--image",
        action="append",
        metavar="FILE|WxH",
        help="an image file or its size, once per image (default: 3840x2160); none: a prompt of text alone",
    )
    add(
        "--max-pixels",
        type=count,
        metavar="N",
        help="shrink images to N pixels at most (default: as the checkpoint says); llama.cpp's --image-max-tokens is N / 784",
    )
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--prompt",
        metavar="TEXT",
        help="the question; without the checkpoint's tokenizer its length is bounded, not counted",
    )
    text.add_argument(
        "--prompt-tokens",
        type=tokens,
        metavar="N",
        help="tokens of the question, beyond the template and the images (default: 64)",
    )
    add(
        "--max-new-tokens",
        type=tokens,
        default=128,
        metavar="N",
        help="tokens of the answer (default: 128)",
    )
    add(
        "--context-tokens",
        type=tokens,
        metavar="N",
        help="capacity of the KV cache (default: prompt and answer)",
    )
    add(
        "--device",
        default=DEFAULT_DEVICE,
        metavar="NAME",
        help="a device profile's name (plan devices lists them), cpu, auto: the card in this machine, or a profile's .json file (default: rtx-5080-16gb)",
    )
    add(
        "--dtype",
        choices=("auto", "bfloat16", "float16"),
        help="run a bfloat16 checkpoint in it, or in float16 with residual streams in float32 (default: auto: as it is stored, in float16 on a card without bfloat16)",
    )
    add(
        "--ram",
        metavar="SIZE",
        help="host memory that may keep weights once they were read, 0GB: none (default: as the profile says)",
    )
    add(
        "--allocator",
        choices=("native", "expandable"),
        help="torch's segments on a card: native, or expandable, for which the run needs PYTORCH_ALLOC_CONF=expandable_segments:True (default: as the profile says)",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the plan, for: execute FILE; with --sweep a picture (.png, .svg, .pdf)",
    )
    add("--json", action="store_true", help="print the plan itself, one JSON document")
    add(
        "--sweep",
        action="store_true",
        help="budget against seconds instead of one plan, from the least budget to everything resident",
    )
    add(
        "--snapshot",
        type=Path,
        metavar="FILE",
        help="write the predicted allocations as a torch memory snapshot, for plan replay and torch's viewer: a pickle, or JSON for a name in .json",
    )
    return parser


def _plan(options: argparse.Namespace) -> None:
    # imported here, so that --help and a mistyped option answer at once
    from planner.checkpoint.spec import resolve_model
    from planner.dtype import in_dtype
    from planner.screen import show
    from planner.search import Request, search

    device, budget = _device(options)
    ram = parse_bytes(options.ram, what="--ram", or_none=True) if options.ram is not None else None
    read = [*(options.image or ()), options.device]
    for option, path in (("--out", options.out), ("--snapshot", options.snapshot)):
        if path is not None:
            check_target(option, path, read)
    if options.out is not None and options.snapshot is not None:
        if options.out.resolve() == options.snapshot.resolve():
            raise InputError(
                f"--snapshot {options.snapshot}: wanted another file than --out's, found the same; name another one"
            )
    if options.sweep:
        show.check_sweep(options.out, options.snapshot)
    checkpoint = in_dtype(resolve_model(options.model), device, options.dtype or "auto")
    workload = _workload(options, checkpoint)
    if options.allocator is not None and device.kind == "cpu":
        raise InputError("--allocator: a card has one, the CPU has none; leave it out")
    request = Request(
        checkpoint,
        workload,
        budget,
        ram_bytes=ram,
        allocator=options.allocator,
        command=_command(options),
    )
    if options.sweep:
        with reaching_stdout():
            show.show_sweep(
                request,
                device,
                json=options.json,
                picture=options.out,
                marked=options.vram is not None,
            )
        return
    try:
        plan = search(request, device)
    except BudgetTooSmall as error:
        raise _as_typed(error, request) from None
    if options.snapshot is not None:
        from planner.replay.plan_snapshot import write

        write(plan, options.snapshot)
        print(f"wrote {options.snapshot}", file=sys.stderr)
    if options.out is not None:
        plan.save(options.out)
        print(f"wrote {options.out}", file=sys.stderr)
    with reaching_stdout():
        show.show_plan(plan, request, device, json=options.json, path=options.out)


def _device(options: argparse.Namespace) -> tuple[DeviceProfile, int | None]:
    """The device and the budget, found out where they are `auto`; `options` then name what was found, so that the plan's command makes it again."""
    from planner.profile import load_profile

    if options.device == "auto":
        from planner.machine import device_auto

        device, note = device_auto()
        options.device = device.id
        _say(note)
    else:
        device = load_profile(options.device)
    if options.vram == "auto":
        from planner.machine import vram_auto

        free, note = vram_auto(device)
        options.vram = f"{free // MIB}MiB"
        _say(note)
    budget = parse_bytes(options.vram, what="--vram") if options.vram is not None else None
    if device.kind == "cuda":
        if budget is None:
            budget = device.usable_bytes
        elif budget > device.usable_bytes:
            _say(
                f"note: {device.id} offers {format_gib(device.usable_bytes)}, --vram is {format_gib(budget)}; "
                "name a larger card with --device"
            )
    return device, budget


def _say(note: str) -> None:
    """Print what was found out, beside the report, in as many columns."""
    print(wrapped(note, "", "  "), file=sys.stderr)


def _as_typed(error: BudgetTooSmall, request: Request) -> BudgetTooSmall:
    """The refusal with the budget as it was typed beside GiB."""
    from planner.screen.report import typed_budget

    assert request.budget_bytes is not None
    shown, typed = (
        format_gib(request.budget_bytes),
        typed_budget(request.command, request.budget_bytes),
    )
    text = str(error).replace(f"no plan fits {shown}", f"no plan fits {typed}", 1)
    return BudgetTooSmall(text, smallest_bytes=error.smallest_bytes)


def _workload(options: argparse.Namespace, checkpoint: Checkpoint) -> Workload:
    from planner.workload import make_workload, parse_image

    names = options.image or [DEFAULT_IMAGE]
    if "none" in names and len(names) > 1:
        raise InputError("--image: wanted images or none, found both")
    vision = checkpoint.shape.vision
    min_pixels = checkpoint.min_pixels
    max_pixels = checkpoint.max_pixels if options.max_pixels is None else options.max_pixels
    images = [
        parse_image(
            name,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            patch_px=vision.patch_px,
            merge=vision.merge,
            window_px=vision.window_px,
        )
        for name in names
        if name != "none"
    ]
    return make_workload(
        images,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        text=options.prompt,
        n_text_tokens=options.prompt_tokens,
        tokenizer_json=checkpoint.tokenizer_json,
        max_new_tokens=options.max_new_tokens,
        context_tokens=options.context_tokens,
    )


def _command(options: argparse.Namespace) -> str:
    """The command that makes the same plan again: every option that has a say, in one order, defaults spelled out."""
    given: list[tuple[str, object]] = [
        ("--vram", options.vram),
        ("--model", options.model),
        *(("--image", name) for name in options.image or [DEFAULT_IMAGE]),
        ("--max-pixels", options.max_pixels),
        ("--prompt", options.prompt),
        ("--prompt-tokens", options.prompt_tokens),
        ("--max-new-tokens", options.max_new_tokens),
        ("--context-tokens", options.context_tokens),
        ("--device", options.device),
        ("--dtype", options.dtype),
        ("--ram", options.ram),
        ("--allocator", options.allocator),
    ]
    words = ["plan"]
    for option, value in given:
        text = str(value)
        if value is not None:
            # a value such as -x must not be read as an option
            words += [f"{option}={text}"] if text.startswith("-") else [option, text]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())
