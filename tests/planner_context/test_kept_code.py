"""What the CPU's library keeps for products and attention, against single measurements on 2 cores with AMX."""

from __future__ import annotations

import subprocess
import sys

import pytest

from planner.checkpoint.spec import resolve_model
from planner.kept_code import (
    FEW_OUTPUTS,
    ONE_ROW,
    attention_kept_bytes,
    biases,
    float32_bytes,
    kept_bytes,
)
from planner.units import KIB


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "bias", "kib"),
    [
        (1024, 1280, 3840, True, 1344),
        (1056, 1280, 3840, True, 968),  # no rest of rows within the library's blocks
        (1057, 1280, 3840, True, 1380),
        (1024, 2048, 2048, True, 1268),
        (1025, 2048, 2048, True, 1596),
        (1055, 2048, 2048, True, 2016),
        (1051, 2048, 2048, True, 2160),  # a rest of 27 rows
        (300, 2048, 2048, True, 3108),
        (300, 2048, 2048, False, 2376),
        (1024, 3420, 1280, True, 2196),
        (1043, 3420, 1280, True, 3552),
        (2048, 11008, 2048, False, 1740),
        (32, 5120, 5120, True, 620),
        (8, 1280, 1280, True, 592),
    ],
)
def test_kept_code_is_within_260_kib_of_the_measured_one(
    rows: int, inputs: int, outputs: int, bias: bool, kib: int
) -> None:
    assert abs(kept_bytes(rows, inputs, outputs, bias=bias) - kib * KIB) <= 260 * KIB


def test_rows_beyond_the_measured_ones_keep_what_the_last_do() -> None:
    assert kept_bytes(16384, 1280, 1280, bias=True) == kept_bytes(4096, 1280, 1280, bias=True)


def test_a_rest_of_rows_never_keeps_less_than_whole_blocks() -> None:
    for inputs, outputs in ((1280, 1280), (2048, 2048), (3420, 1280)):
        for rows in range(672, 4096, 32):
            whole = kept_bytes(rows, inputs, outputs, bias=True)
            assert all(
                kept_bytes(rows + t, inputs, outputs, bias=True) >= whole for t in (1, 16, 17, 31)
            )


def test_widths_that_were_not_measured_take_the_nearest_ones() -> None:
    # 32B's vision MLP is 3456 wide, no ragged one
    for rows in (64, 512, 1024, 1043):
        assert kept_bytes(rows, 1280, 3456, bias=True) == kept_bytes(rows, 1280, 3840, bias=True)
        ragged = kept_bytes(rows, 1280, 3400, bias=True)
        assert ragged == kept_bytes(rows, 1280, 3420, bias=True)
    assert kept_bytes(1000, 64, 192, bias=True) == FEW_OUTPUTS


def test_without_amx_rows_do_not_matter() -> None:
    sizes = {kept_bytes(rows, 2048, 2048, bias=True, amx=False) for rows in (2, 300, 1024)}
    assert len(sizes) == 1
    assert kept_bytes(300, 1280, 3420, bias=True, amx=False) > sizes.pop()


def test_one_row_keeps_descriptors_alone() -> None:
    assert (
        kept_bytes(1, 2048, 151936, bias=False) == ONE_ROW < kept_bytes(64, 2048, 2048, bias=True)
    )


@pytest.mark.parametrize(
    ("rows", "keys", "kib"),
    [(4096, 4096, 504), (3996, 3996, 2116), (1033, 1033, 844), (290, 290, 376), (64, 64, 16)],
)
def test_kept_attention_is_within_350_kib_of_the_measured_one(
    rows: int, keys: int, kib: int
) -> None:
    assert abs(attention_kept_bytes(rows, keys, first=True) - kib * KIB) <= 350 * KIB


def test_float32_keeps_packing_buffers_and_few_rows_none() -> None:
    model = resolve_model("3b").shape
    assert float32_bytes(model, 64, 0) == 0
    # measured: 16968 and 19068 KiB for the largest product alone
    for rows, kib in ((290, 16968), (1024, 19068)):
        assert abs(float32_bytes(model, rows, 0) - 2 * kib * KIB) < 4000 * KIB
    assert float32_bytes(model, 64, 1024) == 2 * 4 * 384 * (5120 + 755)


def test_a_square_product_of_the_language_model_is_kept_with_and_without_bias() -> None:
    model = resolve_model("3b").shape
    assert biases(model, 2048, 2048) == (True, False)  # q_proj and o_proj
    assert biases(model, 2048, 256) == (True,)
    assert biases(model, 2048, 11008) == biases(model, 11008, 2048) == (False,)
    assert biases(model, 1176, 1280) == (False,)
    assert biases(model, 3420, 1280) == biases(model, 5120, 2048) == (True,)
    assert biases(model, 2048, 151936) == (False,)  # lm_head


def test_the_formula_needs_no_torch() -> None:
    code = "import sys, planner.kept_code; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
