from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from executor import memory
from executor.compare import compare, render
from executor.cpu import CpuDevice
from executor.record import Record, Recorder
from executor.weights import CopyTiming
from planner.errors import InputError
from planner.units import MIB

pytestmark = pytest.mark.skipif(memory.read_memory() is None, reason="needs /proc")


class Said(CpuDevice):
    """A CPU that tells the peaks it was given, one after another."""

    def __init__(self, peaks: list[int]) -> None:
        super().__init__()
        self.peaks = peaks

    def peak_bytes(self) -> int:
        return self.peaks.pop(0)


def finish(recorder: Recorder, **changes: Any) -> Record:
    given: dict[str, Any] = {
        "fingerprint": "0" * 64,
        "budget_bytes": None,
        "arena_bytes": 4096,
        "context_bytes": 40 * MIB,
        "prompt_tokens": 3,
        "new_tokens": 2,
        "copies": {"copy:prefill/a": CopyTiming(2, 100, 0.5)},
    }
    return recorder.finish(**(given | changes))


def test_a_phase_does_not_inherit_the_peak_of_the_one_before() -> None:
    memory.fix_malloc_thresholds()
    recorder = Recorder(CpuDevice(), check=False)
    with recorder.phase("vision"):
        block = torch.ones(64 * MIB, dtype=torch.uint8)
        del block
    with recorder.phase("prefill"):
        small = torch.ones(16 * MIB, dtype=torch.uint8)
        del small
    vision, prefill = finish(recorder).phases
    assert vision.peak_bytes is not None
    assert prefill.peak_bytes is not None
    assert 44 * MIB < vision.peak_bytes - prefill.peak_bytes < 52 * MIB


def test_in_check_runs_a_step_has_its_own_peak_and_the_phase_the_highest() -> None:
    memory.fix_malloc_thresholds()
    recorder = Recorder(CpuDevice(), check=True)
    with recorder.phase("prefill"):
        for step, size in (("prefill/a", 48), ("prefill/b", 8)):
            with recorder.step(step, "prefill"):
                block = torch.ones(size * MIB, dtype=torch.uint8)
                del block
    record = finish(recorder)
    first, second = record.steps
    assert first.peak_bytes is not None
    assert second.peak_bytes is not None
    assert 36 * MIB < first.peak_bytes - second.peak_bytes < 44 * MIB
    assert record.phases[0].peak_bytes == first.peak_bytes == record.peak_bytes


def test_a_peak_between_two_steps_of_a_check_run_counts_for_the_phase() -> None:
    # asked before a step, after it, and at the end of the phase
    recorder = Recorder(Said([7, 3, 9, 2, 1]), check=True)
    with recorder.phase("prefill"):
        for step in ("prefill/a", "prefill/b"):
            with recorder.step(step, "prefill"):
                pass
    record = finish(recorder)
    assert [step.peak_bytes for step in record.steps] == [3, 2]
    assert record.phases[0].peak_bytes == 9


def test_a_peak_between_two_phases_counts_for_the_run_alone() -> None:
    # asked at the end of each phase, and before the second begins
    recorder = Recorder(Said([7, 9, 5]), check=False)
    for phase in ("vision", "prefill"):
        with recorder.phase(phase):  # type: ignore[arg-type]
            pass
    record = finish(recorder, budget_bytes=8)
    assert [phase.peak_bytes for phase in record.phases] == [7, 5]
    assert record.peak_bytes == 9
    assert record.passed_budget


def test_repeats_of_a_step_are_added_up() -> None:
    recorder = Recorder(CpuDevice(), check=False)
    with recorder.phase("decode", copied_bytes=lambda: 100):
        for _ in range(3):
            with recorder.step("decode/a", "decode", waited_seconds=0.25):
                pass
    record = finish(recorder)
    (step,) = record.steps
    assert (step.count, step.waited_seconds, step.peak_bytes) == (3, 0.75, None)
    assert 0 < step.first_seconds <= step.seconds
    assert record.phases[0].waited_seconds == 0.75
    assert record.phases[0].copied_bytes == 100


def test_the_budget_is_passed_by_the_recorded_peak_alone() -> None:
    for peak, passed in ((100, False), (101, True)):
        recorder = Recorder(Said([peak]), check=False)
        with recorder.phase("prefill"):
            pass
        assert finish(recorder, budget_bytes=100).passed_budget is passed


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    recorder = Recorder(CpuDevice(), check=False)
    with recorder.phase("prefill"):
        with recorder.step("prefill/a", "prefill"):
            pass
    record = finish(recorder)
    record.save(tmp_path / "r.json")
    assert Record.load(tmp_path / "r.json") == record
    (tmp_path / "r.json").write_text('{"schema_version": 1, "odd": 2}')
    with pytest.raises(
        InputError, match=r"r\.json: not a record .* write it anew with: execute --record"
    ):
        Record.load(tmp_path / "r.json")
    with pytest.raises(InputError, match="cannot be read"):
        Record.load(tmp_path / "none.json")


def compared(parts: Any, peak_mib: int, budget_mib: int | None = None) -> Any:
    """A plan of 100 (at most 120) MiB a phase, 50 of them context, against a record of one phase."""
    plan = parts.plan(steps=[parts.step("prefill/a"), parts.step("prefill/b")])
    recorder = Recorder(Said([peak_mib * MIB]), check=False)
    recorder.keep_host("images", 2 * MIB)
    with recorder.phase("prefill", arena_bytes=lambda: 30 * MIB):
        with recorder.step("prefill/a", "prefill"):
            pass
    recorder.outside("prefill/a", 5 * MIB)
    budget = None if budget_mib is None else budget_mib * MIB
    return compare(plan, finish(recorder, budget_bytes=budget))


def test_comparing_joins_phases_and_steps_and_accounts_for_every_byte(parts: Any) -> None:
    found = compared(parts, 90)
    rows = {row.phase: row for row in found.rows}
    assert rows["prefill"].recorded_bytes == 90 * MIB
    assert rows["prefill"].expected_bytes == 100 * MIB
    # 90 = 40 context + 30 arena + 2 images + 5 of kernels + 13
    assert rows["prefill"].unaccounted_bytes == 13 * MIB
    assert not rows["prefill"].passed_bound
    assert rows["vision"].recorded_bytes is None
    assert rows["vision"].unaccounted_bytes is None
    assert [step.id for step in found.steps] == ["prefill/a"]
    assert found.steps[0].recorded_outside_bytes == 5 * MIB
    assert compared(parts, 121).rows[2].passed_bound


def text_of(renderable: Any) -> str:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(renderable)
    file: Any = console.file
    return str(file.getvalue())


def test_the_table_fits_80_columns_and_says_what_happened_to_the_budget(parts: Any) -> None:
    kept, passed = (
        text_of(render(compared(parts, 90, 200))),
        text_of(render(compared(parts, 130, 128))),
    )
    assert max(len(line) for line in (kept + passed).splitlines()) <= 80
    assert "kept, 110.0 MiB of headroom" in kept
    assert "passed by 2.0 MiB" in passed
    assert "-10.0%" in kept
    assert "unaccounted    prefill 13.0 MiB" in kept
    assert "50.0 MiB predicted, 40.0 MiB recorded" in kept


def test_allocations_inside_a_call_are_seen_at_their_highest_sum() -> None:
    def call() -> None:
        first = torch.empty(3 * MIB, dtype=torch.uint8)
        second = torch.empty(2 * MIB, dtype=torch.uint8)
        del first
        third = torch.empty(MIB, dtype=torch.uint8)
        del second, third

    assert CpuDevice().allocated_peak(call) == 5 * MIB


def test_memory_readings_are_consistent() -> None:
    block = torch.ones(32 * MIB, dtype=torch.uint8)
    assert memory.reset_peak()
    before = memory.read_memory()
    del block
    after = memory.read_memory()
    assert before is not None
    assert after is not None
    assert after.peak_bytes + MIB > before.rss_bytes > after.rss_bytes + 24 * MIB
    assert abs(before.rss_bytes - before.anonymous_bytes - before.file_bytes) < MIB
    available = memory.available_bytes()
    assert available is not None
    assert available > MIB
    assert 0 < memory.process_age_s() < 86400


def test_without_proc_readings_are_none_and_a_note_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    device = CpuDevice()
    assert memory.read_memory() is None
    assert not memory.reset_peak()
    assert device.peak_bytes() is None
    assert memory.process_age_s() == 0.0
    recorder = Recorder(device, check=True)
    with recorder.phase("prefill"):
        with recorder.step("prefill/a", "prefill"):
            pass
    record = finish(recorder, context_bytes=None)
    assert record.peak_bytes is None
    assert record.notes == ("this system has no /proc/self/status: device peaks were not recorded",)


def test_a_peak_that_cannot_be_reset_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "reset_peak", lambda: False)
    device = CpuDevice()
    device.reset_peak()
    assert "could not be reset" in device.notes()[0]
