"""What the head does when steps are lost, stages replaced, entries refused: one by one."""

from __future__ import annotations

from molink_common.identity import sequence_id
from molink_common.messages import PipelinePolicy, StartSequence, StepTokens, TokenEvent
from molink_common.sampling import SamplingOptions
from molink_common.wire import Logits, Traffic
from molink_stage_worker.batch_plan import BatchLimits, BatchPlan, StepPlan
from molink_stage_worker.batching import Batcher
from molink_stage_worker.head_desk import HeadDesk
from molink_stage_worker.planning.planner import Planner

Shape = tuple[int, int, int, bool]


def batcher(*, separate: bool = False, micro_batches: int = 2, step_tokens: int = 16) -> Batcher:
    plan = BatchPlan(micro_batches=micro_batches, chunk_tokens=100, chunks_under_way=2, separate_prefill=separate)
    return Batcher(BatchLimits(num_blocks=40, block_size=4, step_tokens=step_tokens), plan)


def start(number: int, prompt: int, generated: int = 0) -> StartSequence:
    return StartSequence(
        pipeline=1,
        epoch=1,
        sequence=sequence_id(number),
        prompt=tuple(range(100, 100 + prompt)),
        generated=(7,) * generated,
        options=SamplingOptions(max_tokens=50),
    )


def plan_of(head: Batcher) -> StepPlan:
    plan = head.next_step()
    assert plan is not None
    head.check_invariants()
    return plan


def shape(plan: StepPlan) -> list[Shape]:
    return [(entry.sequence, entry.start, entry.count, entry.opens) for entry in plan.entries]


class Tail:
    """A token 7 for each entry that wants one."""

    def __init__(self, head: Batcher) -> None:
        self.head = head
        self.counts: dict[int, int] = {}

    def returns(self, plan: StepPlan, *, refused: tuple[int, ...] = ()) -> None:
        events = []
        for entry in plan.entries:
            if entry.logits is Logits.LAST and entry.sequence not in refused:
                index = self.counts.get(entry.sequence, 0)
                self.counts[entry.sequence] = index + 1
                events.append(TokenEvent(sequence=sequence_id(entry.sequence), index=index, token=7))
        names = tuple(sequence_id(number) for number in refused)
        self.head.on_tokens(StepTokens(pipeline=1, epoch=1, step=plan.step, events=tuple(events), refused=names))
        self.head.check_invariants()


def test_a_lost_token_is_computed_again_where_it_stood_with_the_same_blocks() -> None:
    head = batcher()
    tail = Tail(head)
    head.add(start(1, prompt=7))
    first = plan_of(head)
    tail.returns(first)
    plan_of(head)  # lost
    head.on_all_lost()
    proof = plan_of(head)
    assert (proof.entries, proof.closes) == ((), {})
    tail.returns(proof)
    again = plan_of(head)
    assert shape(again) == [(1, 7, 1, True)]
    assert again.entries[0].new_blocks[:2] == first.entries[0].new_blocks
    assert again.opens[0].generated == (7,)
    tail.returns(again)
    assert shape(plan_of(head)) == [(1, 8, 1, False)]
    assert (head.report().rewinds, head.report().recomputed, head.report().preemptions) == (1, 0, 0)


def test_a_lost_chunk_costs_the_chunks_behind_it_and_none_before() -> None:
    head = batcher(micro_batches=3)
    tail = Tail(head)
    head.add(start(1, prompt=40))
    first, _, third = plan_of(head), plan_of(head), plan_of(head)
    tail.returns(first)
    tail.returns(third, refused=(1,))  # the second is lost, so the third found a hole
    assert shape(plan_of(head)) == [(1, 16, 16, True)]
    assert (head.report().rewinds, head.report().recomputed) == (1, 0)


def test_what_a_stage_refuses_is_computed_anew() -> None:
    head = batcher()
    tail = Tail(head)
    head.add(start(1, prompt=40))
    tail.returns(plan_of(head))
    tail.returns(plan_of(head), refused=(1,))
    again = plan_of(head)
    assert shape(again) == [(1, 0, 16, True)]
    assert not again.closes
    assert (head.report().rewinds, head.report().recomputed) == (0, 1)


def test_where_engines_can_only_go_on_a_loss_costs_the_whole_sequence() -> None:
    head = batcher()
    head.can_rewind = False
    tail = Tail(head)
    head.add(start(1, prompt=20))
    tail.returns(plan_of(head))
    lost = plan_of(head)
    head.on_lost(lost.step)
    tail.returns(plan_of(head))
    assert shape(plan_of(head)) == [(1, 0, 16, True)]


def test_a_rewound_sequence_that_is_stopped_is_closed() -> None:
    head = batcher()
    tail = Tail(head)
    head.add(start(1, prompt=7))
    opened = plan_of(head)
    tail.returns(opened)
    plan_of(head)
    head.on_all_lost()
    assert head.stop(sequence_id(1))
    tail.returns(plan_of(head))
    closing = plan_of(head)
    assert closing.closes == {sequence_id(1): opened.step}
    tail.returns(closing)
    assert head.report().free_blocks == 40


def decoding(head: Batcher, tail: Tail, *prompts: int) -> None:
    for number, prompt in enumerate(prompts, start=1):
        head.add(start(number, prompt=prompt))
    while any(number not in tail.counts for number in range(1, len(prompts) + 1)):
        tail.returns(plan_of(head))


def answered(head: Batcher, tail: Tail) -> None:
    question = plan_of(head)
    assert question.entries == ()
    assert head.asks
    tail.returns(question)
    assert not head.asks


def test_a_replaced_stage_is_rebuilt_the_shortest_sequence_first() -> None:
    head = batcher(step_tokens=8)
    tail = Tail(head)
    head.add(start(1, prompt=12))
    head.add(start(2, prompt=3))
    while len(tail.counts) < 2:
        tail.returns(plan_of(head))
    lengths = {number: prompt + tail.counts[number] - 1 for number, prompt in ((1, 12), (2, 3))}
    plan_of(head)  # was under way
    head.on_new_epoch(2)
    answered(head, tail)
    steps = [plan_of(head), plan_of(head)]
    assert [(step.rebuild, step.traffic, step.token_ids, step.opens) for step in steps] == [
        (2, Traffic.BULK, (), ())
    ] * 2
    assert all(entry.logits is Logits.NONE for step in steps for entry in step.entries)
    short, long = lengths[2], lengths[1]
    assert shape(steps[0]) == [(2, 0, short, True), (1, 0, 8 - short, True)]
    assert shape(steps[1]) == [(1, 8 - short, long + short - 8, False)]
    tail.returns(steps[0])
    assert shape(plan_of(head)) == [(2, short, 1, True)], "its stream goes on before the other one is rebuilt"
    tail.returns(steps[1])
    assert shape(plan_of(head)) == [(1, long, 1, True)]
    assert head.report().rebuilt == 2


def test_blocks_behind_what_is_rebuilt_go_with_the_step_that_opens_the_sequence_again() -> None:
    head = batcher()
    tail = Tail(head)
    decoding(head, tail, 8)
    lost = plan_of(head)
    assert len(lost.entries[0].new_blocks) == 1, "some stages may never hear of this block"
    head.on_new_epoch(1)
    answered(head, tail)
    rebuild = plan_of(head)
    assert len(rebuild.entries[0].new_blocks) == 2
    tail.returns(rebuild)
    opening = plan_of(head)
    assert opening.entries[0].new_blocks == (*rebuild.entries[0].new_blocks, *lost.entries[0].new_blocks)
    assert shape(opening) == [(1, 8, 1, True)]


def test_who_is_to_be_rebuilt_counts_as_waiting() -> None:
    head = batcher(step_tokens=32)
    tail = Tail(head)
    decoding(head, tail, 8, 9)
    assert head.demand().prompts_waiting == 0
    head.on_new_epoch(1)
    answered(head, tail)
    assert head.demand().prompts_waiting == 2, "the planner lets chunks be large while many wait for few"
    plan_of(head)
    assert head.demand().prompts_waiting == 0


def test_what_the_journal_lacks_is_computed_anew_and_others_go_on() -> None:
    head = batcher(step_tokens=32)
    tail = Tail(head)
    decoding(head, tail, 8, 9)
    head.on_new_epoch(1)
    answered(head, tail)
    tail.returns(plan_of(head), refused=(1,))
    assert {(one, at) for one, at, *_ in shape(plan_of(head))} == {(1, 0), (2, 9)}


def test_a_second_loss_in_the_middle_of_a_rebuild() -> None:
    for stage, rebuilt in ((1, 16), (2, 8)):  # the same stage again, or another, which had what the first one got
        head = batcher(step_tokens=8)
        tail = Tail(head)
        decoding(head, tail, 16)
        head.on_new_epoch(1)
        answered(head, tail)
        tail.returns(plan_of(head))
        plan_of(head)
        head.on_new_epoch(stage)
        answered(head, tail)
        steps = []
        while (plan := plan_of(head)).rebuild is not None:
            steps.append(plan)
            tail.returns(plan)
        assert sum(entry.count for step in steps for entry in step.entries) == rebuilt
        assert shape(plan)[0][:2] == (1, rebuilt)


def test_a_new_epoch_without_a_stage_to_rebuild_computes_all_anew() -> None:
    head = batcher()
    tail = Tail(head)
    decoding(head, tail, 8)
    head.on_new_epoch(None)
    answered(head, tail)
    assert shape(plan_of(head)) == [(1, 0, 9, True)]


def test_a_new_epoch_frees_what_waited_for_frames_of_the_old_one() -> None:
    head = batcher()
    tail = Tail(head)
    decoding(head, tail, 8)
    plan_of(head)
    head.stop(sequence_id(1))
    assert head.report().free_blocks < 40
    head.on_new_epoch(1)
    assert head.report().free_blocks == 40
    question = plan_of(head)
    assert sequence_id(1) in question.closes
    assert head.next_step() is None, "one question at a time"
    head.on_all_lost()
    assert plan_of(head).closes == question.closes
    tail.returns(question)  # late, but an answer
    assert not head.asks


def test_questions_count_as_one_wait() -> None:
    planner = Planner(num_stages=2, token_bytes=4, step_tokens=16, policy=PipelinePolicy())
    desk = HeadDesk(batcher(), planner, token_bytes=4)
    desk.on_new_epoch(1)
    for now_s in (5.0, 6.0, 7.0):
        assert desk.asks
        assert len(desk.next_steps(now_s)) == 1
        desk.on_all_lost()
    assert desk.report(9.0).oldest_step_age_s == 4.0
    (question,) = desk.next_steps(9.0)
    desk.on_tokens(StepTokens(pipeline=1, epoch=2, step=question.step), 9.5)
    assert not desk.asks
    assert desk.report(10.0).oldest_step_age_s == 0.0
