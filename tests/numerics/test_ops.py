"""Norm, rotary embedding and linear in bfloat16 against transformers' own expressions."""

from __future__ import annotations

import pytest
import torch

from executor.ops import linear, priming_keys, rms_norm, rotate, rotate_float32


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_norm_rounds_before_the_weight_as_transformers_does() -> None:
    x, weight = random(37, 1280).bfloat16(), random(1280).bfloat16()
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
    out = torch.full((40, 1280), 7.0).bfloat16()
    rms_norm(x, weight, out, scratch=torch.empty(16, 1280), eps=1e-6)
    assert (out[:37] == expected).float().mean() > 0.9999
    assert (out[37:] == 7).all()


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def test_the_language_models_rotation_equals_transformers_bit_by_bit() -> None:
    x = random(37, 6, 32).bfloat16()
    angle = random(37, 16).repeat(1, 2)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    expected = x * cos[:, None] + rotate_half(x) * sin[:, None]
    rotate(x, cos, sin, scratch=torch.empty(2, 10, 6 * 32).bfloat16())
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vision_towers_rotation_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, angle = random(37, 6, 80).to(dtype), random(37, 40)
    cos, sin = angle.cos().repeat(1, 2)[:, None], angle.sin().repeat(1, 2)[:, None]
    expected = (x.float() * cos + rotate_half(x.float()) * sin).to(dtype)
    rotate_float32(x, angle.cos(), angle.sin(), scratch=torch.empty(2, 10, 6 * 80))
    if dtype == torch.float32:
        assert (x - expected).abs().max() < 1e-6
    else:
        assert (x == expected).float().mean() > 0.999


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("biased", [True, False])
def test_one_row_is_multiplied_as_many_are(rows: int, biased: bool) -> None:
    x, weight, bias = random(rows, 50), random(20, 50), random(20)
    out = linear(x, weight, bias if biased else None, out=torch.empty(rows, 20))
    assert (out - (x @ weight.t() + biased * bias)).abs().max() < 1e-5


def test_priming_sees_few_keys_with_the_same_rest() -> None:
    assert priming_keys(700, "cpu_flash") == 700
    assert priming_keys(42196, "cpu_flash") == 512 + 42196 % 512
    assert priming_keys(5120, "cpu_flash") == 1024
    # a card's kernel is another where keys are many
    assert priming_keys(42196, "flash") == 42196
