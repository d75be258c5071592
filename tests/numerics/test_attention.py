"""attend, merge and check_kernel against attention written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from executor.attention import attend, attend_rows, check_kernel, merge
from planner.errors import KernelRefused


def written_out(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """(T, H, d) of q (T, H, d) over k, v (S, G, d), in float64 with scores; the last rows are aligned when causal."""
    shared = q.shape[1] // k.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
    scores = q @ k.transpose(1, 2) * q.shape[2] ** -0.5
    if causal:
        past = k.shape[1] - q.shape[1]
        scores += torch.full_like(scores[0], float("-inf")).triu(past + 1)
    return (scores.softmax(-1) @ v).transpose(0, 1)


def random(rows: int, heads: int, seed: int) -> Tensor:
    return torch.randn(rows, heads, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_heads_share_keys_as_in_attention_written_out(rows: int, groups: int) -> None:
    q, k, v = random(rows, 6, 0), random(70, groups, 1), random(70, groups, 2)
    out, lse = attend_rows(q, k, v, kernel="cpu_flash", scale=0.25)
    expected = written_out(q, k, v, causal=False)
    assert out.permute(2, 0, 1, 3).reshape(q.shape).sub(expected).abs().max() < 1e-5
    assert lse.shape == (groups, 6 // groups, rows)


@pytest.mark.parametrize("past", [1, 40, 600])
@pytest.mark.parametrize("room", [2 * 6 * 16, 1000, 10**5])
def test_past_and_diagonal_merged_equal_one_causal_attention(past: int, room: int) -> None:
    rows = 9
    q, k, v = random(rows, 6, 0), random(past + rows, 2, 1) * 4, random(past + rows, 2, 2)
    before = attend_rows(q, k[:past], v[:past], kernel="cpu_flash", scale=0.25)
    here = attend_rows(q, k[past:], v[past:], kernel="cpu_flash", scale=0.25, causal=True)
    out = torch.empty(rows, 2, 3, 16)
    merge(before, here, out=out, scratch=torch.empty(room))
    expected = written_out(q, k, v, causal=True)
    assert out.reshape(q.shape).sub(expected).abs().max() < 1e-5


def test_a_causal_call_over_more_keys_than_rows_is_refused() -> None:
    q, k = random(3, 2, 0).transpose(0, 1)[None], random(5, 2, 1).transpose(0, 1)[None]
    with pytest.raises(KernelRefused, match="as many queries as keys, found 3 and 5"):
        attend(q, k, k, kernel="cpu_flash", scale=1.0, causal=True)


def test_a_kernel_of_another_device_is_refused_before_the_run() -> None:
    shape = {"heads": 16, "kv_heads": 2, "head_dim": 128, "rows": 64, "keys": 64}
    check_kernel("cpu_flash", device="cpu", dtype=torch.bfloat16, **shape)
    with pytest.raises(KernelRefused, match="the CPU has only cpu_flash"):
        check_kernel("flash", device="cpu", dtype=torch.bfloat16, **shape)
    with pytest.raises(KernelRefused, match="it is the CPU's kernel"):
        check_kernel("cpu_flash", device="cuda", dtype=torch.bfloat16, **shape)
    with pytest.raises(KernelRefused, match=r"takes float32, bfloat16 and float16"):
        check_kernel("cpu_flash", device="cpu", dtype=torch.float64, **shape)
    with pytest.raises(KernelRefused, match="key heads that divide"):
        check_kernel("cpu_flash", device="cpu", dtype=torch.float32, **{**shape, "kv_heads": 3})
