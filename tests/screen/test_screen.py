from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from planner.cli import main
from planner.lines import wrapped
from planner.plan import Plan
from planner.screen import report
from planner.screen.report import typed_budget
from planner.units import GIB, MIB

SECTIONS = (
    "phases, in ",
    "timeline",
    "alive at the peak",
    "each move",
    "other ways",
    "how",
    "to run",
)


def text_of(plan: Plan, **options: Any) -> str:
    made = io.StringIO()
    Console(file=made, width=80, highlight=False).print(report.render(plan, **options))
    return made.getvalue()


def row_of(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return line.removeprefix(name).split()


@pytest.mark.parametrize(
    "words",
    [
        ["--vram", "16GB"],
        ["--vram", "8GB"],
        ["--vram", "8GB", *["--image", "3840x2160"] * 4],
        ["--vram", "8GB", "--image", "none"],
        ["--vram", "24GB", "--model", "72b", "--device", "rtx-4090-24gb"],
        ["--device", "cpu", "--model", "3b", "--image", "640x480", "--max-new-tokens", "1"],
    ],
)
def test_the_screen_is_ascii_in_80_columns_and_about_a_screen_and_a_half_when_piped(
    kit: Any, words: list[str]
) -> None:
    out = kit.screen(*words)
    lines = out.splitlines()
    assert out.isascii()
    assert max(map(len, lines)) <= 80
    assert all(line == line.rstrip() for line in lines)
    assert len(lines) <= 75
    wanted = [s for s in SECTIONS if s != "each move" or "iB saved" in out]
    positions = [out.index(section) for section in wanted]
    assert positions == sorted(positions)


def test_the_verdict_says_the_budget_as_typed_and_what_it_costs(kit: Any) -> None:
    lines = kit.screen("--vram", "8GB").splitlines()
    assert lines[0] == "Qwen2.5-VL-7B-Instruct fits 8GB (7.45 GiB) on rtx-5080-16gb"
    (seconds,) = [line for line in lines if line.startswith("  seconds")]
    assert re.search(r"about \d\d\.\d s, of it 0\.\d\d s a token; rates: data sheets", seconds)


def test_the_numbers_of_the_screen_are_the_plans(kit: Any) -> None:
    plan = kit.plan("7b", "8GB")
    text, prediction = text_of(plan), plan.prediction
    table = text[: text.index("timeline")]
    for phase in prediction.phases:
        cells = row_of(table, phase.phase)
        assert cells[-1] == f"{phase.seconds:.2f}"
        assert cells[-2] == f"{phase.bound_peak_bytes / GIB:.2f}"
        assert cells[0] == (
            f"{phase.weights_resident_bytes / GIB:.2f}" if phase.weights_resident_bytes else "-"
        )
    for move in prediction.moves:
        if abs(move.paid_seconds) < 0.005 and abs(move.saved_bytes) < 0.005 * GIB:
            assert move.name not in text
            continue
        saved, paid = row_of(text, move.name)
        assert float(saved) == pytest.approx(move.saved_bytes / GIB, abs=0.0051)
        assert float(paid) == pytest.approx(move.paid_seconds, abs=0.0051)
    for variant in prediction.variants:
        size, seconds, fits = row_of(text, variant.name)
        assert size == f"{variant.bound_bytes / GIB:.2f}"
        assert seconds == f"{variant.seconds:.2f}"
        same = variant.note == "as in this plan"
        assert fits == ("same" if same else "yes" if variant.fits else "no")


def test_the_terms_shown_add_up_to_the_peak(kit: Any) -> None:
    text = text_of(kit.plan("72b", "24GB"))
    section = text[text.index("alive at the peak") : text.index("each move")].splitlines()[1:]
    sizes = [
        float(found[1]) for line in section if (found := re.search(r"  (-?\d+\.\d\d)\b", line))
    ]
    *terms, total = sizes
    assert sum(terms) == pytest.approx(total, abs=0.005 * len(terms) + 0.006)


def test_a_plan_below_a_gib_is_shown_in_mib(kit: Any) -> None:
    plan = kit.plan("3b", None, "cpu", ("64x64",), 2)
    least = kit.plan("3b", f"{plan.prediction.smallest_budget_bytes}B", "cpu", ("64x64",), 2)
    text = text_of(least)
    assert "phases, in MiB" in text
    assert "MiB saved" in text
    bound = f"{least.prediction.bound_peak_bytes / MIB:.1f}"
    assert row_of(text[: text.index("timeline")], "all ")[-2] == bound
    assert f"{bound} MiB at most" in text
    assert " GiB" not in text
    assert "phases, in GiB" in text_of(plan)


def test_a_long_command_is_broken_as_a_shell_takes_it(kit: Any) -> None:
    out = kit.screen(
        "--model", "3b", "--device", "cpu", "--max-new-tokens", "1", *["--image", "56x56"] * 7
    )
    command = out[out.index("  execute") : out.index("  (first save")]
    assert command.count(" \\\n") >= 1
    assert shlex.split(command.replace("\\\n", "")) == [
        "execute",
        "plan.json",
        "--model",
        "DIR",
        *["--image", "FILE"] * 7,
        "--prompt",
        "TEXT",
    ]


def test_a_terminal_gets_blocks_and_a_pipe_does_not(kit: Any) -> None:
    plan = kit.plan("7b", "8GB")
    assert "\u2588" in text_of(plan)
    assert text_of(plan, blocks=False).isascii()


def test_neighbouring_budgets_are_shown_where_there_are_any(kit: Any) -> None:
    both = kit.screen("--vram", "8GB")
    own = float(row_of(both, "this plan")[1])
    size, seconds, fits = row_of(both, "next cheaper budget (estimate)")
    assert float(size) < 7.4
    assert float(seconds) > own
    assert fits == "yes"
    size, seconds, fits = row_of(both, "next faster budget (estimate)")
    assert float(size) > 7.45
    assert float(seconds) < own
    assert fits == "no"
    whole = kit.screen("--vram", "16GB")
    assert "next cheaper budget" in whole
    assert "next faster budget" not in whole


@pytest.mark.parametrize(
    ("request_", "budget", "wanted"),
    [
        ("plan --vram 16GB --model 7b", 16 * 10**9, "16GB (14.90 GiB)"),
        ("plan --vram 8GiB", 8 * GIB, "8GiB (8.00 GiB)"),
        ("plan --vram '7.50 GiB'", 15 * GIB // 2, "7.50 GiB"),
        ("plan --model 7b", 3 * GIB, "3.00 GiB"),
        ("plan", GIB, "1.00 GiB"),
    ],
)
def test_the_budget_is_shown_as_typed_beside_gib(request_: str, budget: int, wanted: str) -> None:
    assert typed_budget(request_, budget) == wanted


def test_the_refusal_shows_the_budget_as_typed_too(run: Any) -> None:
    outcome = run("--vram", "1.5GB")
    assert outcome.code == 3
    assert outcome.err.startswith("error: no plan fits 1.5GB (1.40 GiB): the smallest needs 1.79")


def test_the_command_to_run_sets_what_the_allocator_needs(kit: Any) -> None:
    words = ["--vram", "6GB", "--model", "3b", "--image", "none"]
    needs = "PYTORCH_ALLOC_CONF=expandable_segments:True execute plan.json"
    assert needs in kit.screen(*words, "--allocator", "expandable")
    assert "\n  execute plan.json" in kit.screen(*words, "--allocator", "native")


def test_a_plan_that_was_saved_is_run_by_its_name(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "a plan.json"
    words = ["--device", "cpu", "--model", "3b", "--image", "64x64", "--out", str(path)]
    outcome = run(*words)
    joined = "".join(outcome.out.replace("\\\n", "").split())
    assert "".join(f"execute {shlex.quote(str(path))} --model DIR".split()) in joined
    assert "first save the plan" not in outcome.out


def test_a_screen_costs_no_import_of_matplotlib_or_torch(run: Any, kit: Any) -> None:
    import subprocess

    code = (
        "import sys; from planner.cli import main; main(['--vram', '8GB']);"
        "sys.exit(bool({'torch', 'matplotlib', 'numpy', 'pynvml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=kit.root, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["", "devices", "pack", "replay"])
def test_the_help_of_every_command_has_80_columns(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: plan {command}".strip() in text
    assert max(map(len, text.splitlines())) <= 80


def test_one_new_token_is_one_and_no_number_ends_a_line_without_its_unit(kit: Any) -> None:
    one = kit.screen("--vram", "8GB", "--model", "3b", "--image", "none", "--max-new-tokens", "1")
    assert "1 new one; KV cache" in one
    for words in (["--vram", "8GB", "--ram", "0GB"], ["--vram", "8GB", "--sweep"]):
        lines = kit.screen(*words).splitlines()
        heads = [line for line in lines if line.endswith("; slots")]  # of a table, whose unit it is
        begun = [line for line in lines if re.match(r" *(s|min|ms|[KMG]iB)\b", line)]
        assert begun == heads
        assert max(map(len, lines)) <= 80
    assert wrapped("takes 6 min 25 s or 7 GiB", width=14).splitlines() == [
        "takes",
        "6 min 25 s or",
        "7 GiB",
    ]


def test_what_of_the_arena_is_not_yet_written_is_called_so(kit: Any) -> None:
    words = ["--vram", "560MB", "--device", "cpu", "--model", "3b", "--image", "640x480"]
    out = kit.screen(*words)
    (size, *_) = row_of(out, "of it not yet written")
    assert float(size) < 0
    assert "rest of the arena" not in out
