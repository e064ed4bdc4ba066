"""Whose turn it is: the head's order of decode tokens and chunks of prompts."""

from __future__ import annotations

from molink_common.identity import sequence_id
from molink_common.sampling import SamplingOptions
from molink_common.wire import Logits, Traffic
from tests.batcher_builders import batcher, plan_of, result, shape, start


def test_decode_tokens_come_before_chunks_of_prompts() -> None:
    head, indices = batcher(), dict[int, int]()
    head.add(start(1, prompt=3))
    head.on_tokens(result(plan_of(head), indices))
    head.add(start(2, prompt=40))
    assert shape(plan_of(head)) == [(1, 3, 1, Logits.LAST), (2, 0, 15, Logits.NONE)]


def test_decode_sequences_are_shared_out_among_the_steps_under_way() -> None:
    head, indices = batcher(micro_batches=3), dict[int, int]()
    for number in range(7):
        head.add(start(number, prompt=2))
    head.on_tokens(result(plan_of(head), indices))
    plans = [plan_of(head) for _ in range(3)]
    assert [len(plan.entries) for plan in plans] == [3, 3, 1]
    assert {entry.sequence for plan in plans for entry in plan.entries} == set(range(7))


def test_who_was_served_longest_ago_comes_first() -> None:
    head, indices = batcher(step_tokens=2), dict[int, int]()
    for number in range(4):
        head.add(start(number, prompt=1))
    served = []
    for _ in range(8):
        plan = plan_of(head)
        served.append([entry.sequence for entry in plan.entries])
        head.on_tokens(result(plan, indices))
    assert all(indices[number] >= 3 for number in range(4)), served


def test_prompts_go_in_steps_of_their_own_and_decode_goes_first() -> None:
    head, indices = batcher(micro_batches=2, separate=True, chunk_tokens=8), dict[int, int]()
    for number in (1, 2):
        head.add(start(number, prompt=3))
    first = plan_of(head)
    assert (first.traffic, [entry.count for entry in first.entries]) == (Traffic.BULK, [3, 3])
    head.on_tokens(result(first, indices))
    head.add(start(3, prompt=20))
    plans = [plan_of(head) for _ in range(4)]
    assert [plan.traffic.name for plan in plans] == ["DECODE", "DECODE", "BULK", "BULK"]
    assert [shape(plan)[0][:3] for plan in plans] == [(1, 3, 1), (2, 3, 1), (3, 0, 8), (3, 8, 8)]
    assert head.next_step() is None


def test_a_chunk_gets_its_turn_however_much_there_is_to_decode() -> None:
    head, indices = batcher(micro_batches=1, separate=True, chunk_tokens=4), dict[int, int]()
    head.add(start(1, prompt=3))
    head.on_tokens(result(plan_of(head), indices))
    head.add(start(2, prompt=12))
    kinds = []
    for _ in range(6):
        plan = plan_of(head)
        kinds.append(plan.traffic.name)
        head.on_tokens(result(plan, indices))
    assert kinds == ["DECODE", "BULK", "DECODE", "BULK", "DECODE", "BULK"]


def test_few_prompts_open_in_one_step_if_they_are_long() -> None:
    head = batcher(opening_tokens=10)
    for number in range(3):
        head.add(start(number, prompt=5))
    assert [opening.sequence for opening in plan_of(head).opens] == [sequence_id(0), sequence_id(1)]


def test_few_sequences_open_in_one_step_if_their_grammars_are_long() -> None:
    head = batcher(opening_tokens=30)
    for number in range(3):
        plain = start(number, prompt=5)
        head.add(plain.model_copy(update={"options": SamplingOptions(max_tokens=50, grammar="x" * 40)}))
    assert [opening.sequence for opening in plan_of(head).opens] == [sequence_id(0), sequence_id(1)]


def test_who_has_waited_through_most_losses_goes_on_first() -> None:
    head = batcher()
    head.add(start(1, 4))
    head.add(start(2, 12).model_copy(update={"interruptions": 2}))
    head.add(start(3, 8).model_copy(update={"interruptions": 1}))
    assert shape(plan_of(head)) == [(2, 0, 12, Logits.LAST), (3, 0, 4, Logits.NONE)]
    head.on_new_epoch(None)
    asks = plan_of(head)
    head.on_tokens(result(asks, {}))
    counts: dict[int, int] = {}
    plan = plan_of(head)
    assert [entry.sequence for entry in plan.entries] == [2, 3], "still in this order"
    head.on_tokens(result(plan, counts))
    assert [entry.sequence for entry in plan_of(head).entries][-2:] == [3, 1], "the others follow"


def test_the_little_rest_of_a_prompt_goes_with_the_chunk_before_it() -> None:
    for prompt, counts in ((10, [10]), (11, [8, 3]), (18, [8, 10])):
        head, indices = batcher(separate=True, chunk_tokens=8), dict[int, int]()
        head.add(start(1, prompt=prompt))
        taken = []
        while sum(taken) < prompt:
            plan = plan_of(head)
            taken.append(plan.entries[0].count)
            head.on_tokens(result(plan, indices))
        assert taken == counts


def test_a_rest_that_the_step_has_no_room_for_stays() -> None:
    head = batcher(step_tokens=9, chunk_tokens=9)
    head.add(start(1, prompt=11))
    assert [entry.count for entry in plan_of(head).entries] == [9]
