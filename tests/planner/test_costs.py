"""Seconds of steps and copies: equal to what a hand computes on a toy profile, and rising with rows and bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from planner.calls import CREDIT_S, Calls
from planner.checkpoint.spec import builtin
from planner.costs import Costs
from planner.errors import InputError
from planner.fronts import START
from planner.plan.shapes import ModelShape
from planner.plan.tiles import Tiles
from planner.plan.words import Kind
from planner.problem import Problem, Request
from planner.profile import DeviceProfile, dumps, load_profile
from planner.queues import Beside
from planner.rates import PASSES, TURNS, Grid, HeadDim, Kernels, Measured, seconds_at

KINDS: tuple[Kind, ...] = get_args(Kind)
MS = 1e-3


def kernels(**changes: Any) -> Kernels:
    """Products 1 ms for each 1000 rows x 1000 weights, attention 1 us a score, passes 1 ns an element."""
    head = HeadDim(
        head_dim=64,
        full=Grid(first=(1, 1000), second=(1, 1000), seconds=((1e-6, MS), (MS, 1.0))),
        causal=((1, 1e-6), (1000, 0.5)),
        window=((16, 1e-5), (64, 4e-5)),
        decode=((1, 1e-6), (1000, MS)),
        call_s=1e-12,
        **dict.fromkeys(TURNS, ((1, 1e-09), (1000, 1e-06))),
    )
    data: dict[str, Any] = {
        "product": Grid(first=(1, 1000), second=(1, 1000), seconds=((1e-9, 1e-6), (1e-6, MS))),
        "vector": Grid(first=(1,), second=(1, 1000), seconds=((1e-9, 1e-6),)),
        "attention": (head,),
        "passes": dict.fromkeys(PASSES, ((1, 1e-09), (1000, 1e-06))),
    }
    return Kernels(**{**data, **changes})


def measured(**changes: Any) -> Measured:
    data: dict[str, Any] = {
        "bits16": kernels(),
        "float32": kernels(),
        "pixel_values_per_s": 10**9,
        "sample": ((1, 1e-9), (1000, 1e-6)),
        "step_s": dict.fromkeys(KINDS, (0.0, 0.0)),
        "copy_s": 1e-12,
        "first_touch_bytes_per_s": 0,
        "beside": (0.5, 0.8),
        "create_s": 1e-12,
        "image_pixels_per_s": 10**9,
    }
    return Measured(**{**data, **changes})


@pytest.fixture
def model() -> ModelShape:
    return builtin("3b").shape


def toy(**changes: Any) -> DeviceProfile:
    update = {
        "measured": measured(**changes),
        "page_cache_bytes_per_s": 10**9,
        "host_to_device_bytes_per_s": 10**9,
        "disk_bytes_per_s": 10**8,
    }
    return load_profile("cpu").model_copy(update=update)


def test_seconds_between_points_follow_a_power_and_beyond_the_last_grow_in_proportion() -> None:
    points = ((10, 1.0), (1000, 100.0))
    found = [seconds_at(points, size) for size in (1, 10, 100, 1000, 4000)]
    assert found == pytest.approx([1, 1, 10, 100, 400])


def test_a_grid_is_read_in_both_directions() -> None:
    grid = Grid(first=(1, 100), second=(10, 1000), seconds=((1.0, 100.0), (10.0, 1000.0)))
    assert grid.at(10, 100) == pytest.approx(10**0.5 * 10)
    assert grid.at(100, 1000) == pytest.approx(1000)
    assert grid.at(200, 3000) == pytest.approx(6000)
    assert grid.at(1, 1) == pytest.approx(1)


@pytest.mark.parametrize(
    "change",
    [
        {"first": (4, 2)},
        {"seconds": ((1.0, 2.0),)},
        {"seconds": ((1.0, 2.0), (0.0, 1.0))},
        {"second": ()},
    ],
)
def test_a_grid_that_is_not_one_is_refused(change: dict[str, Any]) -> None:
    data: dict[str, Any] = {"first": (1, 2), "second": (1, 2), "seconds": ((1.0, 2.0), (3.0, 4.0))}
    with pytest.raises(ValidationError):
        Grid(**{**data, **change})


def test_tables_name_every_call_and_no_other() -> None:
    whole = dict(kernels().passes)
    with pytest.raises(ValidationError, match="missing \\['norm'\\]"):
        kernels(passes={name: value for name, value in whole.items() if name != "norm"})
    with pytest.raises(ValidationError, match="unknown \\['other'\\]"):
        kernels(passes=whole | {"other": whole["norm"]})


def test_a_text_mlp_is_its_calls_added_up(model: ModelShape) -> None:
    width, inner = model.text.hidden, model.text.intermediate
    costs = Costs(model, toy())
    rows, tile = 600, 256
    # products 1 ns for a row and a weight, passes 1 ns an element: norm, two up, gate, down, add
    by_hand = rows * (3 * width * inner * 1e-9 + (2 * width + inner) * 1e-9)
    assert costs.text("text_mlp", tile, rows, 0) == pytest.approx(by_hand, rel=1e-6)


def test_a_full_attention_block_is_its_calls_added_up(model: ModelShape) -> None:
    shape = model.vision
    width, heads, size = shape.hidden, shape.heads, shape.head_dim
    image = builtin_image(model)
    rows = image.patches
    tiles = START.model_copy(update={"query_rows": 256, "query_heads": 4})
    products = rows * (2 + 2) * width * width * 1e-9
    biases = rows * 4 * width * 1e-9
    norms = ropes = 2 * rows * width * 1e-9
    angles = 2 * rows * size // 2 * 1e-9
    # one measured head size: longer heads in proportion
    scores = heads * rows * rows * 1e-6 * size / 64
    copies = adds = rows * width * 1e-9
    by_hand = products + biases + norms + ropes + angles + scores + copies + adds
    assert Costs(model, toy()).vision("full_attn", tiles, [image]) == pytest.approx(
        by_hand, rel=1e-6
    )


def builtin_image(model: ModelShape) -> Any:
    from planner.workload import parse_image

    checkpoint = builtin("3b")
    return parse_image(
        "448x448", min_pixels=checkpoint.min_pixels, max_pixels=checkpoint.max_pixels
    )


def test_a_step_costs_something_beyond_its_kernels_once(model: ModelShape) -> None:
    steps = dict.fromkeys(KINDS, (0.0, 0.0)) | {"text_mlp": (0.0, 1.0)}
    plain, more = Costs(model, toy()), Costs(model, toy(step_s=steps))
    difference = more.text("text_mlp", 256, 600, 0) - plain.text("text_mlp", 256, 600, 0)
    assert difference == pytest.approx(1.0)
    assert more.text("self_attn", 256, 600, 0) == plain.text("self_attn", 256, 600, 0)


def test_a_small_model_s_code_stays_in_the_caches(model: ModelShape) -> None:
    found = measured(step_s=dict.fromkeys(KINDS, (1.0, 2.0)))
    assert Calls(found, model, 2**20).small("embed_tokens", 1) == 1.0
    assert Calls(found, model, 2**30).small("embed_tokens", 1) == 2.0


def test_new_pages_of_scratch_are_paid_once_a_phase(model: ModelShape) -> None:
    from planner.buffers import text_scratch

    plain = Costs(model, toy())
    clearing = Costs(model, toy(first_touch_bytes_per_s=10**9))
    steps = [costs.text("text_mlp", 256, 600, 0) for costs in (clearing, plain)]
    size = text_scratch("text_mlp", model, 256, 600).size_bytes
    assert model.text.layers * (steps[0] - steps[1]) == pytest.approx(size / 1e9, rel=1e-3)


def test_a_copy_is_bytes_at_the_rate_of_where_they_lie(model: ModelShape) -> None:
    costs = Costs(model, toy(first_touch_bytes_per_s=5 * 10**8))
    assert costs.warm
    assert costs.copy(10**9, first=True, cached=False) == pytest.approx(1.0)
    assert costs.copy(10**9, first=True, cached=False, fresh=True) == pytest.approx(3.0)
    costs.warm = False
    assert costs.copy(10**9, first=True, cached=True) == pytest.approx(10.0)
    assert costs.copy(10**9, first=False, cached=True) == pytest.approx(1.0)


def test_files_count_as_cached_only_where_they_fit_beside_the_arena(model: ModelShape) -> None:
    roomy, tight = (
        toy().model_copy(update={"usable_bytes": size, "memory_total_bytes": size})
        for size in (20 * 10**9, 10 * 10**9)
    )
    assert Costs(model, roomy).warm
    assert not Costs(model, tight).warm
    assert not Costs(model, load_profile("rtx-5080-16gb")).warm


def test_queues_share_the_cores_of_a_cpu_and_nothing_of_a_card(model: ModelShape) -> None:
    assert Costs(model, toy(beside=(0.25, 0.75))).beside == Beside(0.25, 0.75)
    rested = Costs(
        model, toy(beside=(0.5, 0.75), favoured=-0.25, step_s=dict.fromkeys(KINDS, (0.0, 0.002)))
    ).beside
    assert rested == Beside(0.5, 0.75, -0.25, CREDIT_S, 0.002)
    # a figure that says nothing about rests changes nothing
    assert Costs(model, toy(beside=(0.5, 0.75), favoured=0.5)).beside == Beside(0.5, 0.75)
    unmeasured = toy().model_copy(update={"measured": None, "threads": 4})
    assert Costs(model, unmeasured).beside == Beside(0.75)
    assert Costs(model, load_profile("rtx-5080-16gb")).beside == Beside()


def every_kind(costs: Costs, rows_of: Callable[[int], Any]) -> dict[str, Callable[[int], float]]:
    tiles = Tiles(**{**START.model_dump(), "query_heads": 16})
    vision = ("patch_embed", "window_attn", "full_attn", "vision_mlp", "merger")
    found: dict[str, Callable[[int], float]] = {
        kind: lambda n, kind=kind: costs.vision(kind, tiles, [rows_of(n)])  # type: ignore[misc]
        for kind in vision
    }
    found["self_attn"] = lambda n: costs.text("self_attn", 256, 64 * n, 64 * n)
    found["text_mlp"] = lambda n: costs.text("text_mlp", 256, 64 * n, 0)
    found["decode"] = lambda n: costs.text("self_attn", 1, 1, 64 * n)
    return found


@pytest.mark.parametrize("device", ["cpu", "rtx-5080-16gb"])
@given(st.integers(1, 12))
def test_more_rows_take_longer(device: str, count: int) -> None:
    from planner.workload import parse_image

    checkpoint = builtin("3b")
    bounds = {"min_pixels": checkpoint.min_pixels, "max_pixels": checkpoint.max_pixels}

    def image(windows: int) -> Any:
        return parse_image(f"{112 * 4}x{112 * windows}", **bounds)

    costs = Costs(checkpoint.shape, load_profile(device))
    for kind, seconds in every_kind(costs, image).items():
        assert seconds(count + 1) > 0.97 * seconds(count), kind
        assert seconds(2 * count) > 1.0 * seconds(count), kind


def test_a_profile_with_tables_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(dumps(toy()))
    assert load_profile(str(path)) == toy()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("step_s",), {}, "step_s: wanted patch_embed"),
        (("step_s", "norm"), [0.0, -1.0], "measured.step_s.norm"),
        (("bits16", "product", "first"), [4, 2], "measured.bits16.product: .*ascending sizes"),
        (("bits16", "product", "seconds"), [[1.0, 2.0]], "wanted 2 rows of 2 seconds"),
        (("float32", "passes"), {}, "measured.float32: .*passes: wanted norm"),
        (("float32", "passes", "norm"), [[5, 1.0], [3, 1.0]], "ascending sizes"),
        (("bits16", "attention"), [], "measured.bits16.attention"),
        (("other",), 1, "measured.other"),
    ],
)
def test_a_wrong_table_is_refused_by_name(
    place: tuple[str, ...], value: object, message: str, tmp_path: Path
) -> None:
    data = json.loads(dumps(toy()))
    inner = data["measured"]
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=message):
        load_profile(str(path))


def test_one_row_beyond_the_largest_measured_distance_takes_as_long_as_there(
    model: ModelShape,
) -> None:
    vector = Grid(first=(100, 1000), second=(1, 1000), seconds=((1e-9, 1e-6), (2e-9, 2e-6)))
    known = measured(bits16=kernels(vector=vector))
    seconds = [
        Calls(known, model, distance).product(1, 1000, 1000, False) for distance in (1000, 10**9)
    ]
    assert seconds[0] == seconds[1] == pytest.approx(2e-3)


def test_before_the_first_step_code_is_made_and_blank_weights_are_read(kit: Any) -> None:
    request = Request(kit.checkpoint("3b"), kit.workload(((448, 448),), new=16), None)
    problem = Problem(request, toy())
    products = sum(rows > 1 for rows, _, _ in problem.gemm_shapes(START, together=True))

    def more(**changes: Any) -> float:
        return Problem(request, toy(**changes)).start_s(START) - problem.start_s(START)

    assert more(create_s=0.001) == pytest.approx(products * 0.001, rel=1e-6)
    # as much code as a wide product's is made several times over
    once, twice = (more(create_wide_s=seconds) for seconds in (0.01, 0.02))
    assert 0.01 < once == pytest.approx(twice / 2, rel=1e-6)
    # the language model's largest unit is read in prefill and in decode, beside smaller ones
    largest = max(problem.unit_sizes(START.vocabulary_rows).values())
    assert more(first_touch_bytes_per_s=10**9) > 0.7 * 2 * largest / 10**9


def test_attention_in_calls_of_few_heads_costs_what_such_calls_were_seen_to_cost() -> None:
    grid = Grid(first=(1, 1000), second=(1, 1000), seconds=((1e-9, 1e-6), (1e-6, MS)))
    twice = Grid(first=(1, 1000), second=(1, 1000), seconds=((3e-9, 3e-6), (3e-6, 3 * MS)))
    plain = kernels().attention[0].model_copy(update={"full": grid, "call_s": 1e-5})
    table = plain.model_copy(update={"heads": 5, "alone": twice})
    # two milliseconds more for one head, none for as many as the table has
    assert table.beyond(1, 1000, 1000) == pytest.approx(2 * MS)
    assert table.beyond(3, 1000, 1000) == pytest.approx(MS)
    assert table.beyond(5, 1000, 1000) == table.beyond(9, 1000, 1000) == 1e-5
    # where one head alone was not measured, or was no slower: the smallest call
    assert plain.beyond(1, 1000, 1000) == 1e-5
    assert table.model_copy(update={"alone": grid}).beyond(1, 1000, 1000) == 1e-5


def test_tiles_of_few_heads_are_slower_by_their_calls(model: ModelShape) -> None:
    """Four calls of four heads instead of one of sixteen, each 2 ms x 12 / 15 more; the one of sixteen has no more."""
    grid = Grid(first=(256,), second=(1024,), seconds=((MS,),))
    head = (
        kernels()
        .attention[0]
        .model_copy(
            update={
                "full": grid,
                "heads": 16,
                "alone": grid.model_copy(update={"seconds": ((3 * MS,),)}),
            }
        )
    )
    calls = Calls(measured(bits16=kernels(attention=(head,))), model, 10**9)
    assert calls._divided(64, 16, 16, 256, 1024) == 0.0
    assert calls._divided(64, 16, 4, 256, 1024) == pytest.approx(4 * 2 * MS * 12 / 15)
