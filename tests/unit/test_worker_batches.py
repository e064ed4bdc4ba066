"""The head's decisions, one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from molink_common.errors import CapacityError
from molink_common.identity import sequence_id
from molink_common.messages import FinishReason, StepTokens
from molink_common.wire import Logits, Traffic
from molink_stage_worker.batching import MAX_RESTARTS_AFTER_LOSS, Batcher
from molink_stage_worker.kept_stage import tokens_in_a_frame
from molink_stage_worker.kv_blocks import BlockAllocator
from tests.batcher_builders import TRACE, batcher, plan_of, result, shape, start


def test_a_long_prompt_goes_in_chunks_that_follow_each_other_without_waiting() -> None:
    head = batcher(micro_batches=3)
    head.add(start(1, prompt=40))
    plans = [plan_of(head) for _ in range(3)]
    assert [shape(plan) for plan in plans] == [
        [(1, 0, 16, Logits.NONE)],
        [(1, 16, 16, Logits.NONE)],
        [(1, 32, 8, Logits.LAST)],
    ]
    assert [len(plan.opens) for plan in plans] == [1, 0, 0]
    assert plans[1].token_ids == tuple(range(116, 132))
    assert head.next_step() is None


def test_a_decode_token_waits_for_the_one_before_it() -> None:
    head = batcher(micro_batches=4)
    head.add(start(1, prompt=3))
    first = plan_of(head)
    assert head.next_step() is None
    head.on_tokens(result(first, {}))
    second = plan_of(head)
    assert shape(second) == [(1, 3, 1, Logits.LAST)]
    assert second.token_ids == (7,)
    assert second.opens == ()


def test_a_finished_sequence_is_closed_by_the_next_step_and_its_blocks_serve_at_once() -> None:
    head = batcher(num_blocks=2)
    head.add(start(1, prompt=8))
    head.add(start(2, prompt=8))
    first = plan_of(head)
    assert [entry.sequence for entry in first.entries] == [1]
    head.on_tokens(result(first, {}, FinishReason.STOP))
    second = plan_of(head)
    assert tuple(second.closes) == (sequence_id(1),)
    assert second.entries[0].sequence == 2
    assert set(second.entries[0].new_blocks) == {0, 1}


def test_closes_travel_alone_only_when_nothing_else_is_under_way() -> None:
    head, indices = batcher(micro_batches=3), dict[int, int]()
    head.add(start(1, prompt=2))
    head.add(start(2, prompt=2))
    head.on_tokens(result(plan_of(head), indices))
    one, other = plan_of(head), plan_of(head)
    head.stop(sequence_id(2))
    assert head.next_step() is None
    head.on_tokens(result(one, indices, FinishReason.STOP))
    assert head.next_step() is None
    head.on_tokens(result(other, indices))
    last = plan_of(head)
    assert last.entries == ()
    assert set(last.closes) == {sequence_id(1), sequence_id(2)}
    head.on_tokens(StepTokens(pipeline=1, epoch=1, step=last.step))
    assert head.next_step() is None


def test_the_newest_gives_way_when_blocks_run_out_and_keeps_its_tokens() -> None:
    head, indices = batcher(num_blocks=4), dict[int, int]()
    head.add(start(1, prompt=7))
    head.add(start(2, prompt=3))
    for _ in range(3):
        head.on_tokens(result(plan_of(head), indices))
    assert head.report().preemptions == 1
    assert (head.report().running, head.report().waiting) == (1, 1)
    plan = plan_of(head)
    while not any(entry.sequence == 2 for entry in plan.entries):
        head.on_tokens(result(plan, indices, FinishReason.STOP if indices[1] == 6 else None))
        plan = plan_of(head)
    (opening,) = plan.opens
    assert opening.generated == (7,) * indices[2]
    assert plan.entries[-1].opens
    assert plan.entries[-1].count == 3 + indices[2]


def one_old_one_new(**limits: Any) -> tuple[Batcher, dict[int, int]]:
    """Both need a block for their next token, one is free, and it is the newer one's turn."""
    head, indices = batcher(num_blocks=4, step_tokens=7, **limits), dict[int, int]()
    head.add(start(1, prompt=8))
    head.add(start(2, prompt=4))
    head.on_tokens(result(plan_of(head), indices))
    second = plan_of(head)
    assert shape(second) == [(1, 7, 1, Logits.LAST), (2, 0, 4, Logits.LAST)]
    head.on_tokens(result(second, indices))
    return head, indices


def test_who_gives_way_is_taken_out_of_the_step_that_is_being_made() -> None:
    head, indices = one_old_one_new()
    head._residents.running[sequence_id(1)] = head._residents.running.pop(sequence_id(1))
    plan = plan_of(head)
    assert shape(plan) == [(1, 8, 1, Logits.LAST)]
    assert tuple(plan.closes) == (sequence_id(2),)
    assert indices == {1: 1, 2: 1}


def test_who_gave_way_starts_anew_only_when_its_last_step_is_back() -> None:
    head, indices = one_old_one_new(micro_batches=3)
    head._residents.running[sequence_id(1)] = head._residents.running.pop(sequence_id(1))
    newer = plan_of(head)
    assert shape(newer) == [(2, 4, 1, Logits.LAST)]
    assert head.next_step() is None, "the block that the older needs may still be written to"
    assert head.report().preemptions == 1
    head.on_tokens(result(newer, indices))
    older = plan_of(head)
    assert shape(older) == [(1, 8, 1, Logits.LAST)]
    head.stop(sequence_id(1))
    head.on_tokens(result(older, indices))
    again = plan_of(head)
    assert shape(again) == [(2, 0, 6, Logits.LAST)]
    assert again.opens[0].generated == (7, 7)


def test_what_a_lost_step_closed_is_closed_again() -> None:
    head = batcher()
    head.add(start(1, prompt=2))
    head.on_tokens(result(plan_of(head), {}, FinishReason.STOP))
    assert tuple(plan_of(head).closes) == (sequence_id(1),)
    head.on_all_lost()
    assert tuple(plan_of(head).closes) == (sequence_id(1),)


def test_a_sequence_is_refused_when_it_can_never_fit_and_when_the_queue_is_full() -> None:
    head = batcher(num_blocks=2, max_waiting=1)
    with pytest.raises(CapacityError, match="8 tokens"):
        head.add(start(1, prompt=9))
    head.add(start(2, prompt=8))
    with pytest.raises(CapacityError, match="waiting"):
        head.add(start(3, prompt=1))
    head.add(start(2, prompt=8))  # again: harmless
    assert head.sequences == (sequence_id(2),)


def test_a_sequence_that_outgrows_the_whole_memory_is_given_up() -> None:
    head, indices = batcher(num_blocks=2), dict[int, int]()
    head.add(start(1, prompt=8))
    head.on_tokens(result(plan_of(head), indices))
    plan = plan_of(head)
    assert (plan.entries, tuple(plan.closes)) == ((), (sequence_id(1),))
    assert head.take_failed() == (sequence_id(1),)
    assert head.take_failed() == ()


def test_a_later_result_means_that_the_steps_before_it_are_lost() -> None:
    head = batcher(micro_batches=2)
    head.add(start(1, prompt=5))
    first = plan_of(head)
    head.add(start(2, prompt=5))
    second = plan_of(head)
    head.on_tokens(result(second, {}))
    again = plan_of(head)
    assert (1, 0, 5, Logits.LAST) in shape(again)
    assert [opening.sequence for opening in again.opens] == [sequence_id(1)]
    assert not again.closes, "it keeps its blocks"
    assert again.entries[-1].new_blocks == first.entries[0].new_blocks
    head.on_tokens(result(first, {}))  # it comes after all: too late to count
    head.check_invariants()
    assert head.report().steps_under_way == 1


def test_a_token_that_is_missing_from_its_step_is_computed_again_but_not_for_ever() -> None:
    head = batcher()
    head.add(start(1, prompt=5))
    for _ in range(MAX_RESTARTS_AFTER_LOSS + 1):
        plan = plan_of(head)
        assert shape(plan) == [(1, 0, 5, Logits.LAST)]
        head.on_tokens(StepTokens(pipeline=1, epoch=1, step=plan.step))
    assert head.take_failed() == (sequence_id(1),)
    assert head.sequences == ()


def test_a_sequence_whose_logits_were_not_finite_is_gone() -> None:
    head = batcher()
    head.add(start(1, prompt=5))
    plan = plan_of(head)
    head.on_tokens(StepTokens(pipeline=1, epoch=1, step=plan.step, failed=(sequence_id(1),)))
    assert head.sequences == ()
    assert tuple(plan_of(head).closes) == (sequence_id(1),)
    assert head.take_failed() == ()


def test_a_result_of_a_stopped_sequence_does_not_reach_another_of_the_same_id() -> None:
    head = batcher(micro_batches=2)
    head.add(start(1, prompt=5))
    old = plan_of(head)
    head.stop(sequence_id(1))
    head.add(start(1, prompt=6))
    assert head.next_step() is None
    head.on_tokens(result(old, {}))
    closing = plan_of(head)
    assert tuple(closing.closes) == (sequence_id(1),)
    head.on_tokens(result(closing, {}))
    new = plan_of(head)
    head.on_tokens(result(new, {}))
    assert shape(plan_of(head)) == [(1, 6, 1, Logits.LAST)]


def test_nobody_comes_back_before_a_step_with_the_close_of_its_former_life_has() -> None:
    head = batcher(micro_batches=2)
    head.add(start(1, prompt=20))
    old = plan_of(head)
    head.on_tokens(result(old, {}))
    head.stop(sequence_id(1))
    head.add(start(1, prompt=40))
    closing = plan_of(head)
    assert (tuple(closing.closes), closing.entries) == ((sequence_id(1),), ())
    assert head.next_step() is None, "if the close is lost, a second chunk would go on where the former life stood"
    head.on_all_lost()
    closing = plan_of(head)
    assert (tuple(closing.closes), closing.entries) == ((sequence_id(1),), ())
    head.on_tokens(result(closing, {}))
    assert shape(plan_of(head)) == [(1, 0, 16, Logits.NONE)]


def test_a_step_of_one_class_says_nothing_about_those_of_the_other() -> None:
    head, indices = batcher(micro_batches=2, separate=True, chunk_tokens=4), dict[int, int]()
    head.add(start(1, prompt=3))
    head.on_tokens(result(plan_of(head), indices))
    head.add(start(2, prompt=8))
    decode, chunk = plan_of(head), plan_of(head)
    assert (decode.traffic, chunk.traffic) == (Traffic.DECODE, Traffic.BULK)
    later = plan_of(head)
    assert later.traffic is Traffic.BULK
    head.on_tokens(result(decode, indices))
    assert plan_of(head).traffic is Traffic.DECODE
    assert head.report().steps_under_way == 3, "the chunks are still under way"


def test_blocks_are_free_only_when_no_frame_that_names_them_can_be_on_its_way() -> None:
    head = batcher(separate=True, chunk_tokens=8, num_blocks=4)
    head.add(start(1, prompt=16))
    first, second = plan_of(head), plan_of(head)
    head.stop(sequence_id(1))
    assert head.report().free_blocks == 0
    head.on_tokens(result(first, {}))
    assert head.report().free_blocks == 0
    head.on_tokens(StepTokens(pipeline=1, epoch=1, step=second.step))
    assert head.report().free_blocks == 4


def test_a_sequence_whose_steps_were_lost_waits_until_they_cannot_arrive_any_more() -> None:
    head = batcher(separate=True, chunk_tokens=8)
    head.add(start(1, prompt=8))
    plan_of(head)
    head.on_all_lost()
    proof = plan_of(head)
    assert (proof.traffic, proof.entries) == (Traffic.BULK, ())
    assert head.next_step() is None
    head.on_tokens(StepTokens(pipeline=1, epoch=1, step=proof.step))
    again = plan_of(head)
    assert shape(again) == [(1, 0, 8, Logits.LAST)]
    assert again.entries[0].opens
    assert not again.closes


def test_trace_context_travels_with_the_steps_of_traced_sequences_only() -> None:
    head = batcher()
    head.add(start(1, prompt=2, trace=TRACE))
    head.add(start(2, prompt=2))
    assert plan_of(head).traces == {sequence_id(1): TRACE}


def test_a_growing_sequence_keeps_its_blocks_together() -> None:
    blocks = BlockAllocator(20)
    assert blocks.take(1, 1, expected=6) == (0,)
    assert blocks.take(2, 2, expected=5) == (6, 7)
    assert blocks.take(1, 2) == (1, 2)
    assert blocks.take(2, 1) == (8,)
    blocks.release(1)
    assert blocks.take(3, 6, expected=6) == (0, 1, 2, 3, 4, 5)


def test_a_wish_does_not_keep_others_out() -> None:
    blocks = BlockAllocator(6)
    blocks.take(1, 1, expected=6)
    assert len(blocks.take(2, 4)) == 4
    assert len(blocks.take(1, 1)) == 1
    blocks.check_invariants()
    with pytest.raises(CapacityError):
        blocks.take(1, 1)


def test_room_that_was_made_for_one_is_not_taken_by_who_made_it() -> None:
    head = batcher(num_blocks=14)
    for number, (tenant, num_blocks) in enumerate((("two", 5), ("two", 5), ("one", 1), ("one", 4)), start=1):
        head.add(start(number, prompt=4 * num_blocks).model_copy(update={"tenant": tenant}))
    plan_of(head)
    assert head.report().preemptions == 1
    assert (head.report().running, head.report().waiting) == (3, 1)


def test_a_step_leaves_room_in_a_message() -> None:
    assert tokens_in_a_frame(8 << 20, 8192 * 2, 256) == 256
    assert tokens_in_a_frame(1 << 20, 8192 * 2, 256) == 38
    assert tokens_in_a_frame(1024, 1 << 20, 256) == 1


def test_what_the_planner_hears_of_prompts() -> None:
    head = batcher(separate=True, chunk_tokens=16, max_running=2)
    for number, prompt in ((1, 40), (2, 10), (3, 100)):
        head.add(start(number, prompt))
    plan_of(head)
    demand = head.demand()
    assert demand.admitted_prompt_tokens == 50 - 16
    assert demand.longest_prompt_tokens == 40
    assert demand.prompt_tokens_waiting == 50 - 16 + 100, "the third has no place yet"
    assert demand.prompts_waiting == 3


@pytest.mark.parametrize("only_along", [False, True])
def test_a_long_prompt_that_has_time_gets_no_steps_of_its_own_while_others_decode(only_along: bool) -> None:
    head, indices = batcher(micro_batches=1, separate=True, chunk_tokens=8), dict[int, int]()
    head.plan = replace(head.plan, chunks_under_way=3, along_tokens=4, only_along=only_along)
    head.add(start(1, prompt=3))
    head.on_tokens(result(plan_of(head), indices))
    head.add(start(2, prompt=40))
    decode = plan_of(head)
    along = head.step_along()
    assert along is not None
    assert (decode.traffic, along.traffic) == (Traffic.DECODE, Traffic.BULK)
    assert shape(along) == [(2, 0, 4, Logits.NONE)]

    alone = head.next_step()
    assert (alone is None) is only_along

    head.on_tokens(result(decode, indices, FinishReason.STOP))
    assert shape(plan_of(head))[0][0] == 2, "nobody decodes any more"
