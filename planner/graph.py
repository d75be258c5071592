"""The graph of tensor lifetimes (networkx), and the lifetimes of buffers that follow from it.

Nodes are steps, copies and tensors. A *tensor* is one version of a buffer's content with one writer: step -> tensor
is a write, tensor -> step a read. A step that updates a buffer in place reads version n and writes version n + 1.
Each refill of a staging slot is a new version.

Steps of the decode loop stand in the graph once. What the loop reads before it writes it (KV cache, resident
weights), and every staging slot of the loop, is carried from one iteration to the next: alive throughout the loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import networkx as nx

from planner.schedule import CopyDraft, Program, StepDraft

Intervals = tuple[tuple[int, int], ...]


class Tensor(NamedTuple):
    buffer: str
    version: int


def build(program: Program) -> nx.DiGraph:
    """The graph of one program. Step and copy nodes are their ids, with `index`: when a step runs, when a copy may start."""
    index: dict[str, int] = {}
    edges: list[tuple[str | Tensor, str | Tensor]] = []
    newest: dict[str, Tensor] = {}
    by_id = {copy.id: copy for copy in program.copies}

    def write(node: str, buffer: str) -> None:
        version = newest[buffer].version + 1 if buffer in newest else 0
        newest[buffer] = Tensor(buffer, version)
        edges.append((node, newest[buffer]))

    for number, step in enumerate(program.steps):
        index[step.id] = number
        for waited in step.waits:
            copy = by_id[waited]
            index[waited] = start_index(copy, program)
            write(waited, copy.buffer)
        edges += [(newest[buffer], step.id) for buffer in _reads(step)]
        for buffer in step.writes:
            write(step.id, buffer)
    graph = nx.DiGraph(edges)
    graph.add_nodes_from((node, {"index": number}) for node, number in index.items())
    return graph


def start_index(copy: CopyDraft, program: Program) -> int:
    """First step index at which a copy may already be writing; a wrapping copy writes from the loop's first step on."""
    return program.decode_start if copy.wraps else copy.after + 1


def lifetimes(graph: nx.DiGraph, program: Program) -> dict[str, Intervals]:
    """Of each buffer: the step intervals `[birth, death)` in which one of its versions is alive, merged and in order.

    A version is born when its writer starts and dies after the last step that reads it.
    """
    index = dict(graph.nodes(data="index"))
    births: dict[Tensor, int] = {}
    last_reads: dict[Tensor, int] = {}
    for node, after in graph.adjacency():
        if isinstance(node, Tensor):
            last_reads[node] = max([index[reader] for reader in after], default=-1)
        else:
            births.update(dict.fromkeys(after, index[node]))
    intervals: dict[str, list[tuple[int, int]]] = {name: [] for name in program.buffers}
    for tensor, birth in births.items():
        intervals[tensor.buffer].append((birth, max(birth, last_reads[tensor]) + 1))
    loop = (program.decode_start, len(program.steps))
    for buffer in _carried(program):
        intervals[buffer].append(loop)
    return {name: _merge(found) for name, found in intervals.items()}


class _Structure:
    """A program by what its graph depends on: names, waits and starts, no sizes."""

    def __init__(self, program: Program) -> None:
        self.program = program
        copies = frozenset((c.id, c.phase, c.buffer, c.after, c.wraps) for c in program.copies)
        self.key = (program.steps, copies, tuple(program.buffers), program.decode_start)
        self.hash = hash(self.key)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Structure) and self.key == other.key


@lru_cache(maxsize=8)
def _remembered(structure: _Structure) -> dict[str, Intervals]:
    return lifetimes(build(structure.program), structure.program)


def lifetimes_of(program: Program) -> dict[str, Intervals]:
    """`lifetimes` of the program's graph; of programs that differ in tiles alone it is built once."""
    return dict(_remembered(_Structure(program)))


def _carried(program: Program) -> set[str]:
    carried = {copy.buffer for copy in program.copies if copy.phase == "decode"}
    written: set[str] = set()
    for step in program.steps[program.decode_start :]:
        carried |= {name for name in _reads(step) if name not in written}
        written |= set(step.writes)
    return carried


def _reads(step: StepDraft) -> tuple[str, ...]:
    return (*step.reads, step.weights) if step.weights else step.reads


def _merge(intervals: list[tuple[int, int]]) -> Intervals:
    merged: list[tuple[int, int]] = []
    for birth, death in sorted(intervals):
        if merged and birth <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(death, merged[-1][1]))
        else:
            merged.append((birth, death))
    return tuple(merged)


def live_bytes(
    lifetimes: Mapping[str, Intervals], sizes: Mapping[str, int], steps: int
) -> list[int]:
    """Bytes of all live buffers at each step; the maximum is the layout's lower bound."""
    change = [0] * (steps + 1)
    for name, intervals in lifetimes.items():
        for birth, death in intervals:
            change[birth] += sizes[name]
            change[death] -= sizes[name]
    live, total = [], 0
    for step in range(steps):
        total += change[step]
        live.append(total)
    return live
