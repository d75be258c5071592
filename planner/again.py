"""What further requests of a session take: the same plan again in the same arena, with what the request before left there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from planner import workspace
from planner.graph import Intervals
from planner.plan import Plan
from planner.plan.prediction import Further
from planner.plan.program import Copy, Step
from planner.plan.sessions import first_of_prefill, keeps_cache, still_there
from planner.plan.tiles import Tiles, question_tile
from planner.problem import Problem
from planner.queues import Job, line
from planner.schedule import Program
from planner.workload import TOKENS_AROUND_IMAGE

BEFORE_IMAGES = 14  # tokens of the chat template before the first image, in Qwen2.5-VL's tokenizer
QUESTION_ROWS = (32, 64, 128)  # at once: as few as hold the question


def cache_kept(program: Program, lifetimes: Mapping[str, Intervals]) -> dict[str, Intervals]:
    """The lifetimes, keys and values alive from prefill's first step on: where they are when a further question begins."""
    whole = ((program.starts["prefill"], len(program.steps)),)
    caches = {name for name, buffer in program.buffers.items() if buffer.kind == "kv_cache"}
    return {name: whole if name in caches else spans for name, spans in lifetimes.items()}


def shares_cache(
    program: Program, lifetimes: Mapping[str, Intervals], offsets: Mapping[str, int]
) -> bool:
    """Whether something of prefill or decode lies on keys and values before they are written."""
    prefill, buffers = program.starts["prefill"], program.buffers
    later = [name for name, spans in lifetimes.items() if spans[-1][1] > prefill]
    return any(
        max(offsets[cache], offsets[name])
        < min(offsets[cache] + buffers[cache].size_bytes, offsets[name] + buffers[name].size_bytes)
        for cache in buffers
        if buffers[cache].kind == "kv_cache"
        for name in later
        if name != cache
    )


def with_further(problem: Problem, plan: Plan) -> Plan:
    """The plan with its prediction of further requests."""
    prediction = plan.prediction.model_copy(update={"further": further(problem, plan)})
    return plan.model_copy(update={"prediction": prediction})


def further(problem: Problem, plan: Plan) -> Further:
    """Seconds and bytes of a further question about the same images, and of a request with others."""
    decode_s = sum(p.seconds for p in plan.prediction.phases if p.phase == "decode")
    request_s = _seconds(problem, plan, 0, {}) + _opening_s(problem) + decode_s
    bound = plan.prediction.bound_peak_bytes
    rows = _question_rows(problem, plan)
    if rows is None:
        return Further(
            question_rows=None,
            question_prefill_seconds=request_s - decode_s,
            question_seconds=request_s,
            request_seconds=request_s,
            kept_bytes=0,
            bound_peak_bytes=bound,
        )
    tile = question_tile(rows, _start(problem), plan.workload.prompt_tokens, plan.decode_repeats)
    prefill_s = _seconds(problem, plan, first_of_prefill(plan), _step_seconds(problem, plan, tile))
    kept = _kept_bytes(problem, plan, tile)
    return Further(
        question_rows=rows,
        question_prefill_seconds=prefill_s,
        question_seconds=prefill_s + decode_s,
        request_seconds=request_s,
        kept_bytes=kept,
        bound_peak_bytes=_bound(problem, plan, tile),
    )


def _start(problem: Problem) -> int:
    """Rows of the prompt up to the last image's last one; other tokenizers differ by a few."""
    images = problem.workload.images
    inside = sum(image.tokens + TOKENS_AROUND_IMAGE for image in images) - 1
    return min(BEFORE_IMAGES + inside, problem.workload.prompt_tokens - 1)


def _question_rows(problem: Problem, plan: Plan) -> int | None:
    """Rows of a further question that run at once; None where keys and values are not kept.

    Fewer where more would take bytes that the budget has not: one row runs as in decode, and takes nothing more.
    """
    if not problem.workload.images or not plan.decode_repeats:
        return None
    if not keeps_cache(plan, first_of_prefill(plan)):
        return None
    tiles, left = plan.levers.tiles, problem.workload.prompt_tokens - _start(problem)
    rows = next((rows for rows in QUESTION_ROWS if rows >= left), QUESTION_ROWS[-1])
    rows = min(rows, tiles.prompt_rows, tiles.prompt_mlp_rows)
    budget = plan.device.budget_bytes
    while rows > 1:
        fits = budget is None or _bound(problem, plan, rows) <= budget
        # on a card the room for kernels' blocks is taken once
        room = problem.on_cpu or _outside_bytes(problem, plan, rows) <= max(
            step.outside_bytes for step in plan.steps
        )
        if fits and room:
            break
        rows //= 2
    return rows


# --- bytes --------------------------------------------------------------------------------------------------------


def _bound(problem: Problem, plan: Plan, rows: int) -> int:
    """The most that a session holds whose questions run by so many rows."""
    prediction, kept = plan.prediction, _kept_bytes(problem, plan, rows)
    errors = prediction.bound_peak_bytes - prediction.expected_peak_bytes
    outside = _outside_bytes(problem, plan, rows)
    most = prediction.expected_peak_bytes
    if problem.on_cpu:
        for step in plan.steps:
            if step.kind == "self_attn" and step.phase == "prefill":
                most = max(most, step.expected_bytes - step.outside_bytes + outside)
    return most + kept + errors


def _tiles(plan: Plan, rows: int) -> Tiles:
    return plan.levers.tiles.model_copy(update={"prompt_rows": rows, "prompt_mlp_rows": rows})


def _outside_bytes(problem: Problem, plan: Plan, rows: int) -> int:
    """What self-attention's kernels hold at once outside the arena."""
    total = -(-problem.workload.prompt_tokens // rows) * rows
    blocks = workspace.outside(
        "self_attn",
        problem.model,
        _tiles(plan, rows),
        (),
        total,
        problem.workload.context_tokens,
        problem.machine,
    )
    return workspace.peak_bytes(blocks)


def _kept_bytes(problem: Problem, plan: Plan, rows: int) -> int:
    """What the CPU's library keeps for products of so many rows, beside those that the plan runs anyway."""
    levers = plan.levers
    known = problem.gemm_shapes(levers.tiles, levers.images_together)
    found = set[tuple[int, int, int]]()
    for kind in ("self_attn", "text_mlp"):
        found |= workspace.gemm_shapes(kind, problem.model, _tiles(plan, rows), (), rows)
    return problem.kept_for(found - known)


# --- seconds ------------------------------------------------------------------------------------------------------


def _step_seconds(problem: Problem, plan: Plan, tile: int) -> dict[str, float]:
    """Seconds of prefill's steps where only the rows after the images run, by kind."""
    start = _start(problem)
    before = -(-start // tile) * tile
    rows = -(-(problem.workload.prompt_tokens - start) // tile) * tile
    costs, heads = problem.costs, plan.levers.tiles.prompt_heads
    attention = costs.text("self_attn", tile, before + rows, 0, heads)
    attention -= costs.text("self_attn", tile, before, 0, heads)
    return {"self_attn": attention, "text_mlp": costs.text("text_mlp", tile, rows, 0)}


def _seconds(problem: Problem, plan: Plan, first: int, by_kind: dict[str, float]) -> float:
    """From step `first` to the end of prefill, without copies whose weights are still there."""
    steps = [step for step in plan.steps[first:] if step.phase != "decode"]
    landed = still_there(plan, first)
    copies = [c for c in plan.copies if c.phase != "decode" and c.id not in landed]
    if first:
        copies = [copy for copy in copies if copy.phase != "vision"]
    seconds = [by_kind.get(step.kind, step.seconds) for step in steps]
    jobs = list(_jobs(problem, plan, first, steps, copies))
    return line(seconds, jobs, problem.costs.beside)[0][-1]


def _jobs(
    problem: Problem, plan: Plan, first: int, steps: list[Step], copies: list[Copy]
) -> Iterable[Job]:
    index = {step.id: number for number, step in enumerate(plan.steps)}
    need: dict[str, int] = {}
    for step in plan.steps:
        for name in step.waits:
            need.setdefault(name, max(index[step.id] - first, 0))
    touched = set[str]()
    in_host = {place.unit for place in plan.host_units}  # since the first request
    for copy in copies:
        fresh = copy.buffer not in touched
        touched.add(copy.buffer)
        size = copy.size_bytes
        after = -1 if copy.after is None else max(index[copy.after] - first, -1)
        if copy.unit in in_host:
            yield Job(need[copy.id], after, problem.costs.from_host(size))
            continue
        yield Job(
            need[copy.id],
            after,
            problem.costs.copy(size, first=False, cached=problem.cached, fresh=fresh),
        )


def _opening_s(problem: Problem) -> float:
    measured = problem.profile.measured
    if not measured:
        return 0.0
    images = problem.workload.images
    pixels = sum(image.source_width_px * image.source_height_px for image in images)
    return pixels / measured.image_pixels_per_s
