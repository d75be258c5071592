"""The planner's table of contents: from a request to the fastest plan that fits.

    tile fronts per phase → candidates (tiles x residency x depth) in order of their lower bound on seconds
    → the best few, in each order of phases: program, graph, layout, bytes, seconds → the fastest that fits → Plan

Candidates are bounded in closed form (`planner.candidates`); the graph and the layout are built only for those that
can still win.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from planner.assemble import Evaluated, assemble, draft, evaluate, work_out
from planner.candidates import Candidate, candidates
from planner.certificate import certificate, least_plan
from planner.errors import BudgetTooSmall
from planner.moves import moves, usual, usual_choice
from planner.plan import Plan
from planner.problem import Problem, Request
from planner.profile import DeviceProfile
from planner.schedule import Choice
from planner.units import MIB, format_gib
from planner.variants import evaluate_ordered, prefetched, variants

BUILT = 4  # candidates whose graph and layout are built, per round
CLOSE = 1e-3  # a candidate that can gain less than this share is not built
OUTSIDE_CAPS = (8 * MIB, 48 * MIB, 256 * MIB)  # of kernels' blocks outside the arena, on a card
ROUNDS = 3  # each with what candidates of the last one took beside their closed form taken off


__all__ = ["Request", "build", "search", "usual_way"]


def search(request: Request, device: DeviceProfile, *, compared: bool = True) -> Plan:
    """The fastest plan found whose bound fits the budget; BudgetTooSmall carries the certificate. `compared`: with variants and moves."""
    problem = Problem(request, device)
    smallest = least_plan(problem)
    budget = request.budget_bytes
    if budget is not None and budget < smallest.bound_bytes:
        raise certificate(problem, smallest)
    best, weighed, lower_bound = _best(problem, budget, smallest)
    return assemble(
        problem,
        best,
        lower_bound=min(lower_bound, best.seconds),
        candidates=weighed,
        smallest_bytes=smallest.bound_bytes,
        variants=(*variants(problem, best), usual(problem)) if compared else (),
        moves=moves(problem, best) if compared else (),
    )


def build(request: Request, device: DeviceProfile, choice: Choice) -> Plan:
    """The plan of one given setting of the levers, without a search; BudgetTooSmall where it does not fit."""
    problem = Problem(request, device)
    found = evaluate_ordered(problem, choice)
    if request.budget_bytes is not None and found.bound_bytes > request.budget_bytes:
        raise BudgetTooSmall(
            f"this setting of the levers needs {format_gib(found.bound_bytes)}, "
            f"the budget is {format_gib(request.budget_bytes)}",
            smallest_bytes=found.bound_bytes,
        )
    return assemble(
        problem,
        found,
        lower_bound=found.seconds,
        candidates=1,
        smallest_bytes=found.bound_bytes,
        variants=(),
    )


def usual_way(request: Request, device: DeviceProfile) -> Plan:
    """The same request with every weight resident from the start (SUM) and no row tiles, whether it fits the budget or not; to compare with."""
    problem = Problem(request, device)
    found = evaluate(problem, usual_choice(problem))
    return assemble(
        problem,
        found,
        lower_bound=found.seconds,
        candidates=1,
        smallest_bytes=found.bound_bytes,
        variants=(),
    )


def _best(
    problem: Problem, budget: int | None, smallest: Evaluated
) -> tuple[Evaluated, int, float]:
    """The fastest evaluated candidate that fits, how many were weighed, and a lower bound on seconds over all."""
    budget_left = None if budget is None else budget - _fixed_bytes(problem, smallest)
    caps = OUTSIDE_CAPS if budget is not None and not problem.on_cpu else (None,)
    best, weighed, rest = smallest, 0, 0
    lower_bound = smallest.seconds
    for round_ in range(ROUNDS):
        ranked: list[Candidate] = []
        for cap in caps:
            allowance = None
            if budget is not None and budget_left is not None:
                allowance = min(budget_left - (cap or 0), budget - rest)
            ranked += candidates(problem, allowance, cap)
        ranked.sort(key=_rank)
        weighed += len(ranked)
        if round_ == 0 and ranked:
            lower_bound = ranked[0].bound_s
        passed = False
        for candidate in ranked[:BUILT]:
            if candidate.bound_s >= best.seconds * (1 - CLOSE):
                break
            for found in _orders(problem, candidate.choice, best.seconds):
                if budget is not None and found.bound_bytes > budget:
                    if found.choice.order == "vision_then_llm":
                        passed = True
                        # beside what the closed form counts; the allocator's segments make it differ
                        rest = max(rest, found.bound_bytes - candidate.bytes)
                elif (found.seconds, found.peak_bytes) < (best.seconds, best.peak_bytes):
                    best = found
        if not passed or budget is None:
            break
    return best, weighed, lower_bound


def _fixed_bytes(problem: Problem, smallest: Evaluated) -> int:
    """Device bytes beside the arena and the kernels' blocks, as in the smallest plan: context, its error, workspaces."""
    if problem.on_cpu:
        return smallest.context_bytes + smallest.context_error_bytes
    outside = max(step.outside for step in smallest.bytes)
    return smallest.bound_bytes - smallest.layout.height_bytes - outside


def _rank(candidate: Candidate) -> tuple[float, float, float, int]:
    return (candidate.bound_s, candidate.compute_s, candidate.moved_s, candidate.bytes)


def _orders(problem: Problem, choice: Choice, best_s: float) -> Iterator[Evaluated]:
    """The choice under each order of phases; all weights first only where that is no slower than `best_s`."""
    base = evaluate(problem, replace(choice, order="vision_then_llm"))
    yield base
    if not problem.workload.images or not (
        choice.prefill.attn + choice.prefill.mlp + choice.prefill.head
    ):
        return
    overlapped = prefetched(problem, choice, base)
    yield overlapped
    drafted = draft(problem, replace(choice, order="all_first"))
    if drafted.time.seconds < min(best_s, base.seconds, overlapped.seconds):
        yield work_out(problem, drafted)
