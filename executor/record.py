"""What a run really took: device bytes, seconds, bytes moved, by step and by phase. Never reads the plan's numbers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import ValidationError

from executor import memory
from executor.device import Device, Tick
from executor.weights import CopyTiming
from planner.errors import InputError
from planner.plan import write_text
from planner.plan.words import Frozen, Phase

RecordPhase = Literal["load", "vision", "prefill", "decode"]


class StepRecord(Frozen):
    """One step over all its repeats. Bytes are None where nobody looked (they are looked at in check runs)."""

    id: str
    phase: Phase
    count: int
    seconds: float  # of all repeats
    first_seconds: float
    waited_seconds: float  # for copies, before the step; not part of `seconds`
    peak_bytes: int | None  # device bytes
    outside_bytes: int | None  # allocated by kernels, outside the arena
    # of torch's allocator, on a card
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None


class CopyRecord(Frozen):
    """One copy over all its repeats."""

    id: str
    count: int
    size_bytes: int
    seconds: float


class PhaseRecord(Frozen):
    """`load` is everything before the first step: context, arena, priming."""

    phase: RecordPhase
    seconds: float
    waited_seconds: float
    peak_bytes: int | None  # device bytes, the highest in the phase
    end_bytes: int | None  # device bytes at its end, before anything is given back
    arena_bytes: int | None  # resident bytes of the arena at its end, before anything is given back
    host_bytes: int  # images and the like that the run itself keeps
    file_bytes: (
        int | None
    )  # file-backed pages at its end (code), part of the device's bytes on the CPU
    copied_bytes: int
    # of torch's allocator, on a card: the highest in the phase
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None


class Record(Frozen):
    """One run, as a JSON document."""

    schema_version: Literal[1]
    fingerprint: str  # of the checkpoint
    device: Literal["cpu", "cuda"]
    device_name: str
    torch_version: str
    threads: int
    check: bool
    budget_bytes: int | None
    arena_bytes: int  # size of the arena
    context_bytes: int | None  # measured after priming, with nothing of the arena touched
    prompt_tokens: int
    new_tokens: int
    seconds: float
    peak_bytes: int | None
    passed_budget: bool
    notes: tuple[str, ...]
    phases: tuple[PhaseRecord, ...]
    steps: tuple[StepRecord, ...]
    copies: tuple[CopyRecord, ...]
    # of a further request of a session: rows of the prompt whose keys and values were there, and weights that were
    reused_tokens: int = 0
    reused_weights_bytes: int = 0

    def save(self, path: Path) -> None:
        """Write the record whole or not at all, one line per list entry."""
        parts = []
        for key, value in self.model_dump(mode="json").items():
            if isinstance(value, list) and value:
                rows = ",\n  ".join(json.dumps(row) for row in value)
                parts.append(f'"{key}": [\n  {rows}\n]')
            else:
                parts.append(f'"{key}": {json.dumps(value)}')
        write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a record; InputError names the file and the field."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as a record: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the document"
            raise InputError(
                f"{path}: not a record of schema version 1: {where}: {first['msg']}; write it anew with: execute --record {path}"
            ) from None


class _Peaks(NamedTuple):
    """Device bytes and the allocator's, each at most; None where nobody tells."""

    device: int | None = None
    allocated: int | None = None
    reserved: int | None = None

    def most(self, other: _Peaks) -> _Peaks:
        return _Peaks(*map(_most, self, other))


NO_PEAKS = _Peaks()


@dataclass(slots=True)
class _Sums:
    """A step's repeats, added up."""

    phase: Phase
    count: int = 0
    seconds: float = 0.0
    first_seconds: float = 0.0
    waited_seconds: float = 0.0
    peaks: _Peaks = NO_PEAKS


@dataclass(slots=True)
class _Open:
    """The phase under way."""

    phase: RecordPhase
    start: float
    waited_seconds: float = 0.0
    peaks: _Peaks = NO_PEAKS
    ticks: list[tuple[str, Tick, Tick]] = field(default_factory=list)


class Recorder:
    """Brackets phases and steps. In check runs the peak is taken anew for every step, otherwise for every phase."""

    def __init__(self, device: Device, *, check: bool, age_s: float = 0.0) -> None:
        self._device = device
        self._check = check
        self._steps: dict[str, _Sums] = {}
        self._outside: dict[str, int] = {}
        self._phases: list[PhaseRecord] = []
        self._open: _Open | None = None
        self._host: dict[str, int] = {}
        self._copied = 0
        self._between: int | None = None  # the most between two phases: of no phase, but of the run
        self._age_s = age_s
        self._start = time.perf_counter() - age_s

    def keep_host(self, name: str, size_bytes: int) -> None:
        """Note what the run itself keeps in host memory; 0 when it is gone."""
        self._host[name] = size_bytes

    @contextmanager
    def phase(
        self,
        phase: RecordPhase,
        *,
        arena_bytes: Callable[[], int | None] = lambda: None,
        copied_bytes: Callable[[], int] = lambda: 0,
    ) -> Iterator[None]:
        """Record one phase; the two callables are asked at its end."""
        assert self._open is None, "phases do not nest"
        if self._phases:
            self._between = _most(self._between, self._device.peak_bytes())
        self._device.reset_peak()
        self._open = _Open(phase, time.perf_counter())
        host = sum(self._host.values())
        try:
            yield
            self._device.synchronize()
            seconds = time.perf_counter() - self._open.start
            if phase == "load":
                seconds += self._age_s
            self._resolve()
            reading = memory.read_memory()
            total = copied_bytes()
            peaks = self._open.peaks.most(self._peaks())
            self._phases.append(
                PhaseRecord(
                    phase=phase,
                    seconds=seconds,
                    waited_seconds=self._open.waited_seconds,
                    peak_bytes=peaks.device,
                    end_bytes=self._device.held_bytes(),
                    arena_bytes=arena_bytes(),
                    host_bytes=max(host, sum(self._host.values())),
                    file_bytes=reading.file_bytes if reading else None,
                    copied_bytes=total - self._copied,
                    allocated_bytes=peaks.allocated,
                    reserved_bytes=peaks.reserved,
                )
            )
            self._copied = total
        finally:
            self._open = None

    @contextmanager
    def step(self, step_id: str, phase: Phase, *, waited_seconds: float = 0.0) -> Iterator[None]:
        """Record one repeat of a step; `waited_seconds` is what it waited for copies beforehand."""
        assert self._open is not None, "a step belongs to a phase"
        sums = self._steps.setdefault(step_id, _Sums(phase))
        sums.waited_seconds += waited_seconds
        self._open.waited_seconds += waited_seconds
        if self._check:
            self._open.peaks = self._open.peaks.most(self._peaks())
            self._device.reset_peak()
        start = self._device.tick()
        yield
        end = self._device.tick()
        self._open.ticks.append((step_id, start, end))
        if self._check:
            self._device.synchronize()
            peaks = self._peaks()
            sums.peaks = sums.peaks.most(peaks)
            self._open.peaks = self._open.peaks.most(peaks)
        if len(self._open.ticks) >= 4096:
            self._device.synchronize()
            self._resolve()

    def outside(self, step_id: str, size_bytes: int) -> None:
        """Note the most that a step's kernels held outside the arena at once."""
        self._outside[step_id] = max(size_bytes, self._outside.get(step_id, 0))

    def finish(
        self,
        *,
        fingerprint: str,
        budget_bytes: int | None,
        arena_bytes: int,
        context_bytes: int | None,
        prompt_tokens: int,
        new_tokens: int,
        copies: Mapping[str, CopyTiming],
        notes: tuple[str, ...] = (),
        reused_tokens: int = 0,
        reused_weights_bytes: int = 0,
    ) -> Record:
        """The record of the whole run."""
        peak = self._between
        for phase in self._phases:
            peak = _most(peak, phase.peak_bytes)
        return Record(
            schema_version=1,
            fingerprint=fingerprint,
            device=self._device.kind,
            device_name=self._device.name,
            torch_version=torch.__version__,
            threads=torch.get_num_threads(),
            check=self._check,
            budget_bytes=budget_bytes,
            arena_bytes=arena_bytes,
            context_bytes=context_bytes,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            seconds=time.perf_counter() - self._start,
            peak_bytes=peak,
            passed_budget=peak is not None and budget_bytes is not None and peak > budget_bytes,
            notes=(*self._device.notes(), *notes),
            phases=tuple(self._phases),
            steps=tuple(
                StepRecord(
                    id=step_id,
                    phase=sums.phase,
                    count=sums.count,
                    seconds=sums.seconds,
                    first_seconds=sums.first_seconds,
                    waited_seconds=sums.waited_seconds,
                    peak_bytes=sums.peaks.device,
                    outside_bytes=self._outside.get(step_id),
                    allocated_bytes=sums.peaks.allocated,
                    reserved_bytes=sums.peaks.reserved,
                )
                for step_id, sums in self._steps.items()
            ),
            copies=tuple(
                CopyRecord(id=copy_id, count=t.runs, size_bytes=t.size_bytes, seconds=t.seconds)
                for copy_id, t in copies.items()
            ),
            reused_tokens=reused_tokens,
            reused_weights_bytes=reused_weights_bytes,
        )

    def _peaks(self) -> _Peaks:
        """The device's since its last reset."""
        allocator = self._device.allocator_peaks() or (None, None)
        return _Peaks(self._device.peak_bytes(), *allocator)

    def _resolve(self) -> None:
        """Turn ticks into seconds; the device is idle."""
        assert self._open is not None
        for step_id, start, end in self._open.ticks:
            sums, seconds = self._steps[step_id], self._device.seconds(start, end)
            if sums.count == 0:
                sums.first_seconds = seconds
            sums.count += 1
            sums.seconds += seconds
        self._open.ticks.clear()


def _most(left: int | None, right: int | None) -> int | None:
    return right if left is None else left if right is None else max(left, right)
