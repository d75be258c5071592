from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from planner.certificate import least_plan
from planner.check import check
from planner.errors import BudgetTooSmall
from planner.evaluate import evaluate
from planner.plan import Plan
from planner.plan.shapes import Workload
from planner.problem import Problem, Request
from planner.profile import load_profile
from planner.schedule import PhaseResidency
from planner.search import build, fastest, search
from planner.space import Space
from planner.units import GIB, MIB, parse_bytes

PHOTO = ((3840, 2160),)
CARD_8GB = "rtx-4060-8gb"


def sound(plan: Plan, budget: int | None) -> None:
    """The plan holds by the checker's own reading, and keeps its budget."""
    assert check(plan) == []
    prediction = plan.prediction
    assert budget is None or prediction.bound_peak_bytes <= budget
    assert prediction.expected_peak_bytes <= prediction.bound_peak_bytes
    assert prediction.live_peak_bytes <= prediction.arena_bytes
    assert sum(t.expected_bytes for t in prediction.terms) == prediction.expected_peak_bytes or (
        prediction.peak_step == "load"
    )
    assert sum(phase.seconds for phase in prediction.phases) == pytest.approx(prediction.seconds)
    assert prediction.seconds_lower_bound <= prediction.seconds * (1 + 1e-9)
    assert prediction.smallest_budget_bytes <= prediction.bound_peak_bytes


GRID = [
    ("tiny", None, "cpu", ((336, 252),)),
    ("tiny", "300MB", "cpu", ((336, 252), (100, 900))),
    ("tiny", "8GB", CARD_8GB, ((336, 252), (336, 252), (56, 56))),
    ("3b", "1.2GiB", "cpu", ((1280, 960),)),
    ("3b", "4GB", "cpu", ((1280, 960), (800, 600))),
    ("3b", None, "cpu", ()),
    ("3b", "2.2GiB", CARD_8GB, PHOTO * 3),
    ("3b", "7GB", CARD_8GB, PHOTO * 2),
    ("3b", "16GB", "rtx-5080-16gb", PHOTO * 3),
    ("7b", "2GB", "rtx-5080-16gb", PHOTO),
    ("7b", "6GB", CARD_8GB, PHOTO),
    ("7b", "16GB", "rtx-5080-16gb", PHOTO),
    ("7b", None, "rtx-5080-16gb", PHOTO),
    ("7b", "8GB", CARD_8GB, ()),
    ("7b", "10GB", "cpu", ((640, 480),) * 3),
    ("72b", "6GB", CARD_8GB, PHOTO),
    ("72b", "16GB", "rtx-5080-16gb", PHOTO * 2),
]


@pytest.mark.parametrize(("model", "vram", "device", "images"), GRID)
def test_every_plan_is_sound_and_within_its_budget(
    kit: Any, model: str, vram: str | None, device: str, images: tuple[tuple[int, int], ...]
) -> None:
    budget = parse_bytes(vram) if vram else None
    sound(kit.plan(model, budget, device, kit.workload(images, new=32, prompt=64)), budget)


@pytest.mark.parametrize("new", [1, 2, 3])
def test_short_answers_have_sound_plans(kit: Any, new: int) -> None:
    plan = kit.plan("tiny", None, workload=kit.workload(new=new))
    sound(plan, None)
    assert plan.decode_repeats == new - 1
    assert ("decode" in {step.phase for step in plan.steps}) == (new > 1)


@pytest.mark.parametrize("model", ["tiny", "7b"])
def test_the_same_request_gives_the_same_plan_byte_for_byte(kit: Any, model: str) -> None:
    first, second = (
        kit.plan(model, 6 * GIB, CARD_8GB, kit.workload(PHOTO), command="plan") for _ in range(2)
    )
    assert first.dumps() == second.dumps()


@pytest.mark.parametrize(
    ("model", "device", "images", "gib"),
    [
        ("7b", "rtx-5080-16gb", PHOTO, (2, 3, 4.5, 6, 8, 10, 12, 13, 14, 14.5, 15, 16)),
        ("3b", CARD_8GB, PHOTO * 2, (2.2, 3, 4, 5, 6, 6.5, 7)),
        ("3b", "cpu", ((1280, 960),), (1.2, 2, 4, 6, 7, 8)),
        ("3b", "cpu", ((1280, 720),), (3.7, 4.2, 4.7, 5.6)),
        ("3b", "cpu", PHOTO * 2, (1.316, 1.32, 1.332)),
    ],
)
def test_more_budget_is_never_slower(
    kit: Any, model: str, device: str, images: Any, gib: tuple[float, ...]
) -> None:
    """By more than 0.1 %: only the most promising candidates are worked out."""
    workload = kit.workload(images, new=32, prompt=64)
    best = float("inf")
    for size in gib:
        seconds = kit.plan(model, int(size * GIB), device, workload).prediction.seconds
        assert seconds <= best * 1.001, size
        best = min(best, seconds)


def test_a_long_prompt_beside_a_link_is_never_slower_with_more_budget(kit: Any) -> None:
    """With one slot nothing is copied while its unit computes; the bounds know it, or the search ends among settings that only look fast."""
    workload = kit.workload([(28, 28)], new=2, prompt=30000)
    best = float("inf")
    for budget in ("2323874040B", "2.5GB", "3GB", "4GB", "6GB"):
        plan = kit.plan(
            "3b", parse_bytes(budget), "rtx-6000-ada-48gb", workload, ram_bytes=10**9, command=""
        )
        assert plan.prediction.seconds <= best, budget
        best = plan.prediction.seconds


@pytest.mark.parametrize(
    ("images", "new", "most"), [(((28, 28),), 1, 1.01), (((28, 28),), 2, 1.05), ((), 2, 1.05)]
)
def test_residents_that_cost_more_to_clear_than_they_save_are_no_must(
    kit: Any, images: Any, new: int, most: float
) -> None:
    """Few tokens on the CPU: new pages take longer than reading again. What so few tokens at most take, and no bound lies above another budget's plan."""
    workload = kit.workload(images, new=new, prompt=64)
    plans = [
        kit.plan("3b", budget, "cpu", workload).prediction
        for budget in (700 * MIB, 3 * GIB, 5 * GIB, None)
    ]
    seconds = [plan.seconds for plan in plans]
    for number, plan in enumerate(plans):
        assert plan.seconds <= min(seconds[: number + 1]) * most
        assert plan.seconds_lower_bound <= min(seconds[number:])


def test_what_tiles_add_to_the_start_counts(kit: Any) -> None:
    """Priming runs a tile of each kind of step: with one image in one tile that is a whole step more."""
    workload = kit.workload([(640, 480)], new=8, prompt=64)
    request, profile = Request(kit.checkpoint("3b"), workload, None), load_profile("cpu")
    problem = Problem(request, profile)
    best = search(request, profile, compared=False)
    choice = fastest(
        Space(problem), least_plan(problem), weighed_most=10**4, built_most=100
    ).best.choice
    assert problem.start_s(choice.tiles) > profile.start_s
    shorter = 0
    for name in ("patch_rows", "window_rows", "query_rows", "merger_rows", "prompt_rows"):
        for rows in (64, 256, 1024, 4096):
            tiles = choice.tiles.model_copy(update={name: rows})
            other = build(request, profile, replace(choice, tiles=tiles)).prediction
            assert other.seconds >= best.prediction.seconds * (1 - 1e-4), (name, rows)
            shorter += other.phases[0].seconds < best.prediction.phases[0].seconds
    assert shorter  # some start sooner, and take longer then


SMALLEST = [
    ("tiny", "cpu", ((336, 252),)),
    ("tiny", CARD_8GB, ((336, 252), (100, 100))),
    ("3b", "cpu", ((1280, 960), (640, 480))),
    ("7b", "rtx-5080-16gb", PHOTO),
    ("7b", CARD_8GB, PHOTO * 2),
]


@pytest.mark.parametrize(("model", "device", "images"), SMALLEST)
def test_the_smallest_budget_plans_and_one_mebibyte_less_is_refused(
    kit: Any, model: str, device: str, images: Any
) -> None:
    workload = kit.workload(images, new=16)
    with pytest.raises(BudgetTooSmall) as refused:
        kit.plan(model, MIB, device, workload)
    smallest = refused.value.smallest_bytes
    assert smallest is not None
    plan = kit.plan(model, smallest, device, workload)
    sound(plan, smallest)
    assert plan.prediction.smallest_budget_bytes == smallest
    with pytest.raises(BudgetTooSmall, match="largest step"):
        kit.plan(model, smallest - MIB, device, workload)


def suggestions(message: str) -> dict[str, str]:
    ways = " ".join(message.split()).split(" to fit ")[1]
    return dict(part.split() for part in ways.split(" or "))


@pytest.mark.parametrize(
    ("model", "device", "images", "vram", "new"),
    [
        ("7b", "rtx-5080-16gb", PHOTO, "1.5GB", 128),
        ("7b", CARD_8GB, (*PHOTO, (1000, 800)), "2GB", 20000),
        ("3b", "cpu", ((3840, 2160),), "600MB", 64),
    ],
)
def test_what_a_refusal_suggests_fits(
    kit: Any, model: str, device: str, images: Any, vram: str, new: int
) -> None:
    budget = parse_bytes(vram)
    with pytest.raises(BudgetTooSmall) as refused:
        kit.plan(model, budget, device, kit.workload(images, new=new))
    ways = suggestions(str(refused.value))
    assert len(ways) >= 2
    kit.plan(model, parse_bytes(ways["--vram"]), device, kit.workload(images, new=new))
    if "--max-pixels" in ways:
        smaller = kit.workload(images, new=new, max_pixels=int(ways["--max-pixels"]))
        kit.plan(model, budget, device, smaller)
        twice = kit.workload(images, new=new, max_pixels=2 * int(ways["--max-pixels"]) + 1568)
        with pytest.raises(BudgetTooSmall):
            kit.plan(model, budget, device, twice)
    if "--max-new-tokens" in ways:
        kit.plan(model, budget, device, kit.workload(images, new=int(ways["--max-new-tokens"])))


def test_a_refusal_suggests_nothing_that_would_not_help(kit: Any) -> None:
    with pytest.raises(BudgetTooSmall) as refused:
        kit.plan("7b", parse_bytes("300MB"), CARD_8GB, kit.workload(PHOTO))
    assert set(suggestions(str(refused.value))) == {"--vram"}
    assert "/layers." in str(refused.value)
    assert "KV cache" in str(refused.value)


def test_pinned_tiles_are_kept_at_every_budget(kit: Any) -> None:
    free = kit.plan("tiny", None, workload=kit.workload(PHOTO))
    tiles = free.levers.tiles.model_copy(
        update={"query_rows": 200, "prompt_rows": 100, "window_rows": 128, "vocabulary_rows": 99}
    )
    for budget in (None, free.prediction.smallest_budget_bytes + 40 * MIB):
        plan = kit.plan("tiny", budget, workload=kit.workload(PHOTO), tiles=tiles)
        assert plan.levers.tiles == tiles
        sound(plan, budget)


def test_ideas_off_cost_more_bytes(kit: Any) -> None:
    workload = kit.workload(PHOTO, new=16)
    plan = kit.plan("7b", parse_bytes("16GB"), "rtx-5080-16gb", workload)
    sum_, vision, untiled, all_off, usual = plan.prediction.variants
    bound = plan.prediction.bound_peak_bytes
    assert sum_.bound_bytes > bound
    assert not sum_.fits
    assert untiled.bound_bytes > bound
    assert all_off.bound_bytes >= max(v.bound_bytes for v in (sum_, vision, untiled))
    assert usual.bound_bytes >= all_off.bound_bytes
    assert vision.bound_bytes >= bound - MIB
    assert all(v.fits == (v.bound_bytes <= 16 * 10**9) for v in plan.prediction.variants)


def test_resident_vision_weights_cost_bytes_where_the_tower_is_the_peak(kit: Any) -> None:
    """Few LLM layers and a large image: streaming the tower is what lowers the peak."""
    checkpoint = kit.tiny(depth=24)
    workload = kit.workload(((56, 56),), new=1)
    smallest = kit.plan(checkpoint, None, workload=workload).prediction.smallest_budget_bytes
    plan = kit.plan(checkpoint, smallest, workload=workload)
    resident = next(v for v in plan.prediction.variants if v.name == "vision weights resident")
    assert plan.levers.residency[1].resident == 0
    assert resident.bound_bytes > plan.prediction.bound_peak_bytes
    assert not resident.fits


def test_variants_of_a_setting_that_the_plan_has_already_are_the_plan_itself(kit: Any) -> None:
    plan = kit.plan("7b", parse_bytes("24GB"), "rtx-5080-16gb", kit.workload(PHOTO))
    assert plan.levers.order == "prefetch"
    resident = next(v for v in plan.prediction.variants if v.name == "vision weights resident")
    assert resident.note == "as in this plan"
    assert resident.seconds == plan.prediction.seconds
    assert resident.bound_bytes == plan.prediction.bound_peak_bytes


def test_a_setting_that_does_not_fit_is_refused_with_its_bytes(kit: Any) -> None:
    request = Request(kit.tiny(), kit.workload(), 10 * MIB)
    with pytest.raises(BudgetTooSmall, match="this setting of the levers needs"):
        build(request, load_profile("cpu"), kit.choice())


@pytest.mark.parametrize("device", ["cpu", CARD_8GB])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_trying_everything_on_a_tiny_request_is_hardly_faster(
    kit: Any, device: str, share: float
) -> None:
    """Over every order, depth and residency count of a two-layer model with wide layers, at the search's tiles.

    On a card the search sets aside 8 MiB for kernels' blocks and a segment's rounding, used or not.
    """
    checkpoint = wide(kit)
    workload: Workload = kit.workload(((336, 252),), new=6)
    whole = kit.plan(checkpoint, None, device, workload).prediction
    smallest = whole.smallest_budget_bytes
    budget = int(smallest + share * (whole.bound_peak_bytes - smallest))
    plan = kit.plan(checkpoint, budget, device, workload)
    profile = load_profile(device)
    aside = 0 if profile.kind == "cpu" else 10 * MIB
    problem = Problem(Request(checkpoint, workload, budget), profile)
    best = float("inf")
    everything = PhaseResidency(2, 2), PhaseResidency(0, 0)
    counts = [PhaseResidency(*found) for found in product(range(3), range(3), range(2))]
    for vision, decode, depth, order in product(
        everything, counts, (1, 2, 3), ("all_first", "vision_then_llm")
    ):
        for prefill in counts:
            if any(p > d for p, d in zip(vars_of(prefill), vars_of(decode), strict=True)):
                continue
            choice = kit.choice(
                order=order,
                depth=depth,
                vision=vision,
                prefill=prefill,
                decode=decode,
                tiles=plan.levers.tiles.model_copy(update={"vocabulary_rows": 640}),
            )
            found = evaluate(problem, choice)
            if found.bound_bytes <= budget - aside:
                best = min(best, found.seconds)
    # the start is much the same for every plan: leave it out of the comparison
    start = problem.start_s(plan.levers.tiles)
    assert plan.prediction.seconds - start <= best * 1.01


def vars_of(residency: PhaseResidency) -> tuple[int, int, int]:
    return residency.attn, residency.mlp, residency.head


def wide(kit: Any) -> Any:
    """Two layers and two blocks whose weights outweigh everything else."""
    from dataclasses import replace

    from planner.checkpoint.template import template

    checkpoint = kit.tiny(layers=2, depth=2)
    text = checkpoint.shape.text.model_copy(update={"intermediate": 65536})
    shape = checkpoint.shape.model_copy(update={"text": text})
    return replace(checkpoint, shape=shape, tensor_shapes=template(shape.vision, text))


@pytest.mark.parametrize(("model", "gib"), [("7b", 8), ("72b", 13)])
def test_streamed_plans_stay_near_the_lower_bound_on_seconds(
    kit: Any, model: str, gib: int
) -> None:
    """Copies hide behind compute: one slot, where none do, is known to be slower before it is built."""
    plan = kit.plan(model, gib * GIB, "rtx-5080-16gb", kit.workload(PHOTO, new=128))
    assert plan.prediction.seconds <= 1.02 * plan.prediction.seconds_lower_bound
    assert plan.levers.staging_depth > 1
