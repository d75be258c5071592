"""The arena: one allocation, every buffer a range of it, every tensor of a step a view at its planned offset."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from executor.device import Device, Range
from planner.errors import PlanFileError, RunFailed
from planner.plan import Plan
from planner.plan.program import Buffer, Step
from planner.plan.words import DTYPE_BYTES
from planner.units import KIB, MIB, format_gib

TORCH_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
}

# arenas up to this size are guarded whole in check runs; of larger ones the bytes beside each declared range
GUARD_WHOLE_BYTES = 256 * MIB
GUARD_EDGE_BYTES = 64 * KIB


class Arena:
    """One uint8 tensor on the device, and the views that the plan places in it."""

    def __init__(self, plan: Plan, device: Device) -> None:
        check_places(plan)
        self.size_bytes = plan.prediction.arena_bytes
        # what dead ranges leave out, though no step of the plan needs it yet
        self.kept: tuple[Range, ...] = ()
        self._plan = plan
        self._device = device
        self._buffers = {buffer.name: buffer for buffer in plan.buffers}
        self._units = {unit.id: unit for unit in plan.units}
        self._views: dict[str, dict[str, Tensor]] = {}
        self._weights: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._bytes = device.allocate_arena(self.size_bytes)

    def views(self, step: Step) -> dict[str, Tensor]:
        """The views of all buffers that the step reads or writes, by name.

        Where two buffers bring the same name (the merger's `vision/x` and `prefill/x`), it means the one read, and
        both also go by `vision/x`, `prefill/x`.
        """
        found = self._views.get(step.id)
        if found is None:
            found = self._views[step.id] = {}
            owner: dict[str, str] = {}
            for name in dict.fromkeys((*step.reads, *step.writes)):
                buffer = self._buffers[name]
                for view in buffer.views:
                    at = buffer.offset_bytes + view.offset_bytes
                    tensor = self._tensor(at, view.dtype, view.shape)
                    if view.name not in found:
                        found[view.name], owner[view.name] = tensor, name
                        continue
                    first = owner[view.name].rpartition("/")[0]
                    found[f"{first}/{view.name}"] = found[view.name]
                    found[f"{name.rpartition('/')[0]}/{view.name}"] = tensor
        return found

    def weights(self, step: Step) -> dict[str, Tensor]:
        """The tensors of the step's unit, by local name; empty where it needs none."""
        if step.unit is None or step.weights is None:
            return {}
        key = (step.unit, step.weights)
        found = self._weights.get(key)
        if found is None:
            base = self._buffers[step.weights].offset_bytes
            found = self._weights[key] = {
                tensor.local: self._tensor(
                    base + tensor.offset_bytes, self._plan.model.dtype, tensor.shape
                )
                for tensor in self._units[step.unit].tensors
            }
        return found

    def weight_shapes(self, step: Step) -> tuple[tuple[int, ...], ...]:
        """Shapes of what `weights` gives, without making its views."""
        if step.unit is None or step.weights is None:
            return ()
        return tuple(tensor.shape for tensor in self._units[step.unit].tensors)

    def range(self, name: str) -> Range:
        """`[start, stop)` of a buffer."""
        buffer = self._buffers[name]
        return buffer.offset_bytes, buffer.offset_bytes + buffer.size_bytes

    def dead_ranges(self, index: int) -> list[Range]:
        """Ranges that hold nothing of use just before step `index` of the plan."""
        live = (self.range(buffer.name) for buffer in self._plan.buffers if _alive(buffer, index))
        return complement((*live, *self.kept), self.size_bytes)

    def release(self, ranges: Sequence[Range]) -> None:
        """Give back the pages of dead ranges where the device can; their content is lost."""
        self._device.release(ranges)

    def resident_bytes(self, ranges: Sequence[Range] | None = None) -> int | None:
        """Bytes of the ranges (of the whole arena) that the device really holds."""
        return self._device.resident_bytes([(0, self.size_bytes)] if ranges is None else ranges)

    def issue(self, call: Callable[[], None]) -> None:
        """Put a call that works on the arena in the device's compute queue."""
        self._device.issue(call)

    def host_waits(self) -> None:
        """Hold the host until all that was issued has run: before it reads a view."""
        self._device.host_waits()

    def close(self) -> None:
        """Drop every view, so that the device can take the memory back."""
        self._views.clear()
        self._weights.clear()
        self._bytes = torch.empty(0, dtype=torch.uint8)

    # check runs
    def fill_canaries(self, ranges: Iterable[Range]) -> None:
        """Fill dead ranges with bytes that read as NaN in every float type, so that a read of them shows in the answer."""
        for start, stop in ranges:
            self.issue(partial(_fill, self._bytes[start:stop]))

    def guard(self, step: Step) -> list[tuple[Range, int]]:
        """Checksums of what the step must not change: all outside the buffers it declares as written."""
        written = [self.range(name) for name in step.writes]
        guarded = complement(written, self.size_bytes)
        if self.size_bytes > GUARD_WHOLE_BYTES:
            guarded = [edge for span in guarded for edge in _edges(span)]
        return [(span, self._checksum(span)) for span in guarded]

    def check_canaries(self, step: Step, before: list[tuple[Range, int]]) -> None:
        """Nothing, if all that `guard` saw is unchanged; RunFailed with the range and its buffers if not."""
        for span, checksum in before:
            if self._checksum(span) != checksum:
                hit = [
                    buffer.name
                    for buffer in self._plan.buffers
                    if max(span[0], buffer.offset_bytes)
                    < min(span[1], buffer.offset_bytes + buffer.size_bytes)
                ]
                raise RunFailed(
                    f"{step.id}: changed arena bytes outside the buffers it declares as written, "
                    f"in [{span[0]}, {span[1]}) ({', '.join(hit[:4]) or 'no buffer'}); this is a bug of the executor"
                )

    def _checksum(self, span: Range) -> int:
        piece = self._bytes[span[0] : span[1]]
        if piece.device.type == "cpu":
            return zlib.crc32(piece.numpy().data)
        return sum_of(piece)

    def _tensor(self, offset_bytes: int, dtype: str, shape: tuple[int, ...]) -> Tensor:
        size_bytes = prod(shape) * DTYPE_BYTES[dtype]
        flat = self._bytes[offset_bytes : offset_bytes + size_bytes]
        return flat.view(TORCH_DTYPES[dtype]).view(shape)


def check_places(plan: Plan) -> None:
    """Nothing, if every buffer, view and tensor lies where it can; PlanFileError naming the first that does not."""
    size_bytes = plan.prediction.arena_bytes
    buffers = {buffer.name: buffer for buffer in plan.buffers}
    units = {unit.id: unit for unit in plan.units}
    for buffer in plan.buffers:
        if buffer.offset_bytes < 0 or buffer.offset_bytes + buffer.size_bytes > size_bytes:
            raise PlanFileError(
                f"buffer {buffer.name}: bytes [{buffer.offset_bytes}, {buffer.offset_bytes + buffer.size_bytes}) "
                f"lie outside the arena of {size_bytes} ({format_gib(size_bytes)}); make the plan anew"
            )
        for view in buffer.views:
            _check_place(
                f"view {view.name} of {buffer.name}",
                buffer,
                view.offset_bytes,
                view.dtype,
                view.shape,
            )
    item_bytes = DTYPE_BYTES[plan.model.dtype]
    # an unknown name would be waited for without end
    steps, copies = {step.id for step in plan.steps}, {copy.id for copy in plan.copies}
    for copy in plan.copies:
        if copy.after is not None and copy.after not in steps:
            raise PlanFileError(
                f"{copy.id}: comes after step {copy.after}, which the plan lacks; make the plan anew"
            )
    for step in plan.steps:
        for name in step.waits:
            if name not in copies:
                raise PlanFileError(
                    f"step {step.id}: waits for {name}, which the plan lacks; make the plan anew"
                )
        for name in (*step.reads, *step.writes, *([step.weights] if step.weights else [])):
            if name not in buffers:
                raise PlanFileError(
                    f"step {step.id}: names buffer {name}, which the plan lacks; make the plan anew"
                )
        if step.unit is None:
            continue
        if step.unit not in units or step.weights is None:
            raise PlanFileError(
                f"step {step.id}: its unit {step.unit} has no place; make the plan anew"
            )
    placed = {(step.unit, step.weights) for step in plan.steps if step.unit and step.weights}
    placed |= {(copy.unit, copy.buffer) for copy in plan.copies}
    for unit_id, name in sorted(placed):
        if unit_id not in units or name not in buffers:
            raise PlanFileError(
                f"copy of {unit_id} into {name}: the plan lacks one of them; make the plan anew"
            )
        for tensor in units[unit_id].tensors:
            if tensor.size_bytes != prod(tensor.shape) * item_bytes:
                raise PlanFileError(
                    f"{unit_id}, {tensor.local}: {tensor.size_bytes} bytes do not hold shape {list(tensor.shape)}"
                )
            _check_place(
                f"{tensor.local} of {unit_id} in {name}",
                buffers[name],
                tensor.offset_bytes,
                plan.model.dtype,
                tensor.shape,
            )


def sum_of(piece: Tensor) -> int:
    """A sum over the bytes that changes with any of them, eight at a time from the first whole eight on."""
    head = -piece.storage_offset() % 8
    if piece.numel() < head + 8:
        return int(piece.sum())
    rest = head + (piece.numel() - head) // 8 * 8
    words = piece[head:rest].view(torch.int64)
    return int(words.sum()) + int(piece[:head].sum()) + int(piece[rest:].sum())


def complement(ranges: Iterable[Range], size_bytes: int) -> list[Range]:
    """What of `[0, size_bytes)` lies in none of the ranges, in order."""
    gaps, at = [], 0
    for start, stop in sorted(ranges):
        if start > at:
            gaps.append((at, start))
        at = max(at, stop)
    if at < size_bytes:
        gaps.append((at, size_bytes))
    return gaps


def _check_place(
    what: str, buffer: Buffer, offset_bytes: int, dtype: str, shape: tuple[int, ...]
) -> None:
    item_bytes = DTYPE_BYTES.get(dtype, 0)
    if not item_bytes or min(shape, default=1) < 0:
        raise PlanFileError(f"{what}: dtype {dtype!r} and shape {list(shape)} cannot be used")
    end = offset_bytes + prod(shape) * item_bytes
    if offset_bytes < 0 or end > buffer.size_bytes:
        raise PlanFileError(
            f"{what}: bytes [{offset_bytes}, {end}) lie outside its buffer of {buffer.size_bytes}; make the plan anew"
        )
    if (buffer.offset_bytes + offset_bytes) % item_bytes:
        raise PlanFileError(f"{what}: offset {offset_bytes} is not a multiple of {item_bytes}")


def _alive(buffer: Buffer, index: int) -> bool:
    return any(birth <= index < death for birth, death in buffer.lifetimes)


def _fill(piece: Tensor) -> None:
    piece.fill_(0xFF)


def _edges(span: Range) -> list[Range]:
    start, stop = span
    if stop - start <= 2 * GUARD_EDGE_BYTES:
        return [span]
    return [(start, start + GUARD_EDGE_BYTES), (stop - GUARD_EDGE_BYTES, stop)]
