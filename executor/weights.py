"""The copy queue: a reader thread that brings units from the checkpoint's files into the arena, in the plan's order.

Two counters by id order the queues on the host: how often a step was issued, how often a copy was. A copy waits for
its `after`, a step for its `waits`. Where the device works behind the host's back, marks carry the same order to it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from executor.arena import TORCH_DTYPES
from executor.convert import weight_files
from executor.device import Chunk, Device, Mark
from executor.files import Files
from executor.host_tier import HostTier
from executor.threads import start_thread
from planner.errors import CheckpointError, OutOfMemory, RunFailed, StowplanError
from planner.plan import Plan
from planner.plan.program import Buffer, Copy, Step
from planner.plan.shapes import TensorLocation, Unit
from planner.units import MIB

# one `preadv`; below 8 MiB the compute thread's Python slows down, as it takes the interpreter's lock in between
READ_BYTES = 64 * MIB


class Piece(NamedTuple):
    """One tensor's way: so many bytes of a file to an arena offset."""

    path: Path
    file_offset: int
    arena_offset: int
    size_bytes: int


def pieces(unit: Unit, buffer: Buffer, locations: Mapping[str, TensorLocation]) -> list[Piece]:
    """Where each tensor of the unit lies in its file and goes in the arena; CheckpointError for one that is missing."""
    found = []
    for tensor in unit.tensors:
        location = locations.get(tensor.name)
        if location is None:
            raise CheckpointError(
                f"the checkpoint has no tensor {tensor.name}, which {unit.id} needs"
            )
        rows = location.shape[0] if location.shape else 0
        if not 0 <= tensor.row_start < tensor.row_stop <= rows:
            raise CheckpointError(
                f"{tensor.name}: the plan takes rows {tensor.row_start} to {tensor.row_stop}, the checkpoint has {rows}"
            )
        row_bytes = location.size_bytes // rows
        if (tensor.row_stop - tensor.row_start) * row_bytes != tensor.size_bytes:
            raise CheckpointError(
                f"{tensor.name}: the plan wants {tensor.size_bytes} bytes, the checkpoint has "
                f"{(tensor.row_stop - tensor.row_start) * row_bytes} (shape {list(location.shape)}, {location.dtype}); "
                "plan for this checkpoint"
            )
        found.append(
            Piece(
                location.path,
                location.offset_bytes + tensor.row_start * row_bytes,
                buffer.offset_bytes + tensor.offset_bytes,
                tensor.size_bytes,
            )
        )
    return found


def chunks(parts: Sequence[Piece], limit_bytes: int = READ_BYTES) -> list[Chunk]:
    """As few reads as the files allow: neighbours in a file are read together, none is longer than the limit."""
    found: list[Chunk] = []
    for part in sorted(parts):
        done = 0
        while done < part.size_bytes:
            offset = part.file_offset + done
            last = found[-1] if found else None
            joins = (
                last is not None
                and last.path == part.path
                and last.offset_bytes + last.size_bytes == offset
                and last.size_bytes < limit_bytes
            )
            room = limit_bytes - last.size_bytes if last is not None and joins else limit_bytes
            take = min(room, part.size_bytes - done)
            target = (part.arena_offset + done, part.arena_offset + done + take)
            if last is not None and joins:
                found[-1] = last._replace(targets=(*last.targets, target))
            else:
                found.append(Chunk(part.path, offset, (target,)))
            done += take
    return found


class CopyTiming(NamedTuple):
    """What one copy did, over all its repeats."""

    runs: int
    size_bytes: int
    seconds: float


class Reader(AbstractContextManager["Reader"]):
    """Runs `plan.copies` in a thread while the steps run in the caller's.

    The caller brackets each step with `begin_step` (waits for its copies) and `finish_step`; an error of the thread
    is raised there. Leaving the `with` block ends the thread and closes its files, whatever happened.

    host: places of the units that stay in host memory; None: new ones. first: the steps before it do not run. landed:
    copies that do not run, for nobody waits for them. hold: copies behind those that the first step waits for begin
    only after `let_go`.
    """

    def __init__(
        self,
        plan: Plan,
        device: Device,
        locations: Mapping[str, TensorLocation],
        *,
        decode_iterations: int,
        alone: bool = False,
        host: HostTier | None = None,
        first: int = 0,
        landed: Collection[str] = (),
        hold: bool = False,
    ) -> None:
        buffers = {buffer.name: buffer for buffer in plan.buffers}
        units = {unit.id: unit for unit in plan.units}
        self._device = device
        self._host = device.host_tier(plan.host_units) if host is None else host
        copies = [copy for copy in plan.copies if copy.id not in landed]
        self._landed = set(landed)
        # of weights that this run uses and finds there
        self.landed_bytes = sum(
            copy.size_bytes for copy in plan.copies if copy.id in landed and copy.phase != "vision"
        )
        self._skipped = {step.id for step in plan.steps[:first]}
        self._chunks = {
            copy.id: chunks(pieces(units[copy.unit], buffers[copy.buffer], locations))
            for copy in copies
        }
        self._once = [copy for copy in copies if copy.phase != "decode"]
        self._loop = [copy for copy in copies if copy.phase == "decode"]
        self._repeats = {copy.id for copy in self._loop if not copy.once}
        # once these were issued the others wait for `let_go`; None once that was called
        self._go_first = set(plan.steps[first].waits) - self._landed if hold else None
        self._decode_steps = {step.id for step in plan.steps if step.phase == "decode"}
        before = [step.id for step in plan.steps if step.phase != "decode"]
        self._last_before_decode = before[-1] if before else None
        self._iterations = decode_iterations
        self._files = weight_files(plan.model, locations, device.readers)
        self._changed = threading.Condition()
        self._steps: Counter[str] = Counter()
        self._copies: Counter[str] = Counter()
        self._step_marks: dict[str, Mark] = {}
        self._copy_marks: dict[str, Mark] = {}
        self._timings: dict[str, CopyTiming] = {}
        # what the thread is blocked on: a step, and how often it must have been issued
        self._awaited: tuple[str, int] | None = None
        self._stopped = False
        self._error: BaseException | None = None
        # in check runs a step and a copy exclude one another, so that each can be watched
        self.alone: AbstractContextManager[object] = threading.Lock() if alone else nullcontext()
        self._thread = threading.Thread(target=self._run, name="stowplan-reader", daemon=True)

    def __enter__(self) -> Reader:
        try:
            start_thread(self._thread, "the reader of weights")
        except OutOfMemory:
            self.stop()
            self._files.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        if self._thread.ident is not None:
            self._thread.join()
        self._files.close()

    # the caller's side
    def begin_step(self, step: Step, iteration: int = 0) -> float:
        """Seconds waited until the copies that the step names had been issued; then the device waits for them itself."""
        start = time.perf_counter()
        with self._changed:
            for copy in step.waits:
                if copy in self._landed:
                    continue
                needed = iteration + 1 if copy in self._repeats else 1
                # notified on every change, so no timeout: but one lets an interrupt through on every system
                while self._copies[copy] < needed and self._error is None:
                    if self._stopped or not self._thread.is_alive():
                        raise RunFailed(f"{step.id}: waits for {copy}, which will not come")
                    self._check_blocked(step, copy)
                    self._changed.wait(timeout=1.0)
                self._raise()
                self._device.compute_waits(self._copy_marks[copy])
            self._raise()
        return time.perf_counter() - start

    def _check_blocked(self, step: Step, copy: str) -> None:
        """Nothing, unless the thread waits for a step that can only be issued after this one; then neither would go on."""
        if self._awaited is not None and self._steps[self._awaited[0]] < self._awaited[1]:
            raise RunFailed(
                f"{step.id} waits for {copy}, and the copies before it for {self._awaited[0]}: "
                "the plan blocks itself; make it anew"
            )

    def finish_step(self, step: Step) -> None:
        """Count the step as issued; copies into what it read may go ahead."""
        mark = self._device.mark_compute()
        with self._changed:
            self._step_marks[step.id] = mark
            self._steps[step.id] += 1
            self._changed.notify_all()

    def let_go(self) -> None:
        """Copies that were held may begin."""
        with self._changed:
            self._go_first = None
            self._changed.notify_all()

    def stop(self) -> None:
        """No further copies; the one under way ends with its present read."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def timings(self) -> dict[str, CopyTiming]:
        """By copy: how often it ran, bytes and seconds of all its runs so far."""
        with self._changed:
            return dict(self._timings)

    def copied_bytes(self) -> int:
        """Bytes of all copies so far."""
        return sum(timing.size_bytes for timing in self.timings().values())

    def _raise(self) -> None:
        if self._error is None:
            return
        if isinstance(self._error, StowplanError):
            raise type(self._error)(str(self._error)) from None
        if isinstance(self._error, MemoryError):
            raise OutOfMemory("the reader of weights: memory was refused") from None
        raise RunFailed(f"the reader of weights failed: {self._error}") from self._error

    # the thread's side
    def _run(self) -> None:
        try:
            for copy in self._once:
                if not self._copy(copy, 0):
                    return
            for iteration in range(self._iterations):
                for copy in self._loop:
                    if copy.once and iteration:
                        continue
                    if not self._copy(copy, iteration):
                        return
        except BaseException as error:  # carried to the caller's thread, where it is raised
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _copy(self, copy: Copy, iteration: int) -> bool:
        """True when the copy was issued; False when the reader was told to stop."""
        after, needed = self._after(copy, iteration)
        with self._changed:
            while self._held() and not self._stopped:
                self._changed.wait()
            while after is not None and self._steps[after] < needed and not self._stopped:
                self._awaited = after, needed
                self._changed.notify_all()
                self._changed.wait()
            self._awaited = None
            if self._stopped:
                return False
            mark = self._step_marks.get(after) if after is not None else None
        start = time.perf_counter()
        with self.alone:
            if after is not None:
                self._device.copy_waits(mark)
            if not self._bring(copy):
                return False
            mark = self._device.mark_copy()
        seconds = time.perf_counter() - start
        with self._changed:
            old = self._timings.get(copy.id, CopyTiming(0, 0, 0.0))
            self._timings[copy.id] = CopyTiming(
                old.runs + 1, old.size_bytes + self.size_bytes(copy.id), old.seconds + seconds
            )
            self._copy_marks[copy.id] = mark
            self._copies[copy.id] += 1
            self._changed.notify_all()
        return True

    def _held(self) -> bool:
        """Whether the next copy is to wait for `let_go`."""
        return self._go_first is not None and all(map(self._copies.__getitem__, self._go_first))

    def _bring(self, copy: Copy) -> bool:
        """Put the unit's bytes in the copy queue, from disk or from where they stay in host memory; False when told to stop."""
        chunks_ = self._chunks[copy.id]
        if copy.unit not in self._host:
            for chunk in chunks_:
                if self._stopped:
                    return False
                self._device.fill(chunk, self._files)
            return True
        at = self._host.start(copy.unit)
        for chunk in chunks_:
            if self._stopped:
                return False
            # once in a session: later requests find it there
            if copy.unit not in self._host.filled:
                self._host.read(at, chunk, self._files)
            self._device.move(self._host.moves(at, chunk))
            at += chunk.size_bytes
        self._host.filled.add(copy.unit)
        return True

    def _after(self, copy: Copy, iteration: int) -> tuple[str | None, int]:
        """The step to wait for, and how often it must have been issued."""
        if copy.after is None or copy.after in self._skipped:
            return None, 0
        if copy.wraps:
            return (copy.after, iteration) if iteration else (self._last_before_decode, 1)
        return copy.after, iteration + 1 if copy.after in self._decode_steps else 1

    def size_bytes(self, copy: str) -> int:
        """Bytes that one run of the copy really reads."""
        return sum(chunk.size_bytes for chunk in self._chunks[copy])


class EmbeddingRows:
    """Rows of the embedding table, read from the file as they are needed; the table is never loaded."""

    NAME = "model.embed_tokens.weight"
    BATCH_ROWS = 256

    def __init__(self, locations: Mapping[str, TensorLocation], shape: tuple[int, int]) -> None:
        location = locations.get(self.NAME)
        if location is None:
            raise CheckpointError(f"the checkpoint has no tensor {self.NAME}")
        if tuple(location.shape) != shape:
            raise CheckpointError(
                f"{self.NAME}: wanted shape {list(shape)}, the checkpoint has {list(location.shape)}; plan for this checkpoint"
            )
        self._location = location
        self._dtype = TORCH_DTYPES[location.dtype]
        self._row_bytes = location.size_bytes // shape[0]
        self._rows = shape[0]
        self._files = Files()

    def __call__(self, ids: Sequence[int] | Tensor, out: Tensor) -> None:
        """Row `ids[i]` of the table into row i of `out` (n, E), contiguous rows of the file's dtype or a wider one."""
        wanted = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        assert len(wanted) == out.shape[0], (len(wanted), out.shape)
        for start in range(0, len(wanted), self.BATCH_ROWS):
            batch = wanted[start : start + self.BATCH_ROWS]
            rows = out[start : start + len(batch)]
            on_cpu, same = rows.device.type == "cpu", rows.dtype == self._dtype
            direct = on_cpu and same and rows.is_contiguous()
            target = rows if direct else torch.empty(rows.shape, dtype=self._dtype)
            view = target.view(-1).view(torch.uint8).numpy().data
            for index, row in enumerate(batch):
                assert 0 <= row < self._rows, f"token id {row} of {self._rows}"
                at = index * self._row_bytes
                self._files.read(
                    self._location.path,
                    self._location.offset_bytes + row * self._row_bytes,
                    [view[at : at + self._row_bytes]],
                )
            if not direct:
                # converted here, as a move between host and card that converts takes memory there
                rows.copy_(target if on_cpu or same else target.to(rows.dtype))

    def close(self) -> None:
        self._files.close()
