"""Units: every needed tensor exactly once, aligned, whatever the row tile of lm_head."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import pytest

from planner.checkpoint.spec import BUILTIN, builtin, unit_sizes, units
from planner.checkpoint.template import EMBEDDING, lm_head_name, template
from planner.plan.shapes import ModelShape, Unit
from planner.plan.words import DTYPE_BYTES


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("rows", [1000, 16384, 10**6])
def test_every_needed_tensor_is_in_the_units_exactly_once(name: str, rows: int) -> None:
    shape = builtin(name).shape
    covered: dict[str, list[tuple[int, int]]] = {}
    for unit in units(shape, rows):
        for tensor in unit.tensors:
            covered.setdefault(tensor.name, []).append((tensor.row_start, tensor.row_stop))
    wanted = template(shape.vision, shape.text)
    if not shape.text.tied:
        del wanted[EMBEDDING]  # its rows are read from the file
    assert set(covered) == set(wanted)
    for tensor_name, ranges in covered.items():
        assert ranges[0][0] == 0
        assert ranges[-1][1] == wanted[tensor_name][0]
        assert all(a[1] == b[0] for a, b in pairwise(ranges))
        if tensor_name != lm_head_name(shape.text):
            assert len(ranges) == 1


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("rows", [1000, 16384])
def test_sizes_without_objects_equal_those_of_the_objects(name: str, rows: int) -> None:
    shape = builtin(name).shape
    assert list(unit_sizes(shape, rows).items()) == [
        (unit.id, unit.size_bytes) for unit in units(shape, rows)
    ]


def odd(shape: ModelShape) -> ModelShape:
    """A model whose tensors are no multiple of 64 bytes."""
    vision = shape.vision.model_copy(update={"intermediate": 3421, "depth": 2})
    text = shape.text.model_copy(update={"vocabulary": 1001, "layers": 2, "intermediate": 77})
    return shape.model_copy(update={"vision": vision, "text": text, "dtype": "float32"})


def test_tensors_are_aligned_and_do_not_overlap() -> None:
    shape = odd(builtin("3b").shape)
    for unit in units(shape, 300):
        end = 0
        for tensor in unit.tensors:
            assert tensor.offset_bytes % 64 == 0
            assert end <= tensor.offset_bytes < end + 64
            assert tensor.size_bytes == math.prod(tensor.shape) * DTYPE_BYTES[shape.dtype]
            assert tensor.shape[0] == tensor.row_stop - tensor.row_start
            end = tensor.offset_bytes + tensor.size_bytes
        assert unit.size_bytes % 512 == 0
        assert end <= unit.size_bytes < end + 512 + 64


def test_units_pass_the_plan_s_own_validation() -> None:
    for unit in units(odd(builtin("7b").shape), 300):
        assert Unit.model_validate_json(unit.model_dump_json()) == unit


def test_a_tied_model_s_lm_head_is_made_of_embedding_rows() -> None:
    last = units(builtin("3b").shape, 50000)[-1]
    assert last.id == "text/lm_head[3]"
    (tensor,) = last.tensors
    assert (tensor.name, tensor.local) == (EMBEDDING, "weight")
    assert (tensor.row_start, tensor.row_stop) == (150000, 151936)
    assert units(builtin("7b").shape, 50000)[-1].tensors[0].name == "lm_head.weight"


def test_units_come_in_the_order_of_a_run() -> None:
    ids = [unit.id for unit in units(builtin("3b").shape, 200000)]
    assert ids[:3] == ["visual/patch_embed", "visual/blocks.0.attn", "visual/blocks.0.mlp"]
    assert ids[65:68] == ["visual/merger", "text/layers.0.self_attn", "text/layers.0.mlp"]
    assert ids[-2:] == ["text/norm", "text/lm_head[0]"]


def test_another_row_tile_costs_the_search_next_to_nothing() -> None:
    shape = builtin("72b").shape
    units(shape, 16384)
    best = min(_seconds(shape, rows) for rows in (1024, 2048, 4096))
    assert best < 0.02  # about 1 ms where measured


def _seconds(shape: ModelShape, rows: int) -> float:
    start = time.perf_counter()
    units(shape, rows)
    unit_sizes(shape, rows)
    return time.perf_counter() - start
