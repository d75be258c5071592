"""The mutation table: every wait left out by itself, what the graph says of it, and what the hostile device shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from executor.order import problems
from tests.hostile.lab import Lab, Seen
from tests.hostile.waits import SORTS, Graph, Meeting, Mutant, mutants

# policies to try: on a wait whose lack must show all rankings and these seeds, on an implied one the extremes and these
NEEDED_SEEDS = 20
IMPLIED_SEEDS = 4


class Verdict(NamedTuple):
    """`unordered`: what may meet without the wait, none where the others imply it. `refused`: by the executor, before anything is read."""

    setting: str
    mutant: Mutant
    unordered: tuple[Meeting, ...]
    seen: Seen | None
    refused: bool | None  # None: not a change of the plan

    @property
    def holds(self) -> bool:
        """Seen exactly where it must be, and then refused where it can be."""
        needed = bool(self.unordered)
        return needed == (self.seen is not None) and not (needed and self.refused is False)


def verdicts(
    lab: Lab, setting: str, *, every: int = 1, sorts: Iterable[str] = SORTS
) -> Iterator[Verdict]:
    """One for each mutant of a setting's plan; of those of a ring piece only one in `every`."""
    plan, locations = lab.plan(setting), lab.locations(setting)
    graph = Graph(plan, locations)
    ring = 0
    for mutant in mutants(plan, locations):
        if mutant.sort not in sorts:
            continue
        if mutant.sort == SORTS[6]:
            ring += 1
            if ring % every:
                continue
        yield verdict(lab, setting, graph, mutant)


def verdict(
    lab: Lab, setting: str, graph: Graph, mutant: Mutant, *, implied_seeds: int = IMPLIED_SEEDS
) -> Verdict:
    """What the graph says of one mutant, and what runs of it show."""
    unordered = tuple(graph.unordered(mutant.edges))
    if unordered:
        stops = graph.stops(unordered)
        seen = lab.seen(setting, mutant, seeds=NEEDED_SEEDS, every_rank=True, stops=stops)
    else:
        seen = lab.seen(setting, mutant, seeds=implied_seeds)
    refused = bool(problems(mutant.plan)) if mutant.plan is not None else None
    return Verdict(setting, mutant, unordered, seen, refused)


def markdown(found: Sequence[Verdict]) -> str:
    """The table by sort of wait, and a line for every verdict that does not hold."""
    lines = [
        "| wait left out | waits | must show | shown | implied by others | shown although implied | refused before the run |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for sort in (*SORTS, None):
        rows = [v for v in found if sort in (None, v.mutant.sort)]
        needed = [v for v in rows if v.unordered]
        implied = [v for v in rows if not v.unordered]
        could = [v for v in needed if v.refused is not None]
        refused = f"{sum(v.refused is True for v in could)} of {len(could)}" if could else "-"
        shown, odd = (sum(v.seen is not None for v in part) for part in (needed, implied))
        lines.append(
            f"| {sort or 'all'} | {len(rows)} | {len(needed)} | {shown} | {len(implied)} | {odd} | {refused} |"
        )
    wrong = [v for v in found if not v.holds]
    failed = sum(v.seen is not None and v.seen.error is not None for v in found)
    lines += [
        "",
        f"{len(wrong)} of {len(found)} do not hold. Of the shown {failed} ended with an error, the others with another answer.",
    ]
    lines += [f"- {v.setting}: {v.mutant.sort}: {v.mutant.name}" for v in wrong]
    return "\n".join(lines)
