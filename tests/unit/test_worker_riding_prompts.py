"""Short prompts in decode steps, and those that go apart."""

from __future__ import annotations

from dataclasses import replace

from molink_common.wire import Logits, Traffic
from tests.batcher_builders import batcher, plan_of, result, shape, start


def test_a_short_prompt_rides_in_decode_steps_and_a_long_one_goes_apart() -> None:
    head, indices = batcher(micro_batches=2, separate=True, chunk_tokens=8, step_tokens=8), dict[int, int]()
    head.plan = replace(head.plan, riding_tokens=4)
    head.add(start(1, prompt=3))
    head.on_tokens(result(plan_of(head), indices))
    head.add(start(2, prompt=20))
    head.add(start(3, prompt=6))
    decode, chunk = plan_of(head), plan_of(head)
    assert (decode.traffic, shape(decode)) == (Traffic.DECODE, [(1, 3, 1, Logits.LAST), (3, 0, 4, Logits.NONE)])
    assert (chunk.traffic, shape(chunk)) == (Traffic.BULK, [(2, 0, 8, Logits.NONE)])
    head.on_tokens(result(decode, indices))
    assert shape(plan_of(head)) == [(1, 4, 1, Logits.LAST), (3, 4, 2, Logits.LAST)]


def test_what_is_to_ride_goes_apart_where_nobody_decodes() -> None:
    head = batcher(micro_batches=2, separate=True, chunk_tokens=8)
    head.plan = replace(head.plan, riding_tokens=4)
    head.add(start(1, prompt=3))
    assert plan_of(head).traffic is Traffic.BULK


def test_as_many_ride_as_fit_into_two_cycles() -> None:
    head, indices = batcher(micro_batches=1, separate=True, chunk_tokens=8), dict[int, int]()
    head.plan = replace(head.plan, riding_tokens=2)
    head.add(start(1, prompt=3))
    head.on_tokens(result(plan_of(head), indices))
    decode = plan_of(head)
    for number in (2, 3, 4):
        head.add(start(number, prompt=2))
    assert [one[0] for one in shape(plan_of(head))] == [4]
    assert head.next_step() is None, "the others wait for the next decode step"
    head.on_tokens(result(decode, indices))
    assert [one[0] for one in shape(plan_of(head))] == [1, 2]


def test_those_who_ride_find_room_in_a_full_step() -> None:
    head, indices = batcher(micro_batches=1, separate=True, chunk_tokens=8, step_tokens=4), dict[int, int]()
    for number in range(1, 6):
        head.add(start(number, prompt=1))
        head.on_tokens(result(plan_of(head), indices))
    head.plan = replace(head.plan, riding_tokens=2)
    head.add(start(6, prompt=2))
    assert [one[0] for one in shape(plan_of(head))] == [1, 2, 6]
