"""Exact attention by the one fused kernel that the plan names; never the dispatching function, never scores.

A silent fall-back to unfused attention would build n x n scores and cost gigabytes, so the aten operator is called by
name, and `check_kernel` asks beforehand whether it takes the plan's shapes.
Source: Dao 2023, arXiv:2307.08691; tiling query rows alone needs no rescaling, tiling keys needs `merge`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from planner.errors import KernelRefused
from planner.plan.words import Kernel

Attended = tuple[Tensor, Tensor]


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, kernel: Kernel, scale: float, causal: bool = False
) -> Attended:
    """Output (B, H, T, d) and float32 log-sum-exp (B, H, T) of q (B, H, T, d) over k and v (B, G, S, d), G dividing H.

    Strided views are taken as they are. `causal` needs T == S: with other lengths the CPU aligns the triangle top
    left and CUDA bottom right. `efficient` takes several query heads per key head only as views of stride 0, so there
    with G < H the caller passes the groups as a batch (`attend_rows` does).
    Workspace: the output, one float32 per head and row, and what planner.workspace lists; never scores.
    """
    if causal and q.shape[2] != k.shape[2]:
        raise KernelRefused(
            f"causal attention: wanted as many queries as keys, found {q.shape[2]} and {k.shape[2]}"
        )
    if kernel == "cpu_flash":
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=causal, scale=scale
        )
        return out, logsumexp
    if kernel == "flash":
        found = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, is_causal=causal, scale=scale
        )
        return found[0], found[1]
    found = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, is_causal=causal, scale=scale
    )
    # its log-sum-exp is padded to a multiple of 32 rows
    return found[0], found[1][..., : q.shape[2]]


def attend_rows(
    q: Tensor, k: Tensor, v: Tensor, *, kernel: Kernel, scale: float, causal: bool = False
) -> Attended:
    """Output (G, H/G, T, d) and log-sum-exp (G, H/G, T) of q (T, H, d) over k and v (S, G, d), rows first as stored.

    One row without a mask folds the query heads of a key head into rows, so K and V are read once per key head.
    """
    rows, heads, size = q.shape
    keys, groups, _ = k.shape
    shared = heads // groups
    if rows == 1:
        out, logsumexp = attend(
            q.view(1, groups, shared, size), _heads(k), _heads(v), kernel=kernel, scale=scale
        )
        return out.view(groups, shared, 1, size), logsumexp.view(groups, shared, 1)
    if kernel == "efficient" and shared > 1:
        grouped = q.view(rows, groups, shared, size).permute(1, 2, 0, 3)
        wide_k = k.permute(1, 0, 2)[:, None].expand(groups, shared, keys, size)
        wide_v = v.permute(1, 0, 2)[:, None].expand(groups, shared, keys, size)
        return attend(grouped, wide_k, wide_v, kernel=kernel, scale=scale, causal=causal)
    out, logsumexp = attend(
        _heads(q), _heads(k), _heads(v), kernel=kernel, scale=scale, causal=causal
    )
    return out.view(groups, shared, rows, size), logsumexp.view(groups, shared, rows)


def _heads(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]  # (1, heads, rows, d)


def merge(first: Attended, second: Attended, *, out: Tensor, scratch: Tensor) -> None:
    """Write into out (T, G, H/G, d) the attention over two sets of keys, from the attention over each, in float32.

    first and second as `attend_rows` gives them; the second's log-sum-exp is used up. scratch: any contiguous
    float32 tensor with room for two rows; it decides how many rows are merged at once.
    With log-sum-exps l1 and l2 the second's share is sigmoid(l2 - l1), its sum of exponentials over that of both.
    """
    (out1, lse1), (out2, lse2) = first, second
    groups, shared, rows, size = out1.shape
    flat = scratch.view(-1)
    width = groups * shared * size
    step = max(1, flat.numel() // (2 * width))
    share = lse2.sub_(lse1).sigmoid_().permute(2, 0, 1)[..., None]  # (T, G, H/G, 1)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        shape = (stop - start, groups, shared, size)
        count = (stop - start) * width
        left, right = flat[:count].view(shape), flat[count : 2 * count].view(shape)
        left.copy_(out1[:, :, start:stop].permute(2, 0, 1, 3))
        right.copy_(out2[:, :, start:stop].permute(2, 0, 1, 3))
        left.lerp_(right, share[start:stop])
        out[start:stop].copy_(left)


def check_kernel(
    kernel: Kernel,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rows: int,
    keys: int,
    causal: bool = False,
) -> None:
    """Nothing, if the device runs `kernel` for these shapes; KernelRefused, with the kernel to ask for, if not."""
    where = torch.device(device)
    what = f"{kernel} attention, {dtype}, {heads} heads of {head_dim} over {kv_heads}"
    if heads % kv_heads:
        raise KernelRefused(f"{what}: wanted key heads that divide the query heads")
    if where.type == "cpu":
        if kernel != "cpu_flash":
            raise KernelRefused(
                f"{what}: the CPU has only cpu_flash; make the plan anew with --device cpu"
            )
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise KernelRefused(
                f"{what}: the CPU's kernel takes float32, bfloat16 and float16 alone"
            )
        if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
            raise KernelRefused(
                f"{what}: torch {torch.__version__} lacks it; install torch 2.6 or newer"
            )
        return
    if kernel == "cpu_flash":
        raise KernelRefused(
            f"{what}: it is the CPU's kernel; make the plan anew with --device cuda"
        )
    _check_cuda(kernel, what, where, dtype, heads, kv_heads, head_dim, rows, keys, causal)


def _check_cuda(
    kernel: Kernel,
    what: str,
    where: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rows: int,
    keys: int,
    causal: bool,
) -> None:
    from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

    if not torch.cuda.is_available():
        raise KernelRefused(f"{what}: this torch sees no CUDA device; execute with --device cpu")
    # Shapes alone are asked about: expanded views of one head of one row cost nothing, and its values lie together,
    # as every fused kernel wants them (sdp_utils_cpp.h, check_last_dim_stride_equals_1_dense)
    row = torch.empty(head_dim, dtype=dtype, device=where)
    q = row.expand(1, heads, rows, head_dim)
    grouped = kernel == "flash" and kv_heads != heads
    kv = row.expand(1, kv_heads if grouped else heads, keys, head_dim)
    params = SDPAParams(q, kv, kv, None, 0.0, causal, grouped)
    ask = can_use_flash_attention if kernel == "flash" else can_use_efficient_attention
    if not ask(params, debug=False):
        other = "efficient" if kernel == "flash" else "flash"
        raise KernelRefused(
            f"{what}, {rows} rows over {keys} keys: refused by {torch.cuda.get_device_name(where)}; "
            f"make the plan anew for this device (kernel {other})"
        )
