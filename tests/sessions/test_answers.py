"""Answers of a session are those of runs of their own, whatever was asked before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from executor.rounds import question
from executor.run import Session
from planner.errors import DoesNotFit, InputError, RunFailed
from planner.plan.sessions import first_of_prefill, keeps_cache, still_there
from tests.hostile.lab import SETTINGS
from tests.hostile.scheduler import EXTREMES, at_random, by_rank, policies
from tests.sessions.conftest import TURNS, Talks

# fp32, other row tiles
CLOSE = 1e-4
AGAIN = [n for n in range(1, len(TURNS)) if TURNS[n].images == TURNS[n - 1].images]


def test_every_turn_gives_the_tokens_and_logits_of_a_run_of_its_own(
    talks: Talks, setting: str
) -> None:
    for turn, said in zip(TURNS, talks.on_cpu(setting), strict=True):
        alone = talks.alone(setting, turn)
        assert said.tokens == alone.tokens, turn
        assert torch.allclose(said.logits, alone.logits, rtol=0, atol=CLOSE), turn


def test_a_request_that_runs_as_a_whole_gives_the_same_bits(talks: Talks, setting: str) -> None:
    said = talks.on_cpu(setting)
    for number in (0, len(TURNS) - 1):  # as long as the plan's prompt, so nothing is filled up
        assert torch.equal(said[number].logits, talks.alone(setting, TURNS[number]).logits)


def test_further_questions_run_no_vision_and_find_the_images_rows(
    talks: Talks, setting: str
) -> None:
    said = talks.on_cpu(setting)
    rows = len(talks.ids(setting, TURNS[0])) - 7 - 1  # up to the last image's last token
    assert talks.lab.plan(setting).prediction.further is not None
    for number, turn in enumerate(said):
        phases = [phase.phase for phase in turn.record.phases]
        assert turn.record.reused_tokens == (rows if number in AGAIN else 0)
        assert ("vision" in phases) == (number not in AGAIN)
        assert ("decode" in phases) == (TURNS[number].new_tokens > 1)


def test_the_same_question_again_gives_the_same_bits_whatever_was_asked_between(
    talks: Talks, setting: str
) -> None:
    first, between, other = TURNS[0], TURNS[1], TURNS[2]
    said = talks.held(setting, turns=(first, between, other, between))
    assert torch.equal(said[1].logits, said[3].logits)
    assert not torch.equal(said[1].logits[0], said[2].logits[0])


def test_weights_come_again_only_where_others_lay_on_them(talks: Talks, setting: str) -> None:
    plan = talks.lab.plan(setting)
    sizes = {copy.id: copy.size_bytes for copy in plan.copies}
    said = talks.on_cpu(setting)
    landed = still_there(plan, first_of_prefill(plan))
    again = {copy.id for copy in said[1].record.copies}
    assert again == {c.id for c in plan.copies if c.phase != "vision"} - landed
    assert said[1].record.reused_weights_bytes == sum(sizes[name] for name in landed)
    if setting == "all resident, first":
        # tower and language model lie side by side: what the tower's activations spare stays
        anew = {copy.id for copy in said[3].record.copies}
        assert anew == {copy.id for copy in plan.copies if copy.phase == "vision"} - still_there(
            plan, 0
        )
        assert not again
    if setting == "all streamed, 1 slot":
        assert landed == {"copy:prefill/norm"}


def test_a_kept_unit_is_read_from_disk_once_in_a_session(
    talks: Talks, monkeypatch: pytest.MonkeyPatch
) -> None:
    from executor.host_tier import HostTier

    name = "all streamed, kept in host memory"
    reads: list[int] = []
    real = HostTier.read

    def counted(self: HostTier, at: int, chunk: object, files: object) -> None:
        reads.append(at)
        real(self, at, chunk, files)  # type: ignore[arg-type]

    monkeypatch.setattr(HostTier, "read", counted)
    talks.held(name)
    assert reads
    assert len(reads) == len(set(reads))


# --- late and early queues ----------------------------------------------------------------------------------------

FEW = ("moves stop halfway", "the host runs ahead, copies late")


def test_late_and_early_queues_change_no_bit(talks: Talks, setting: str) -> None:
    few = TURNS[:4]
    chosen = [*((name, by_rank(*EXTREMES[name])) for name in FEW), ("seed 0", at_random(0))]
    for name, policy in chosen:
        held = talks.hostile(setting, policy, few)
        for said, wanted in zip(held, talks.on_cpu(setting), strict=False):
            assert torch.equal(said.logits, wanted.logits), name


@pytest.mark.full
def test_many_orders_of_the_queues_change_no_bit(talks: Talks, setting: str) -> None:
    for name, policy in policies(20):
        held = talks.hostile(setting, policy)
        for said, wanted in zip(held, talks.on_cpu(setting), strict=True):
            assert torch.equal(said.logits, wanted.logits), name


def test_copies_of_an_answer_that_ended_early_do_not_reach_into_the_next(talks: Talks) -> None:
    name, turns = "all streamed, 3 slots", TURNS[:2]
    first, second = (talks.alone(name, turn).tokens for turn in turns)
    stop = (next(token for token in first[1:3] if token not in (first[0], second[0])),)
    right = talks.held(name, turns=turns, stop=stop)
    assert len(right[0].tokens) < 4
    for policy_name, policy in policies(6):
        for said, wanted in zip(talks.hostile(name, policy, turns, stop=stop), right, strict=True):
            assert torch.equal(said.logits, wanted.logits), policy_name


# --- what a session may find --------------------------------------------------------------------------------------


def test_images_at_another_place_in_the_prompt_run_as_a_whole(talks: Talks) -> None:
    name = "all streamed, 2 slots"
    turns = (TURNS[0], TURNS[1]._replace(before=2), TURNS[2]._replace(before=2), TURNS[1])
    said = talks.held(name, turns=turns)
    for turn, found in zip(turns, said, strict=True):
        assert torch.allclose(found.logits, talks.alone(name, turn).logits, rtol=0, atol=CLOSE)
    assert [found.record.reused_tokens for found in said] == [0, 0, 31, 0]


def test_after_a_request_that_failed_the_next_one_runs_as_a_whole(talks: Talks) -> None:
    name = "all resident, in turn"
    images = talks.images(name, 0)

    def fails(step: str) -> None:
        if step == "prefill/layers.1.mlp":
            raise InputError("enough")

    request = replace(
        talks.lab.request(name, poison=True), images=images, save_outputs=None, max_new_tokens=4
    )
    asked = [replace(request, prompt=talks.ids(name, turn)) for turn in TURNS[:3]]
    with Session(talks.lab.plan(name), request) as session:
        session.answer(asked[0])
        with pytest.raises(InputError, match="enough"):
            session.answer(replace(asked[1], on_step=fails))
        third = session.answer(asked[2])
        fourth = session.answer(asked[1])
    assert third.record.reused_tokens == third.record.reused_weights_bytes == 0
    assert third.tokens == talks.alone(name, TURNS[2]).tokens
    assert fourth.record.reused_tokens == 34
    assert fourth.tokens == talks.alone(name, TURNS[1]).tokens


def test_a_session_that_ended_or_could_not_load_says_so(talks: Talks) -> None:
    name = "all resident, first"
    plan, request = talks.lab.plan(name), talks.lab.request(name)
    with Session(plan, request) as session:
        pass
    with pytest.raises(RunFailed, match="has ended or could not load; open another"):
        session.ask(talks.ids(name, TURNS[0]))
    small = plan.device.model_copy(update={"budget_bytes": 1})
    with Session(plan.model_copy(update={"device": small}), request) as session:
        with pytest.raises(DoesNotFit):
            session.ask(talks.ids(name, TURNS[0]))
        with pytest.raises(RunFailed, match="could not load"):
            session.ask(talks.ids(name, TURNS[0]))


def test_a_question_beyond_the_plans_room_is_refused_and_the_session_goes_on(
    talks: Talks,
) -> None:
    name = "all resident, first"
    images = talks.images(name, 0)
    with Session(talks.lab.plan(name), talks.lab.request(name)) as session:
        session.ask(talks.ids(name, TURNS[0]), images)
        with pytest.raises(InputError, match="the plan room for 42"):
            session.ask((*talks.ids(name, TURNS[0]), 1), images)
        with pytest.raises(InputError, match="the plan is for 2 images, found 1"):
            session.ask(talks.ids(name, TURNS[0]), images[:1])
        assert session.ask(talks.ids(name, TURNS[1]), images).record.reused_tokens == 34


def test_other_text_before_the_images_runs_as_a_whole(talks: Talks) -> None:
    plan = talks.lab.plan("all resident, first")
    ids = talks.ids("all resident, first", TURNS[0])
    spans = ((6, 6), (14, 20))
    found = question(plan, ids, ids, spans)
    assert found is not None
    assert found.start == 34
    assert question(plan, ids, (9, *ids[1:]), spans) is None
    assert question(plan, ids, ids[:34], spans) is None  # nothing behind the image
    assert question(plan, ids, ids, ()) is None
    prediction = plan.prediction.model_copy(update={"further": None})
    assert question(plan.model_copy(update={"prediction": prediction}), ids, ids, spans) is None


def test_keys_and_values_under_another_buffer_are_not_kept(talks: Talks) -> None:
    plan = talks.lab.plan("all streamed, 1 slot")
    first = first_of_prefill(plan)
    assert keeps_cache(plan, first)
    cache = next(buffer for buffer in plan.buffers if buffer.kind == "kv_cache")
    moved = tuple(
        buffer.model_copy(update={"offset_bytes": cache.offset_bytes})
        if buffer.name == "staging/prefill/0"
        else buffer
        for buffer in plan.buffers
    )
    broken = plan.model_copy(update={"buffers": moved})
    assert not keeps_cache(broken, first)
    ids = talks.ids("all streamed, 1 slot", TURNS[0])
    assert question(broken, ids, ids, ((6, 6), (14, 20))) is None


def test_a_plan_whose_weights_nobody_would_wait_for_is_run_as_a_whole(talks: Talks) -> None:
    name = "all resident, first"
    plan = talks.lab.plan(name)
    ids, spans = talks.ids(name, TURNS[0]), ((6, 6), (14, 20))
    assert question(plan, ids, ids, spans) is not None
    first = first_of_prefill(plan)
    # a unit that would have to come again, though only the first step of all waits for its copy
    shorter = tuple(
        buffer.model_copy(update={"lifetimes": ((0, first + 3),)})
        if buffer.name == "weights/text/layers.0.mlp"
        else buffer
        for buffer in plan.buffers
    )
    assert question(plan.model_copy(update={"buffers": shorter}), ids, ids, spans) is None


def test_the_settings_have_weights_that_stay_and_weights_that_do_not(talks: Talks) -> None:
    found = set()
    for name in SETTINGS:
        plan = talks.lab.plan(name)
        landed = still_there(plan, first_of_prefill(plan))
        found.add((bool(landed), len(landed) < sum(c.phase != "vision" for c in plan.copies)))
    assert {(True, True), (True, False)} <= found
