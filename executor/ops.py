"""The small arithmetic that every block shares: norm, linear, rotary embeddings. All of it writes into given views.

Scratch comes from the step's views, never from the allocator; rows beyond what a call needs are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from planner.plan import Kernel

Tile = TypeVar("Tile")


def rms_norm(x: Tensor, weight: Tensor, out: Tensor, *, scratch: Tensor, eps: float) -> Tensor:
    """The leading rows of `out`: x over its root mean square, times weight.

    x (R, D), out (>= R, D), scratch (n, D) float32: n rows are upcast at once. In transformers' order of roundings:
    float32 arithmetic, cast, then times weight. The column of factors lies in rows of `out` that are written last.
    """
    rows, width = x.shape
    for start in range(0, rows, scratch.shape[0]):
        stop = min(start + scratch.shape[0], rows)
        wide, part = scratch[: stop - start], out[start:stop]
        factor = part.view(-1).view(torch.float32)[: stop - start].view(-1, 1)  # (n, 1)
        wide.copy_(x[start:stop])
        torch.linalg.vector_norm(wide, dim=-1, keepdim=True, out=factor)
        factor.square_().div_(width).add_(eps).rsqrt_()
        wide.mul_(factor)
        part.copy_(wide)
        part.mul_(weight)
    return out[:rows]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> Tensor:
    """`out` = x weight^T + bias, with x (R, in), weight (columns, in), out (R, columns).

    One row is a matrix-vector product: on the CPU it reads the weight 15 to 20 % faster than a GEMM of one row.
    """
    if x.shape[0] == 1:
        if bias is None:
            torch.mv(weight, x[0], out=out[0])
        else:
            torch.addmv(bias, weight, x[0], out=out[0])
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
    return out


def rotate_float32(x: Tensor, cos: Tensor, sin: Tensor, *, scratch: Tensor) -> None:
    """Rotate x (R, heads, d) in place in float32, as the vision tower does.

    cos and sin (R, d/2) float32; scratch (2, r, >= heads * d) float32: r rows are upcast at once. With x = (a, b) in
    halves of a head the result is (a cos - b sin, b cos + a sin).
    """
    heads, half = x.shape[1], x.shape[2] // 2
    for start in range(0, x.shape[0], scratch.shape[1]):
        stop = min(start + scratch.shape[1], x.shape[0])
        shape = (stop - start, heads, 2, half)
        count = (stop - start) * heads * 2 * half
        wide = scratch[0].view(-1)[:count].view(shape)
        turned = scratch[1].view(-1)[:count].view(shape)
        rows = x[start:stop]
        c, s = cos[start:stop, None], sin[start:stop, None]  # (r, 1, d/2)
        wide.view(rows.shape).copy_(rows)
        torch.mul(wide, c[:, None], out=turned)
        turned[:, :, 0].addcmul_(wide[:, :, 1], s, value=-1)
        turned[:, :, 1].addcmul_(wide[:, :, 0], s)
        rows.copy_(turned.view(rows.shape))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, scratch: Tensor) -> None:
    """Rotate x (R, heads, d) in place in its own dtype, as the language model does.

    cos and sin (R, d) of x's dtype; scratch (2, r, >= heads * d). Each product is rounded before the sum, as in
    transformers' `q * cos + rotate_half(q) * sin`.
    """
    heads, size = x.shape[1], x.shape[2]
    half = size // 2
    for start in range(0, x.shape[0], scratch.shape[1]):
        stop = min(start + scratch.shape[1], x.shape[0])
        shape = (stop - start, heads, size)
        count = (stop - start) * heads * size
        straight = scratch[0].view(-1)[:count].view(shape)
        crossed = scratch[1].view(-1)[:count].view(shape)
        rows = x[start:stop]
        c, s = cos[start:stop, None], sin[start:stop, None]  # (r, 1, d)
        torch.mul(rows, c, out=straight)
        torch.mul(rows[..., half:], s[..., :half], out=crossed[..., :half])
        torch.mul(rows[..., :half], s[..., half:], out=crossed[..., half:])
        torch.sub(straight[..., :half], crossed[..., :half], out=rows[..., :half])
        torch.add(straight[..., half:], crossed[..., half:], out=rows[..., half:])


def inverse_frequencies(theta: float, size: int, *, device: torch.device | str = "cpu") -> Tensor:
    """theta^(-2j/size) for j in 0..size/2, float32 (size/2,), with the roundings of transformers' own tables."""
    exponents = torch.arange(0, size, 2, dtype=torch.int64).to(torch.float32) / size
    return (1.0 / (theta**exponents)).to(device)


def first_of_each(tiles: Iterable[Tile], key: Callable[[Tile], Hashable]) -> list[Tile]:
    """The first tile of each distinct key, in order: what a priming run goes through."""
    seen: dict[Hashable, Tile] = {}
    for tile in tiles:
        seen.setdefault(key(tile), tile)
    return list(seen.values())


def priming_keys(keys: int, kernel: Kernel) -> int:
    """How many keys a priming run attends over: one whole block of 512 and the same rest as all of them.

    On a card all of them: which variant of a kernel is loaded depends on their number, and they take no time there.
    """
    if kernel != "cpu_flash" or keys <= 1024:
        return keys
    return 512 + (keys - 1) % 512 + 1
