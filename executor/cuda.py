"""A CUDA card as a device: compute on the current stream, copies on a second one through a ring of pinned pieces.

Nothing is allocated on the copy stream, so no `record_stream` is needed: the arena outlives both queues.
Written to the protocol of device.py; the machines that run the tests have no card (tests/gpu runs on one).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from executor.device import Range
from executor.queues import Queued
from planner.errors import DoesNotFit, OutOfMemory, RunFailed
from planner.units import format_gib

# by card, for the whole process: a context stays until it ends
_FREE_AT_FIRST: dict[str, int] = {}


class CudaStreams:
    """Compute on the current stream, copies on one of their own, on which nothing is allocated."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.copy: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def compute(self) -> Any:
        return torch.cuda.current_stream(self._device)

    def pin(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)

    def move(self, moves: Sequence[tuple[Tensor, Tensor]]) -> None:
        # current device and stream are each thread's own
        with torch.cuda.stream(self.copy):
            for target, source in moves:
                target.copy_(source, non_blocking=True)


def lacking() -> str | None:
    """Why this torch runs no CUDA here, and what to install; None where it does."""
    built, rocm = torch.version.cuda, torch.version.hip
    if rocm is not None:
        # it answers to torch.cuda, but has other kernels and library workspaces than plans count with
        return f"this torch was built for ROCm {rocm}, plans are for CUDA; install a CUDA build"
    if torch.cuda.is_available():
        return None
    if built is None:
        return "this torch was built without CUDA; install a CUDA build"
    return f"torch (CUDA {built}) finds no card or no driver"


class CudaDevice(Queued):
    """Marks are events; device peaks are what the allocator reserved plus what the driver holds beside it."""

    kind: Literal["cuda"] = "cuda"

    def __init__(self, index: int = 0) -> None:
        why = lacking()
        if why is not None:
            raise RunFailed(
                f"--device cuda: {why}, or run with --device cpu and a plan for the cpu"
            )
        self.torch_device = torch.device("cuda", index)
        torch.cuda.init()  # type: ignore[no-untyped-call]
        self.name = torch.cuda.get_device_name(self.torch_device)
        # what others hold is told apart by what was free before this process had a context
        self._nvml = _Nvml.open(self.torch_device)
        self._free_before = self._free_at_first()
        torch.cuda.set_device(self.torch_device)
        super().__init__(CudaStreams(self.torch_device))
        torch.cuda.synchronize(self.torch_device)  # the context exists from here on
        # torch allows it by default: partial sums of float16 products would be float16, and could leave its range
        products = torch.backends.cuda.matmul
        self._reduced_before = products.allow_fp16_reduced_precision_reduction
        products.allow_fp16_reduced_precision_reduction = False
        self._peak_held = 0

    def _free_at_first(self) -> int | None:
        """What the card had free before this process's first run on it; None where NVML does not tell.

        A second run finds the context already there, and would not count it.
        """
        free = self._nvml.free_bytes() if self._nvml is not None else None
        if free is None or self._nvml is None:
            return None
        reserved = torch.cuda.memory_reserved(self.torch_device)  # by who runs us
        return _FREE_AT_FIRST.setdefault(self._nvml.uuid, free + reserved)

    # memory
    def allocate_arena(self, size_bytes: int) -> Tensor:
        free, total = torch.cuda.mem_get_info(self.torch_device)
        cached = torch.cuda.memory_reserved(self.torch_device)
        cached -= torch.cuda.memory_allocated(self.torch_device)
        try:
            # asked first, since some drivers (Windows, WSL2) go on in host memory
            if size_bytes > free + cached:
                raise torch.OutOfMemoryError
            self._arena = torch.empty(size_bytes, dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError:
            raise OutOfMemory(
                f"the arena needs {format_gib(size_bytes)}; the card has {format_gib(free)} of {format_gib(total)} free; "
                "close other programs or plan for a smaller budget"
            ) from None
        self.fill_ring()
        return self._arena

    def reserve_outside(self, size_bytes: int) -> None:
        self._take_workspaces()
        if size_bytes:
            block = torch.empty(size_bytes, dtype=torch.uint8, device=self.torch_device)
            del block

    def _take_workspaces(self) -> None:
        """Have cuBLAS and cuBLASLt take their workspaces, which they keep, before the steps' blocks find their room.

        A product without and one with a bias row, on the arena's first bytes, so that nothing else is allocated.
        """
        assert self._arena is not None, "the arena comes first"
        left, right, out = self._arena[: 3 * 512].view(torch.float16).view(3, 16, 16).unbind(0)
        torch.mm(left, right, out=out)
        torch.addmm(left[0], left, right, out=out)

    def cap(self, budget_bytes: int) -> None:
        total = torch.cuda.mem_get_info(self.torch_device)[1]
        # the fraction limits what the allocator reserves, not the context beside it
        beside = self.context_bytes()
        if budget_bytes <= beside:
            raise DoesNotFit(
                f"the budget of {format_gib(budget_bytes)} is below the {format_gib(beside)} that the driver's context holds"
            )
        fraction = min(1.0, (budget_bytes - beside) / total)
        torch.cuda.set_per_process_memory_fraction(fraction, self.torch_device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        self._peak_held = 0

    def peak_bytes(self) -> int:
        reserved = torch.cuda.max_memory_reserved(self.torch_device)
        held = self.held_bytes()
        # what others free meanwhile may make it look less than it is
        beside = max(0, held - torch.cuda.memory_reserved(self.torch_device))
        self._peak_held = max(self._peak_held, held, beside + reserved)
        return self._peak_held

    def allocator_peaks(self) -> tuple[int, int]:
        device = self.torch_device
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)

    def held_bytes(self) -> int:
        own = self._nvml.held_bytes() if self._nvml is not None else None
        if own is not None:
            return own
        free = self._nvml.free_bytes() if self._nvml is not None else None
        if free is not None and self._free_before is not None:
            # both from NVML: the runtime's figure leaves out what the driver keeps for itself
            return max(0, self._free_before - free)
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return total - free

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.torch_device)[0])

    def context_bytes(self) -> int:
        held, reserved = self.held_bytes(), torch.cuda.memory_reserved(self.torch_device)
        if held < reserved:
            raise OutOfMemory(
                f"the card holds {format_gib(held)} of the {format_gib(reserved)} that were taken: the driver keeps the rest "
                "in host memory; plan for a smaller budget, or forbid it in the driver's settings (sysmem fallback)"
            )
        return held - reserved

    def allocated_peak(self, call: Callable[[], None]) -> int:
        before = torch.cuda.memory_allocated(self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.torch_device) - before

    def release(self, ranges: Sequence[Range]) -> None:
        pass  # a card holds the arena whole

    def resident_bytes(self, ranges: Sequence[Range]) -> int:
        return sum(stop - start for start, stop in ranges)

    def notes(self) -> tuple[str, ...]:
        if self._nvml is not None and self._nvml.held_bytes() is not None:
            return ()
        if self._free_before is not None:
            return (
                "device bytes are what the card has less than before the start: the driver does not tell this process's "
                "own (WSL2, containers), and what other programs take meanwhile is counted in",
            )
        return (
            "device bytes are the whole card's (mem_get_info): other programs on it are counted in; "
            "install nvidia-ml-py for this process alone",
        )

    # queues: see Queued
    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    # clock
    def tick(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.torch_device))
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1000

    def close(self) -> None:
        try:
            # both queues must be idle before their memory goes
            torch.cuda.synchronize(self.torch_device)
        except RuntimeError:
            # the card failed, and whatever it is asked now fails alike; the error under way says so.
            # Freeing a pinned piece would ask it, inside a destructor, which ends the process
            for pinned in self.pinned():
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(pinned))
        else:
            # libraries keep their workspaces, one a stream, until they are told
            clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
            if clear is not None:
                clear()
            torch.cuda.set_per_process_memory_fraction(1.0, self.torch_device)
        products = torch.backends.cuda.matmul
        products.allow_fp16_reduced_precision_reduction = self._reduced_before
        self.drop_ring()
        self._arena = None
        try:
            torch.cuda.empty_cache()
        except RuntimeError:
            pass  # as above
        if self._nvml is not None:
            self._nvml.close()


class _Nvml:
    """This process's bytes on the card, from the driver's management library where it is installed."""

    def __init__(self, library: Any, handle: Any, uuid: str) -> None:
        self.uuid = uuid
        self._library = library
        self._handle = handle

    @classmethod
    def open(cls, device: torch.device) -> _Nvml | None:
        try:
            import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except (pynvml.NVMLError, AttributeError, OSError):
            return None  # an old driver, or one that hides the card's id
        return cls(pynvml, handle, uuid)

    def held_bytes(self) -> int | None:
        try:
            processes = self._library.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except self._library.NVMLError:
            return None
        # inside a container the driver may list another number for this process: then None
        own = [p.usedGpuMemory for p in processes if p.pid == os.getpid()]
        return int(own[0]) if own and own[0] is not None else None

    def free_bytes(self) -> int | None:
        """Bytes of the whole card that nobody holds."""
        try:
            return int(self._library.nvmlDeviceGetMemoryInfo(self._handle).free)
        except self._library.NVMLError:
            return None

    def close(self) -> None:
        self._library.nvmlShutdown()
