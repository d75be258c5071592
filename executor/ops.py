"""The small arithmetic that every block shares: norm, linear, rotary embeddings. All of it writes into given views.

Scratch comes from the step's views, never from the allocator; rows beyond what a call needs are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from planner.plan.words import Kernel

Tile = TypeVar("Tile")

# 2^6 is the most that a value going into a float16 down_proj may be (`add_gated`)
GATED_EXPONENT = 6


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


def add_rows(x: Tensor, part: Tensor, *, scratch: Tensor) -> None:
    """x += part, both (R, D). Where `part` is narrower than x it is widened in scratch (n, D) float32, n rows at once."""
    if x.dtype == part.dtype:
        x.add_(part)
        return
    for rows, wide in _widened(part, scratch):
        x[rows].add_(wide)


def add_gated(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    out: Tensor,
    scratch: Tensor,
) -> None:
    """x += silu(gate) * up through down_proj. x, out (R, D); gate, up (R, F), used up; scratch (n, D) float32, D > 2.

    Where x is wider than the rest, that is in float16, neither the product nor what down_proj makes of it may leave
    float16's range, though both do in these models. A row whose factors are up to g and u has products up to g u. It is
    scaled by a power of two, half of it in each factor, so that its products are at most 2^6, and what comes out of
    down_proj is scaled back in float32. So no output overflows while the absolute values of a row of `weight` add up to
    less than 65504 / 2^6, and rows that are small anyway (g u <= 2^6) are not touched. Small values of a scaled row lose
    bits below 2^-20 of its bound g u.
    """
    torch.ops.aten.silu_(gate)
    if x.dtype == out.dtype:
        gate.mul_(up)
        x.add_(linear(gate, weight, bias, out=out))
        return
    step = scratch.shape[0]
    backs = []
    for start in range(0, gate.shape[0], step):
        backs.append(_scaled_product(gate[start : start + step], up[start : start + step], scratch))
    linear(gate, weight, None, out=out)
    for (rows, wide), back in zip(_widened(out, scratch), backs, strict=True):
        x[rows].add_(wide.mul_(back))
        if bias is not None:
            x[rows].add_(wide.copy_(bias))


def _scaled_product(gate: Tensor, up: Tensor, scratch: Tensor) -> Tensor:
    """gate *= up, each row with a power of two; what takes it back, (n, 1) float32, lies in the memory of `up`."""
    rows, flat = gate.shape[0], scratch.view(-1)
    factor, other = flat[:rows].view(-1, 1), flat[rows : 2 * rows].view(-1, 1)
    halves = flat[2 * rows : 3 * rows].view(gate.dtype)
    for values, half, wide in ((gate, halves[:rows], factor), (up, halves[rows:], other)):
        largest = half.view(-1, 1)
        torch.linalg.vector_norm(values, ord=torch.inf, dim=-1, keepdim=True, out=largest)
        wide.copy_(largest)
    factor.mul_(other).log2_().sub_(GATED_EXPONENT).div_(2).ceil_().clamp_(min=0).neg_().exp2_()
    narrow = halves[:rows].view(-1, 1)
    narrow.copy_(factor)
    gate.mul_(narrow)
    up.mul_(narrow)
    gate.mul_(up)
    back = up.view(-1)[: 2 * rows].view(torch.float32).view(-1, 1)
    back.copy_(narrow)  # not `factor`: exp2 may be off by a last bit, which float16 does not have
    return back.square_().reciprocal_()


def _widened(part: Tensor, scratch: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of `part`, as many at once as scratch has, each time as float32 in it."""
    for start in range(0, part.shape[0], scratch.shape[0]):
        rows = slice(start, min(start + scratch.shape[0], part.shape[0]))
        wide = scratch[: rows.stop - start]
        wide.copy_(part[rows])
        yield rows, wide


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
