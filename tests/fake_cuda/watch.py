"""Every storage that comes into being on `cuda:0`, told to the card; a dispatch mode below autograd.

FakeTensorMode runs every operation on shapes alone. The libraries' workspaces are taken where real ones are (inside the
first product), and what a kernel would copy unseen is complained of.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from tests.fake_cuda.card import FakeCard

LT_WORKSPACE_BYTES = 2**20
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv")
OWN_KERNELS = (
    "aten::_fused_rms_norm",
    "aten::mish_backward",
)  # composite, yet a kernel of their own on CUDA


def cublas_workspace_bytes(capability: str) -> int:
    """aten/src/ATen/cuda/CublasHandlePool.cpp: 32 MiB on compute capability 9.0, else 2 x 4 MiB + 8 x 16 KiB."""
    return 32 * 2**20 if capability == "9.0" else (2 * 4096 + 8 * 16) * 1024


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
