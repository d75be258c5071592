from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    "size", ["16", "16gb", "16G", "0GB", "-1GB", "GB", "", "1e3GB", "16 parsecs"]
)
def test_a_budget_without_a_proper_unit_is_refused_by_both_commands(size: str, kit: Any) -> None:
    kit.plan(f"--vram={size}").refused("--vram: wanted a size")
    words = "--vram: wanted a size" if size else "nothing to run"
    kit.execute_without_plan(f"--vram={size}").refused(words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "abacus"], "abacus"),
        (["--device", ""], "device"),
        (
            ["--device", "t4", "--model", "7b", "--dtype", "bfloat16"],
            "--dtype bfloat16: wanted a device that has it",
        ),
        (["--model", "7b", "--dtype", "half"], "invalid choice"),
        (["--max-new-tokens", "0"], "wanted at least 1, found 0"),
        (["--max-new-tokens", "-3"], "wanted at least 1, found -3"),
        (["--max-new-tokens", "9999999"], "wanted at most 1000000"),
        (["--max-new-tokens", "many"], "wanted a whole number, found 'many'"),
        (["--max-pixels", "0"], "wanted at least 1, found 0"),
        (["--max-pixels", "100"], "raise --max-pixels"),
        (["--context-tokens", "5"], "--context-tokens: wanted at least"),
        (["--prompt-tokens", "0"], "wanted at least 1, found 0"),
        (["--prompt", "x", "--prompt-tokens", "5"], "not allowed with"),
        (["--image", "none", "--image", "8x8"], "wanted images or none, found both"),
        (["--ram", "lots"], "--ram: wanted a size"),
        (["--odd"], "unrecognized arguments: --odd; see: plan --help"),
        (["--vra", "16GB"], "unrecognized arguments"),
    ],
)
def test_an_option_of_plan_that_cannot_be_is_refused(
    arguments: list[str], words: str, kit: Any
) -> None:
    kit.plan(*arguments).refused(words)


def test_a_budget_below_the_smallest_plan_is_exit_code_3_with_what_to_do(kit: Any) -> None:
    out = kit.folder / "plan.json"
    outcome = kit.plan("--vram", "100MiB", out=out)
    outcome.refused("no plan fits", code=3)
    assert "--vram" in outcome.err
    assert not out.exists()


@pytest.mark.parametrize("count", ["0", "-1"])
def test_no_new_tokens_are_refused(count: str, kit: Any) -> None:
    kit.execute("--max-new-tokens", count).refused(
        f"max-new-tokens: wanted 1 or more, found {count}"
    )


def test_a_built_in_model_has_no_weights_to_run(kit: Any) -> None:
    kit.execute("--model", "7b").refused("names a built-in shape without weights")


def test_files_are_not_written_into_folders_that_are_none(kit: Any) -> None:
    inside: Path = kit.image / "out.json"  # a file in place of the folder
    kit.plan(out=inside).refused("does not exist")
    kit.execute("--record", str(inside)).refused("does not exist")
    kit.execute("--save-outputs", str(inside)).refused("does not exist")


def test_a_folder_or_a_device_in_place_of_a_file_to_write_is_refused_at_the_start(kit: Any) -> None:
    for path in (kit.folder, Path("/dev/null")):
        kit.plan(out=path).refused("wanted the name of a file")
        kit.execute("--record", str(path)).refused("wanted the name of a file")
        kit.execute("--save-outputs", str(path)).refused("wanted the name of a file")
    assert Path("/dev/null").is_char_device()
