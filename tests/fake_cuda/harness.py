"""A card that is not there: torch's CUDA calls answered by a simulated one, and what the executor allocates on it noted.

FakeTensorMode runs every operation on shapes alone; a dispatch mode below autograd sees each storage that comes into
being on `cuda:0` and when it goes. `FakeCard` hands every one of them to planner.allocator, takes the libraries'
workspaces where real ones are taken (inside the first product), and answers for torch.cuda's statistics.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from planner.allocator import CachingAllocator, parse_settings
from planner.errors import OutOfMemory
from planner.simulate import card_bytes

CUDA, META = 1, 14  # c10/core/DeviceType.h
_NUMBERS = itertools.count()  # every card is one of its own
CONTEXT_BYTES = 500 * 2**20
LT_WORKSPACE_BYTES = 2**20
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv")
OWN_KERNELS = (
    "aten::_fused_rms_norm",
    "aten::mish_backward",
)  # composite, yet a kernel of their own on CUDA


def cublas_workspace_bytes(capability: str) -> int:
    """aten/src/ATen/cuda/CublasHandlePool.cpp: 32 MiB on compute capability 9.0, else 2 x 4 MiB + 8 x 16 KiB."""
    return 32 * 2**20 if capability == "9.0" else (2 * 4096 + 8 * 16) * 1024


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


class Block(NamedTuple):
    """One allocation outside the arena: `[birth, death)` counted in allocations since the trace began."""

    size_bytes: int
    birth: int
    death: int


class Trace:
    """Allocations in order, and how many had been made when each went."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.deaths: dict[int, int] = {}
        self.events: list[tuple[bool, int]] = []  # (taken, number), in order

    def take(self, size_bytes: int) -> int:
        number = len(self.sizes)
        self.sizes.append(size_bytes)
        self.events.append((True, number))
        return number

    def give(self, number: int) -> None:
        self.deaths[number] = len(self.sizes)
        self.events.append((False, number))

    def sequences(self) -> list[tuple[Block, ...]]:
        """Every distinct run of allocations between two moments at which nothing is held, in order."""
        found: dict[tuple[Block, ...], None] = {}
        start = 0
        while start < len(self.sizes):
            stop = start + 1
            end = self.deaths[start]
            while stop < end:
                end = max(end, self.deaths[stop])
                stop += 1
            found[
                tuple(
                    Block(self.sizes[i], i - start, self.deaths[i] - start)
                    for i in range(start, stop)
                )
            ] = None
            start = stop
        return list(found)

    def blocks(self) -> tuple[Block, ...]:
        """The distinct sequences behind one another: what a plan lists for a step."""
        blocks: list[Block] = []
        for sequence in self.sequences():
            start = len(blocks)
            blocks += [Block(b.size_bytes, start + b.birth, start + b.death) for b in sequence]
        return tuple(blocks)


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


class Watch(TorchDispatchMode):
    """Tells the card of every new storage on it. Composite operations are taken apart first, as autograd would."""

    def __init__(self, card: FakeCard, fake: FakeTensorMode) -> None:
        super().__init__()
        self.card, self.fake = card, fake
        self._checked: set[Any] = set()
        self._known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(not isinstance(t, FakeTensor) for t in _tensors(args)):
            args = tree_map_only(Tensor, self._as_fake, args)
        name = func._schema.name
        if name.startswith("aten::") and name not in OWN_KERNELS and _composite(func):
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        self._complain(name, args, kwargs)
        target = _target(func, args, kwargs)
        if target is not None:
            # it writes where it is told to and allocates nothing; shapes that were checked once need it no more
            key = (func, _shapes(args), _shapes(kwargs))
            if key in self._checked:
                self._libraries(name, args)
                return target
            self._checked.add(key)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            if tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                if storage.nbytes() and storage not in self._known:
                    self._known[storage] = True
                    self.card.new_storage(tensor, name)
        self._libraries(name, args)
        return out

    def _as_fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _libraries(self, name: str, args: Any) -> None:
        """The workspaces that cuBLAS and cuBLASLt take inside their first product, after its output."""
        op = name.removeprefix("aten::")
        if op not in PRODUCTS or not any(t.device.type == "cuda" for t in _tensors(args)):
            return
        if op == "addmm" and args[0].dim() == 1:  # Blas.cpp: a bias row goes to cuBLASLt
            self.card.workspace("cublaslt", LT_WORKSPACE_BYTES)
        else:
            self.card.workspace("cublas", cublas_workspace_bytes(self.card.capability))

    def _complain(self, name: str, args: Any, kwargs: Any) -> None:
        """Where a kernel would make a copy of its own that no dispatch shows."""
        op = name.removeprefix("aten::")
        if op in PRODUCTS:
            operands = [*_tensors(args), *_tensors(kwargs.get("out"))]
            for tensor in operands:
                if tensor.device.type == "cuda" and not _blas_takes(tensor):
                    self.card.complaints.append(
                        f"{op}: an operand of shape {tuple(tensor.shape)} and strides {tensor.stride()} would be copied"
                    )
        if op in ("copy_", "_to_copy"):
            source = args[1] if op == "copy_" else args[0]
            target = args[0] if op == "copy_" else None
            device = target.device if target is not None else kwargs.get("device") or source.device
            dtype = target.dtype if target is not None else kwargs.get("dtype") or source.dtype
            crossing = "cuda" in (torch.device(device).type, source.device.type)
            if not crossing or torch.device(device).type == source.device.type:
                return
            # Copy.cu, copy_requires_temporaries
            plain = source.is_contiguous() and (target is None or target.is_contiguous())
            if dtype != source.dtype or not plain:
                self.card.complaints.append(
                    f"{op} between host and card of {source.dtype} {tuple(source.shape)} to {dtype}: "
                    "a temporary on the card"
                )
        if op in (
            "sort",
            "topk",
            "multinomial",
            "cumsum",
            "nonzero",
            "masked_scatter_",
            "index_put_",
        ):
            if any(t.device.type == "cuda" for t in _tensors(args)):
                self.card.complaints.append(f"{op} on the card takes scratch of unknown size")


def _target(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """What an in-place or out= operation gives back: the tensor it was given to write into."""
    returned = _returned(func)
    if returned is None:
        return None
    index, name = returned
    found = args[index] if index < len(args) else kwargs.get(name)
    return found if isinstance(found, Tensor) else None


@functools.cache
def _returned(func: Any) -> tuple[int, str] | None:
    """Place and name of the argument that is written and given back; None where something else is given back."""
    given = func._schema.returns
    if len(given) != 1 or given[0].alias_info is None or not given[0].alias_info.is_write:
        return None
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return index, argument.name
    return None


def _shapes(value: Any) -> Any:
    """All of an operation's arguments that decides whether it can run."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.stride(), value.dtype, value.device.type)
    if isinstance(value, list | tuple):
        return tuple(map(_shapes, value))
    if isinstance(value, dict):
        return tuple((key, _shapes(entry)) for key, entry in value.items())
    return value


@functools.cache
def _composite(func: Any) -> bool:
    return bool(func._can_decompose())


def _blas_takes(tensor: Tensor) -> bool:
    """aten/src/ATen/native/cuda/Blas.cpp prepare_matrix_for_cublas: one stride 1, the other no shorter than a row."""
    if tensor.dim() < 2:
        return tensor.numel() < 2 or tensor.stride(-1) >= 1
    rows, cols = tensor.shape[-2:]
    down, along = tensor.stride()[-2:]
    return (along == 1 and down >= max(1, cols)) or (down == 1 and along >= max(1, rows))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


# --- the walk ---------------------------------------------------------------------------------------------------------


@dataclass
class Walk:
    """What the executor allocated: `kept` from its start to its end, `steps` by the id of each distinct step."""

    arena_bytes: int
    kept: tuple[int, ...]
    steps: dict[str, list[tuple[Block, ...]]]  # by priming, then over all tiles where asked for
    reserved_bytes: int
    allocated_peak_bytes: int
    complaints: tuple[str, ...]
    seconds: float


def prompt_ids(plan: Any) -> list[int]:
    """Ids of a prompt as long as the plan has room for, with its images in it."""
    ids = plan.model.token_ids
    found = [1]
    for image in plan.workload.images:
        found += [ids.vision_start, *[ids.image] * image.tokens, ids.vision_end]
    return found + [1] * (plan.workload.prompt_tokens - len(found))


def _key(plan: Any, step: Any, arena: Any) -> Any:
    """Equal for steps that allocate alike, of whatever plan."""
    images = tuple((i.rows, i.cols) for i in (plan.workload.images[n] for n in step.images))
    decode = step.phase == "decode"
    tokens = (plan.workload.prompt_tokens, plan.workload.context_tokens)
    shapes = tuple(tuple(t.shape) for t in (arena.weights(step) | arena.views(step)).values())
    parts = (step.kind, decode, plan.model.dtype, step.kernel, plan.levers.tiles)
    return (*parts, images, tokens, shapes)


def walk(
    plan: Any, card: FakeCard, *, whole: bool = False, known: dict[Any, Trace] | None = None
) -> Walk:
    """Go the executor's way from its start through every distinct step and tile once, on a card of the plan's kind.

    That is what priming does, over few keys; `whole` goes through all tiles of every distinct step once more. Steps
    that are in `known` (equal kind, shapes, kernel and tiles) are not run again, their blocks are.
    """
    known = {} if known is None else known
    import gc
    import time

    from executor.arena import Arena
    from executor.cuda import CudaDevice
    from executor.generate import Sampling, next_token, seen_mask
    from executor.prepare import (
        Request,
        call_step,
        check_kernels,
        distinct_steps,
        make_runs,
        read_prompt,
    )

    begun = time.perf_counter()
    ids = prompt_ids(plan)
    prompt = read_prompt(plan, Request(locations={}, prompt=ids))

    def embeddings(wanted: Sequence[int], out: Tensor) -> None:
        # as weights.EmbeddingRows: rows lie together on the host, then go over in one piece
        for start in range(0, len(wanted), 256):
            rows = out[start : start + 256]
            rows.copy_(torch.empty(rows.shape, dtype=rows.dtype))

    gc.collect()
    gc.disable()  # cycles would keep storages beyond their last reference; there must be none
    steps: dict[str, list[tuple[Block, ...]]] = {}
    try:
        with card.installed():
            device = CudaDevice()
            check_kernels(plan, device)
            arena = Arena(plan, device)
            runs = make_runs(plan, prompt, device, embeddings)  # type: ignore[arg-type]
            device.reserve_outside(scratch_bytes(plan))
            start = card.trace
            kept = [n for n in range(len(start.sizes)) if n not in start.deaths]
            for priming in (True, False) if whole else (True,):
                for step, run in distinct_steps(plan, arena, runs, prompt, priming=priming):
                    key = (_key(plan, step, arena), priming)
                    if key in known:
                        card.again(known[key])
                    else:
                        card.trace = known[key] = Trace()
                        call_step(step, run, arena)
                    steps.setdefault(step.id, []).append(known[key].blocks())
            device.synchronize()
            card.trace = Trace()
            for step in plan.steps:
                if step.kind == "sample":
                    logits = arena.views(step)["logits"]
                    with contextlib.suppress(DataDependentOutputException):
                        next_token(logits, seen_mask((), plan.model.text.vocabulary), Sampling())
                    steps[step.id] = [card.trace.blocks()]
            found = Walk(
                arena_bytes=start.sizes[kept[0]],
                kept=tuple(start.sizes[n] for n in kept[1:]),
                steps=steps,
                reserved_bytes=card.allocator.reserved_bytes,
                allocated_peak_bytes=card.allocated_peak,
                complaints=tuple(card.complaints),
                seconds=time.perf_counter() - begun,
            )
            del runs, run
            arena.close()
            device.close()
    finally:
        gc.enable()
    return found


# --- walked beside planned --------------------------------------------------------------------------------------------

# one profile of each compute capability
CARDS = {
    "8.0": "a100-sxm4-80gb",
    "8.6": "rtx-3090-24gb",
    "8.9": "rtx-4090-24gb",
    "9.0": "h100-sxm5-80gb",
    "12.0": "rtx-5080-16gb",
}
OLD_CARDS = {"7.5": "t4-16gb"}  # without bfloat16, and without the flash kernel


class Compared(NamedTuple):
    """One plan beside its walk. `wrong`: one sentence for everything in which they differ."""

    steps: int
    blocks: int  # that the walk saw, over all distinct steps
    declared: int  # that the plan lists beside them
    reserved_bytes: int
    planned_reserved_bytes: int
    wrong: tuple[str, ...]


def make_plan(
    model: str,
    image: str,
    budget: str | None,
    capability: str,
    allocator: Any = None,
    *,
    dtype: str = "bfloat16",
) -> Any:
    """A plan as the command line makes it, for that model, image and budget on a card of that capability."""
    from planner.checkpoint.spec import resolve_model
    from planner.profile import load_profile
    from planner.search import Request, search
    from planner.units import parse_bytes
    from planner.workload import make_workload, parse_image

    checkpoint = resolve_model(model)
    shape = checkpoint.shape.model_copy(update={"dtype": dtype})
    checkpoint = dataclasses.replace(checkpoint, shape=shape)
    vision, limits = checkpoint.shape.vision, (checkpoint.min_pixels, checkpoint.max_pixels)
    images = [
        parse_image(
            name,
            min_pixels=limits[0],
            max_pixels=limits[1],
            patch_px=vision.patch_px,
            merge=vision.merge,
            window_px=vision.window_px,
        )
        for name in image.split()
    ]
    workload = make_workload(images, min_pixels=limits[0], max_pixels=limits[1], max_new_tokens=128)
    bytes_ = None if budget is None else parse_bytes(budget, what="--vram")
    request = Request(checkpoint, workload, bytes_, allocator=allocator)
    return search(request, load_profile((CARDS | OLD_CARDS)[capability]))


def seen(blocks: Sequence[Any]) -> tuple[Any, ...]:
    """A plan's blocks without the declared ones, counted anew."""
    numbers = [n for n, block in enumerate(blocks) if not block.declared]
    return tuple(
        blocks[n].model_copy(
            update={"birth": number, "death": sum(other < blocks[n].death for other in numbers)}
        )
        for number, n in enumerate(numbers)
    )


def scratch_bytes(plan: Any) -> int:
    """What the executor makes room for at the start."""
    return max(step.outside_bytes for step in plan.steps)


def compare(plan: Any, found: Walk) -> Compared:
    """Everything that the walk shows and the plan does not list, and the reverse."""
    wrong = list(found.complaints)
    by_id = {step.id: step for step in plan.steps}
    for step_id, every in found.steps.items():
        listed = tuple(
            Block(block.size_bytes, block.birth, block.death)
            for block in seen(by_id[step_id].outside)
        )
        for blocks in every:
            if blocks != listed:
                wrong.append(f"{step_id}: walked {blocks}, planned {listed}")
    kept = tuple(block.size_bytes for block in plan.device.kept if not block.declared)
    for what, walked, planned in (
        ("arena", found.arena_bytes, plan.prediction.arena_bytes),
        ("kept", found.kept, kept),
    ):
        if walked != planned:
            wrong.append(f"{what}: walked {walked}, planned {planned}")
    # the walk cannot take the declared blocks, so neither side counts them here
    bare = card_bytes(
        plan.prediction.arena_bytes,
        plan.device.kept,
        [seen(step.outside) for step in plan.steps],
        scratch_bytes=scratch_bytes(plan),
        alloc_conf=plan.device.alloc_conf,
    )
    planned_reserved = plan.prediction.phases[0].reserved_peak_bytes
    if bare.reserved != found.reserved_bytes or planned_reserved < bare.reserved:
        wrong.append(
            f"reserved: walked {found.reserved_bytes}, planned {bare.reserved} and {planned_reserved} with what is declared"
        )
    allocated = max(bare.start_allocated, *bare.allocated)
    if allocated != found.allocated_peak_bytes:
        wrong.append(f"allocated: walked {found.allocated_peak_bytes}, planned {allocated}")
    listed_steps = [by_id[step_id] for step_id in found.steps]
    return Compared(
        steps=len(found.steps),
        blocks=sum(len(every[0]) for every in found.steps.values()),
        declared=sum(block.declared for step in listed_steps for block in step.outside),
        reserved_bytes=found.reserved_bytes,
        planned_reserved_bytes=planned_reserved,
        wrong=tuple(wrong),
    )
