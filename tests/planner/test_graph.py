from __future__ import annotations

from typing import Any

import networkx as nx
from hypothesis import given
from hypothesis import strategies as st

from planner.graph import Tensor, build, lifetimes, lifetimes_of, live_bytes
from planner.plan.words import Phase
from planner.schedule import BufferDraft, CopyDraft, Program, StepDraft


def step(
    id: str,
    reads: str = "",
    writes: str = "",
    *,
    weights: str | None = None,
    waits: str = "",
    phase: Phase = "prefill",
) -> StepDraft:
    """A step that reads and writes these buffers, named by words."""
    return StepDraft(
        id,
        phase,
        "norm",
        (),
        None,
        weights,
        tuple(reads.split()),
        tuple(writes.split()),
        tuple(waits.split()),
    )


def copy(
    id: str,
    buffer: str,
    after: int,
    need: int,
    *,
    wraps: bool = False,
    once: bool = False,
    phase: Phase = "prefill",
) -> CopyDraft:
    return CopyDraft(id, phase, "unit", buffer, after, wraps, once, 512, need)


def program(kit: Any, steps: list[StepDraft], copies: tuple[CopyDraft, ...] = ()) -> Program:
    names = {name for s in steps for name in (*s.reads, *s.writes)} | {c.buffer for c in copies}
    starts: dict[Phase, int] = {}
    for index, s in enumerate(steps):
        starts.setdefault(s.phase, index)
    buffers = {name: BufferDraft(name, "scratch", 512, ()) for name in sorted(names)}
    return Program(kit.choice(), tuple(steps), buffers, copies, starts, 3)


def lives(made: Program) -> dict[str, tuple[tuple[int, int], ...]]:
    return lifetimes(build(made), made)


def test_a_tensor_dies_after_the_last_step_that_reads_it(kit: Any) -> None:
    steps = [step("a", "", "x"), step("b", "x", "y"), step("c", "x"), step("d", "y")]
    assert lives(program(kit, steps)) == {"x": ((0, 3),), "y": ((1, 4),)}


def test_scratch_that_is_written_anew_is_free_in_between(kit: Any) -> None:
    steps = [step("a", "", "s"), step("b", "", "t"), step("c", "", "s")]
    assert lives(program(kit, steps))["s"] == ((0, 1), (2, 3))


def test_a_buffer_updated_in_place_lives_through_all_its_versions(kit: Any) -> None:
    steps = [step("a", "", "x"), step("b"), step("c", "x", "x"), step("d"), step("e", "x")]
    made = program(kit, steps)
    assert lives(made)["x"] == ((0, 5),)
    graph = build(made)
    assert isinstance(graph, nx.DiGraph)
    assert {node.version for node in graph if isinstance(node, Tensor)} == {0, 1}
    assert nx.is_directed_acyclic_graph(graph)


def test_streaming_holds_two_units_while_the_next_one_loads(kit: Any) -> None:
    steps = [
        step("a", weights="s0", waits="ca"),
        step("b", weights="s1", waits="cb"),
        step("c", weights="s0", waits="cc"),
        step("d"),
    ]
    copies = (copy("ca", "s0", -1, 0), copy("cb", "s1", -1, 1), copy("cc", "s0", 0, 2))
    made = program(kit, steps, copies)
    assert lives(made) == {"s0": ((0, 3),), "s1": ((0, 2),)}


def test_a_slot_is_free_between_its_use_and_its_refill(kit: Any) -> None:
    steps = [
        step("a", weights="s", waits="ca"),
        step("b"),
        step("c"),
        step("d", weights="s", waits="cd"),
    ]
    copies = (copy("ca", "s", -1, 0), copy("cd", "s", 1, 3))
    assert lives(program(kit, steps, copies))["s"] == ((0, 1), (2, 4))


def test_what_the_loop_reads_before_it_writes_lives_throughout_the_loop(kit: Any) -> None:
    steps = [
        step("p", "", "kv"),
        step("d0", "kv", "kv s", phase="decode"),
        step("d1", "s", "t", phase="decode"),
        step("d2", "", "", phase="decode"),
    ]
    found = lives(program(kit, steps))
    assert found["kv"] == ((0, 4),)
    assert found["s"] == ((1, 3),)
    assert found["t"] == ((2, 3),)


def test_a_staging_slot_of_the_loop_lives_throughout_the_loop(kit: Any) -> None:
    steps = [
        step("p", "", "x"),
        step("d0", phase="decode"),
        step("d1", weights="s", waits="c", phase="decode"),
        step("d2", phase="decode"),
    ]
    copies = (copy("c", "s", 2, 2, wraps=True, phase="decode"),)
    assert lives(program(kit, steps, copies))["s"] == ((1, 4),)


@given(
    st.dictionaries(
        st.text("abcdef", min_size=1, max_size=2),
        st.tuples(
            st.integers(1, 9),
            st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), min_size=1, max_size=3),
        ),
        max_size=6,
    )
)
def test_live_bytes_are_the_sum_over_live_buffers(
    drawn: dict[str, tuple[int, list[tuple[int, int]]]],
) -> None:
    sizes = {name: size for name, (size, _) in drawn.items()}
    spans = {
        name: tuple((birth, min(birth + length, 10)) for birth, length in lives)
        for name, (_, lives) in drawn.items()
    }
    slow = [
        sum(sizes[n] for n, found in spans.items() for birth, death in found if birth <= i < death)
        for i in range(10)
    ]
    assert live_bytes(spans, sizes, 10) == slow


def test_lifetimes_that_are_remembered_are_those_of_the_program_asked_for(kit: Any) -> None:
    steps = [
        step("a", "", "x"),
        step("b", "x", "x"),
        step("c", "x", "", weights="slot", waits="copy:c"),
    ]
    late, early = (program(kit, steps, (copy("copy:c", "slot", after, 2),)) for after in (1, -1))
    for asked in (late, early, late):
        assert lifetimes_of(asked) == lifetimes(build(asked), asked)
    assert lifetimes_of(late)["slot"] != lifetimes_of(early)["slot"]
    changed = lifetimes_of(late)
    changed.clear()
    assert lifetimes_of(late)
