"""A card that is not there: torch's CUDA calls answered by a simulated one, and what the executor allocates on it noted.

`FakeCard` hands every storage that `Watch` tells it of to planner.allocator, and answers for torch.cuda's statistics.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from planner.allocator import CachingAllocator, parse_settings
from planner.errors import OutOfMemory
from tests.fake_cuda.trace import Trace
from tests.fake_cuda.watch import Watch, cublas_workspace_bytes

CUDA, META = 1, 14  # c10/core/DeviceType.h
_NUMBERS = itertools.count()  # every card is one of its own
CONTEXT_BYTES = 500 * 2**20


@contextlib.contextmanager
def cuda_guard() -> Iterator[None]:
    """Inside, tensors on `cuda:0` may be sliced and copied: the guard of `meta`, which does nothing, stands for CUDA's.

    A build without CUDA has no device guard for it, and everything that asks for one fails. libc10 exports its table.
    """
    path = os.path.join(os.path.dirname(torch.__file__), "lib", "libc10.so")
    table = (ctypes.c_void_p * 32).in_dll(
        ctypes.CDLL(path), "_ZN3c104impl26device_guard_impl_registryE"
    )
    before = table[CUDA]
    table[CUDA] = table[META]
    try:
        yield
    finally:
        table[CUDA] = before


class FakeStream:
    """Runs nothing; notes who waits for whom."""

    def __init__(self, card: FakeCard, name: str) -> None:
        self.card, self.name = card, name

    def record_event(self, event: Any = None) -> FakeEvent:
        return FakeEvent()

    def wait_event(self, event: Any) -> None:
        assert isinstance(event, FakeEvent)

    def synchronize(self) -> None:
        pass


class FakeEvent:
    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return 0.0


@dataclass
class FakeCard:
    """One card of a compute capability. `complaints`: what the walk saw that no plan can list, one sentence each."""

    capability: str
    total_bytes: int
    alloc_conf: str = ""
    others_bytes: int = 0  # of other programs
    nvml: str | None = (
        None  # what the driver's library tells: "process", "card", or it is not there
    )
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        free_bytes = self.total_bytes - self.others_bytes - CONTEXT_BYTES
        settings = parse_settings(self.alloc_conf)
        self.allocator = CachingAllocator(settings, free_bytes=free_bytes)
        self.trace = Trace()
        self.allocated = self.allocated_peak = self.reserved_peak = 0
        self.fraction = 1.0
        self.context_bytes = 0
        self.paged_bytes = 0  # what the driver keeps in host memory instead
        self.uuid = f"fake-{next(_NUMBERS)}"
        self.workspaces: dict[str, Any] = {}
        self.streams = [FakeStream(self, "compute")]
        self.names: list[str] = []

    # memory, as the allocator has it
    def take(self, size_bytes: int) -> Any:
        try:
            block = self.allocator.malloc(size_bytes)
        except OutOfMemory as error:
            raise torch.OutOfMemoryError(str(error)) from None
        self.allocated += block.size_bytes
        self.allocated_peak = max(self.allocated_peak, self.allocated)
        self.reserved_peak = max(self.reserved_peak, self.allocator.reserved_bytes)
        if len(self.streams) > 1 and self.streams[0].name != "compute":
            self.complaints.append(f"{size_bytes} bytes are allocated on the copy stream")
        return block

    def give(self, block: Any) -> None:
        self.allocated -= block.size_bytes
        self.allocator.release(block)

    def new_storage(self, tensor: Tensor, what: str) -> None:
        """Note a storage that has come into being, and have its end noted."""
        storage = tensor.untyped_storage()
        block, trace = self.take(storage.nbytes()), self.trace
        number = trace.take(storage.nbytes())
        self.names.append(what)

        def gone() -> None:
            trace.give(number)
            self.give(block)

        weakref.finalize(storage, gone).atexit = False

    def again(self, trace: Trace) -> None:
        """Take and give what an equal step took and gave."""
        held = {}
        for taken, number in trace.events:
            if taken:
                held[number] = self.take(trace.sizes[number])
            else:
                self.give(held.pop(number))

    def workspace(self, name: str, size_bytes: int) -> None:
        """Take a library's workspace where it is not yet taken; it stays."""
        if name not in self.workspaces:
            self.workspaces[name] = self.take(size_bytes)

    def reset_peaks(self, device: Any = None) -> None:
        self.allocated_peak = self.allocated
        self.reserved_peak = self.allocator.reserved_bytes

    @contextlib.contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        self.streams.insert(0, stream)
        try:
            yield
        finally:
            self.streams.pop(0)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, torch.cuda is this card, tensors are fake, and what is allocated on `cuda:0` is noted."""
        cuda = {
            "is_available": lambda: True,
            "init": lambda: None,
            "set_device": lambda device: None,
            "get_device_name": lambda device=None: (
                f"fake card, compute capability {self.capability}"
            ),
            "get_device_capability": lambda device=None: tuple(
                int(part) for part in self.capability.split(".")
            ),
            "get_allocator_backend": lambda: "native",
            "get_device_properties": lambda device=None: mock.Mock(uuid=self.uuid),
            "Stream": self._stream,
            "Event": FakeEvent,
            "current_stream": lambda device=None: self.streams[0],
            "stream": self.on,
            "synchronize": lambda device=None: None,
            "mem_get_info": lambda device=None: (self.free_bytes(), self.total_bytes),
            "memory_allocated": lambda device=None: self.allocated,
            "max_memory_allocated": lambda device=None: self.allocated_peak,
            "memory_reserved": lambda device=None: self.allocator.reserved_bytes,
            "max_memory_reserved": lambda device=None: self.reserved_peak,
            "reset_peak_memory_stats": self.reset_peaks,
            "set_per_process_memory_fraction": self._set_fraction,
            "empty_cache": self.allocator.empty_cache,
        }
        with contextlib.ExitStack() as stack:
            stack.enter_context(cuda_guard())
            stack.enter_context(_module("pynvml", None if self.nvml is None else _nvml(self)))
            for name, stand_in in cuda.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
            backends, settings = torch.backends.cuda, self.allocator.settings
            effective = {"expandable_segments": settings.expandable_segments}
            snapshot = mock.Mock(return_value={"allocator_settings": effective})
            stack.enter_context(mock.patch.object(torch.cuda.memory, "_snapshot", snapshot))
            workspace = mock.Mock(return_value=cublas_workspace_bytes(self.capability))
            stack.enter_context(mock.patch.object(backends, "cublas_workspace_size", workspace))
            stack.enter_context(mock.patch.object(backends, "SDPAParams", _Params))
            for name, ask in (
                ("can_use_flash_attention", self._flash),
                ("can_use_efficient_attention", _efficient),
            ):
                stack.enter_context(mock.patch.object(backends, name, ask))
            stack.enter_context(mock.patch.object(torch, "empty", _empty(torch.empty)))
            stack.enter_context(mock.patch.object(Tensor, "numpy", _numpy(Tensor.numpy)))
            stack.enter_context(Watch(self, stack.enter_context(FakeTensorMode())))
            yield

    def _stream(self, device: Any = None) -> FakeStream:
        self.context_bytes = CONTEXT_BYTES
        return FakeStream(self, "copy")

    def held_bytes(self) -> int:
        return self.context_bytes + self.allocator.reserved_bytes - self.paged_bytes

    def free_bytes(self) -> int:
        return self.total_bytes - self.others_bytes - self.held_bytes()

    def _set_fraction(self, fraction: float, device: Any = None) -> None:
        self.fraction = fraction

    def _flash(self, params: _Params, debug: bool = False) -> bool:
        """aten/src/ATen/native/transformers/cuda/sdp_utils.cpp: 16 bits, sm80 and later, equal head sizes up to 256."""
        size = params.query.shape[-1]
        return (
            float(self.capability) >= 8.0
            and params.query.dtype in (torch.float16, torch.bfloat16)
            and size == params.key.shape[-1] == params.value.shape[-1]
            and size <= 256
            and size % 8 == 0
            and _last_strides_1(params)
        )


@contextlib.contextmanager
def _module(name: str, stand_in: Any) -> Iterator[None]:
    """Inside, importing the module gives the stand-in, or fails where there is none. Other modules stay imported."""
    before = sys.modules.get(name)
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


class NvmlError(Exception):
    pass


def _nvml(card: FakeCard) -> Any:
    """The driver's library: bytes by process where it tells them, else of the whole card."""
    own = card.nvml == "process"
    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(free=card.free_bytes()),
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [
            SimpleNamespace(pid=1, usedGpuMemory=card.others_bytes),
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=card.held_bytes() if own else None),
        ],
    )


class _Params(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout: float
    causal: bool
    grouped: bool


def _efficient(params: _Params, debug: bool = False) -> bool:
    multiple = 8 if params.query.element_size() == 2 else 4
    return params.query.shape[-1] % multiple == 0 and _last_strides_1(params)


def _last_strides_1(params: _Params) -> bool:
    """aten/src/ATen/native/transformers/sdp_utils_cpp.h, check_last_dim_stride_equals_1_dense."""
    return all(tensor.stride(-1) == 1 for tensor in params[:3])


def _empty(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.empty whose pinned tensors are plain ones, not fake: the executor writes files into them."""

    def call(*sizes: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        if not pin_memory:
            return empty(*sizes, **options)
        with _disable_current_modes():
            return empty(*sizes, **options)

    return call


def _numpy(numpy: Callable[..., Any]) -> Callable[..., Any]:
    """Tensor.numpy of those pinned tensors: a mode would make them fake on the way."""

    def call(tensor: Tensor) -> Any:
        with _disable_current_modes():
            return numpy(tensor)

    return call
