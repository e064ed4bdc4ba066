"""Fair shares at the head, one by one: counters, turns, places, blocks, chunks."""

from __future__ import annotations

from molink_common.identity import sequence_id
from molink_common.messages import FinishReason, StartSequence, StepTokens, TokenEvent
from molink_common.sampling import SamplingOptions
from molink_common.wire import Logits
from molink_stage_worker.batch_plan import BatchLimits, BatchPlan, StepPlan
from molink_stage_worker.batch_sequence import Sequence
from molink_stage_worker.batching import Batcher
from molink_stage_worker.fair_queue import CREDIT, MOST_REMEMBERED, FairQueue, Shares


def start(number: int, tenant: str = "", *, prompt: int = 4, new: int = 50, priority: int = 0) -> StartSequence:
    return StartSequence(
        pipeline=1,
        epoch=1,
        sequence=sequence_id(number),
        prompt=tuple(range(1000 * number, 1000 * number + prompt)),
        options=SamplingOptions(max_tokens=new),
        tenant=tenant,
        priority=priority,
    )


def sequence(number: int, tenant: str = "", *, prompt: int = 4, priority: int = 0) -> Sequence:
    return Sequence.starting(start(number, tenant, prompt=prompt, priority=priority), number)


def batcher(
    *,
    micro_batches: int = 1,
    chunk_tokens: int = 10**6,
    num_blocks: int = 100,
    step_tokens: int = 64,
    max_running: int = 64,
) -> Batcher:
    plan = BatchPlan(micro_batches=micro_batches, chunk_tokens=chunk_tokens, chunks_under_way=2, separate_prefill=False)
    limits = BatchLimits(num_blocks=num_blocks, block_size=4, step_tokens=step_tokens, max_running=max_running)
    return Batcher(limits, plan)


def result(plan: StepPlan, indices: dict[int, int], finish: FinishReason | None = None) -> StepTokens:
    events = []
    for entry in plan.entries:
        if entry.logits is Logits.LAST:
            index = indices.get(entry.sequence, 0)
            indices[entry.sequence] = index + 1
            events.append(TokenEvent(sequence=sequence_id(entry.sequence), index=index, token=7, finish=finish))
    return StepTokens(pipeline=1, epoch=1, step=plan.step, events=tuple(events))


def served_by(head: Batcher) -> list[int]:
    """The numbers of the sequences in the next step, in their order there."""
    plan = head.next_step()
    assert plan is not None
    head.check_invariants()
    return [entry.sequence for entry in plan.entries]


def step(head: Batcher, indices: dict[int, int]) -> list[int]:
    plan = head.next_step()
    assert plan is not None
    head.check_invariants()
    head.on_tokens(result(plan, indices))
    return [entry.sequence for entry in plan.entries]


def test_prompt_tokens_count_once_and_tokens_of_answers_twice_each() -> None:
    shares, one = Shares(), sequence(1, "a", prompt=10)
    shares.enter("a")
    shares.charge(one, 0, 6)
    assert shares.served("a") == 6
    shares.charge(one, 6, 10)
    shares.charge(one, 10, 11)
    assert shares.served("a") == 12


def test_what_is_computed_again_costs_nothing_and_what_was_cached_neither() -> None:
    shares, one = Shares(), sequence(1, "a", prompt=10)
    shares.enter("a")
    shares.charge(one, 8, 10)
    shares.charge(one, 0, 9)
    assert shares.served("a") == 2
    shares.charge(one, 9, 12)
    assert shares.served("a") == 2 + 2 * 2


def test_who_comes_back_is_lifted_to_nearly_the_least_of_those_here_and_not_forgiven() -> None:
    shares = Shares()
    shares.enter("busy")
    shares.enter("busier")
    for tenant, tokens in (("busy", 5000), ("busier", 8000)):
        shares.charge(sequence(1, tenant, prompt=10_000), 0, tokens)
    shares.enter("new")
    assert shares.served("new") == 5000 - CREDIT
    shares.leave("busier")
    shares.enter("busier")
    assert shares.served("busier") == 8000


def test_who_has_nothing_waiting_cannot_save_up_service_by_staying() -> None:
    shares = Shares()
    shares.enter("light")
    shares.enter("busy")
    shares.charge(sequence(1, "busy", prompt=10_000), 0, 9000)
    shares.enter("light", has_waiting=True)
    assert shares.served("light") == 0
    shares.enter("light", has_waiting=False)
    assert shares.served("light") == 9000 - CREDIT


def test_of_other_tenants_prompts_none_is_computed_beside_a_newcomers() -> None:
    head, indices = batcher(step_tokens=32, max_running=10), dict[int, int]()
    for number in range(1, 5):
        head.add(start(number, "flood", prompt=30))
    step(head, indices)
    head.add(start(9, "polite", prompt=16))
    assert step(head, indices)[-1] == 9
    assert 9 in step(head, indices)


def test_an_empty_pool_begins_where_the_last_one_left() -> None:
    shares = Shares()
    shares.enter("a")
    shares.charge(sequence(1, "a", prompt=9000), 0, 9000)
    shares.leave("a")
    assert shares.num_present == 0
    shares.enter("b")
    assert shares.served("b") == 9000 - CREDIT


def test_tenants_that_are_gone_are_remembered_only_while_it_matters() -> None:
    shares = Shares()
    shares.enter("stays")
    for number in range(MOST_REMEMBERED + 100):
        shares.enter(f"t{number}")
        shares.charge(sequence(number + 1, f"t{number}", prompt=5), 0, 5)
        shares.leave(f"t{number}")
    assert len(shares._served) <= MOST_REMEMBERED + 1
    shares.charge(sequence(1, "stays", prompt=9000), 0, 9000)
    shares.enter("x")
    shares.leave("x")
    assert set(shares._served) == {"stays"}


def test_within_a_tenant_priority_comes_before_arrival() -> None:
    queue = FairQueue(Shares())
    for number, priority in ((1, 0), (2, 5), (3, -1), (4, 0)):
        queue.add(sequence(number, "a", priority=priority))
    order = []
    while (first := queue.first(())) is not None:
        order.append(first.number)
        queue.remove(first)
    assert order == [3, 1, 4, 2]
    assert len(queue) == 0


def test_of_tenants_served_alike_the_one_with_fewer_running_goes_first() -> None:
    queue = FairQueue(Shares())
    queue.add(sequence(1, "a"))
    queue.add(sequence(2, "b"))
    first = queue.first((sequence(3, "a"),))
    assert first is not None and first.tenant == "b"


def test_without_tenants_the_order_is_that_of_arrival() -> None:
    head = batcher(max_running=1)
    for number in (1, 2, 3):
        head.add(start(number))
    order = []
    for _ in range(3):
        plan = head.next_step()
        assert plan is not None
        order += [entry.sequence for entry in plan.entries]
        head.on_tokens(result(plan, {}, FinishReason.STOP))
    assert order == [1, 2, 3]
    assert head.report().preemptions == 0


def test_a_newcomer_gets_a_place_at_once_from_the_tenant_that_has_more_than_its_share() -> None:
    head, indices = batcher(max_running=4), dict[int, int]()
    for number in range(1, 7):
        head.add(start(number, "flood"))
    assert step(head, indices) == [1, 2, 3, 4]
    head.add(start(9, "polite"))
    assert step(head, indices)[-1] == 9
    assert head.report().preemptions == 1
    assert set(head.sequences) == {sequence_id(number) for number in (1, 2, 3, 4, 5, 6, 9)}
    # half of the places are its share: nobody gives way to a third one
    head.add(start(10, "polite"))
    head.add(start(11, "polite"))
    for _ in range(3):
        step(head, indices)
    assert head.report().preemptions == 2
    assert sorted(entry for entry in step(head, indices)) == [1, 2, 9, 10]


def test_who_gave_way_goes_on_with_its_tokens() -> None:
    head, indices = batcher(max_running=2), dict[int, int]()
    head.add(start(1, "flood"))
    head.add(start(2, "flood"))
    step(head, indices)
    head.add(start(3, "polite", new=1))
    assert step(head, indices) == [1, 3]
    plan = head.next_step()
    assert plan is not None
    head.on_tokens(result(plan, indices))
    assert head.stop(sequence_id(3))
    while 2 not in [entry.sequence for entry in plan.entries]:
        following = head.next_step()
        assert following is not None
        plan = following
        head.on_tokens(result(plan, indices))
    entry = next(entry for entry in plan.entries if entry.sequence == 2)
    assert (entry.opens, entry.start, entry.count) == (True, 0, 5)


def test_when_blocks_run_out_the_tenant_served_most_gives_way() -> None:
    head, indices = batcher(num_blocks=6, max_running=4), dict[int, int]()
    head.add(start(1, "flood", prompt=7))
    head.add(start(2, "flood", prompt=7))
    step(head, indices)
    head.add(start(3, "polite", prompt=3))
    seen = [step(head, indices) for _ in range(12)]
    assert all(3 in numbers for numbers in seen[1:] if 1 in numbers or 2 in numbers)
    assert head.report().preemptions >= 1
    assert indices[3] > 8


def test_a_newcomer_within_its_share_of_blocks_gets_them_from_who_has_more() -> None:
    head, indices = batcher(num_blocks=8, max_running=8), dict[int, int]()
    for number in (1, 2, 3):
        head.add(start(number, "flood", prompt=7))
    step(head, indices)
    assert head.report().running == 3
    head.add(start(4, "polite", prompt=11))
    seen = [step(head, indices) for _ in range(3)]
    assert any(4 in numbers for numbers in seen)
    assert head.report().preemptions >= 1


def test_the_prompt_of_the_tenant_served_least_goes_first() -> None:
    head, indices = batcher(step_tokens=8, max_running=10), dict[int, int]()
    for number in range(1, 5):
        head.add(start(number, "flood", prompt=30))
    for _ in range(3):
        step(head, indices)
    head.add(start(9, "polite", prompt=16))
    assert served_by(head) == [9]


def test_many_who_decode_make_room_for_the_first_token_of_another_tenant() -> None:
    head, indices = batcher(step_tokens=64, max_running=32, chunk_tokens=8), dict[int, int]()
    for number in range(1, 17):
        head.add(start(number, "flood", prompt=1))
    while len(step(head, indices)) < 16:
        pass
    head.add(start(20, "polite", prompt=16))
    assert len(step(head, indices)) == 2 + 1
    assert indices[20] == 1, "its prompt goes in one step, however small the plan's chunks are"
    assert len(step(head, indices)) >= 16, "the prompt is computed: all decode again"


def test_a_flood_alone_makes_room_for_nobody() -> None:
    head, indices = batcher(step_tokens=64, max_running=32, chunk_tokens=8), dict[int, int]()
    for number in range(1, 17):
        head.add(start(number, "flood", prompt=1))
    while len(step(head, indices)) < 16:
        pass
    head.add(start(20, "flood", prompt=16))
    assert len(step(head, indices)) == 16 + 1
