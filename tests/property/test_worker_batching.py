"""The head's batcher in front of a pipeline that exists only as a list: whatever happens, in whatever order."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from molink_common.errors import CapacityError
from molink_common.identity import sequence_id
from molink_common.messages import FinishReason, StartSequence, StepTokens, TokenEvent
from molink_common.sampling import SamplingOptions
from molink_common.wire import Logits
from molink_stage_worker.batch_plan import BatchLimits, StepPlan
from molink_stage_worker.batching import Batcher
from molink_stage_worker.kv_blocks import BlockAllocator


def make_start(number: int, prompt: int, new: int, generated: tuple[int, ...] = ()) -> StartSequence:
    return StartSequence(
        pipeline=1,
        epoch=1,
        sequence=sequence_id(number),
        prompt=tuple(range(prompt)),
        generated=generated,
        options=SamplingOptions(max_tokens=new),
    )


def token_of(number: int, index: int) -> int:
    return (number * 31 + index * 7) % 1000


class Stages:
    """What every stage and the tail would know. Asserts what an engine relies on."""

    def __init__(self, limits: BatchLimits) -> None:
        self.limits = limits
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self.generated: dict[str, int] = {}
        self.most: dict[str, int] = {}

    def run(self, plan: StepPlan) -> StepTokens:
        for name in plan.closes:
            self.tables.pop(int(name, 16), None)
            self.lengths.pop(int(name, 16), None)
            self.generated.pop(name, None)
        for opening in plan.opens:
            self.generated[opening.sequence] = len(opening.generated)
            self.most[opening.sequence] = opening.options.max_tokens
        events = []
        for entry in plan.entries:
            if entry.opens:
                self.tables[entry.sequence] = []
                self.lengths[entry.sequence] = 0
            assert entry.start == self.lengths[entry.sequence], "positions are not contiguous"
            self.tables[entry.sequence].extend(entry.new_blocks)
            self.lengths[entry.sequence] += entry.count
            assert len(self.tables[entry.sequence]) * self.limits.block_size >= self.lengths[entry.sequence]
            if entry.logits is Logits.LAST:
                name = sequence_id(entry.sequence)
                index = self.generated[name]
                self.generated[name] += 1
                finish = FinishReason.LENGTH if index + 1 == self.most[name] else None
                events.append(
                    TokenEvent(sequence=name, index=index, token=token_of(entry.sequence, index), finish=finish)
                )
        owned = [block for table in self.tables.values() for block in table]
        assert len(owned) == len(set(owned)), "two sequences in one block"
        return StepTokens(pipeline=1, epoch=1, step=plan.step, events=tuple(events))


class BatchingMachine(RuleBasedStateMachine):
    """Adds, stops, results late, results lost; blocks are scarce, so preemption is common."""

    limits = BatchLimits(
        num_blocks=10, block_size=3, step_tokens=7, max_running=4, max_waiting=20, max_steps_under_way=3
    )

    def __init__(self) -> None:
        super().__init__()
        self.batcher = Batcher(self.limits)
        self.stages = Stages(self.limits)
        self.under_way: deque[StepPlan] = deque()
        self.live: dict[str, tuple[int, int]] = {}
        self.heard: dict[str, int] = {}
        self.added = 0

    @rule(prompt=st.integers(1, 22), new=st.integers(1, 8), given=st.integers(0, 3))
    def add(self, prompt: int, new: int, given: int) -> None:
        if len(self.live) >= 15:
            return
        self.added += 1
        given = min(given, new - 1)
        start = make_start(self.added, prompt, new, tuple(token_of(self.added, index) for index in range(given)))
        try:
            self.batcher.add(start)
        except CapacityError:
            assert prompt + given > 30
        else:
            self.live[start.sequence] = (prompt, new)
            self.heard[start.sequence] = given

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100))
    def stop(self, which: int) -> None:
        name = list(self.live)[which % len(self.live)]
        assert self.batcher.stop(name)
        assert not self.batcher.stop(name)
        del self.live[name]

    @rule()
    def step(self) -> None:
        before = len(self.under_way)
        plan = self.batcher.next_step()
        self.give_up()
        if plan is None:
            return
        assert before < self.limits.max_steps_under_way
        assert sum(entry.count for entry in plan.entries) == len(plan.token_ids) <= self.limits.step_tokens
        assert len({entry.sequence for entry in plan.entries}) == len(plan.entries)
        assert plan.entries or plan.closes
        self.under_way.append(plan)

    @precondition(lambda self: self.under_way)
    @rule()
    def result(self) -> None:
        tokens = self.stages.run(self.under_way.popleft())
        for event in tokens.events:
            if event.sequence in self.live and event.index == self.heard[event.sequence]:
                self.heard[event.sequence] += 1
                if event.finish is not None:
                    del self.live[event.sequence]
        self.batcher.on_tokens(tokens)
        self.give_up()

    @precondition(lambda self: self.under_way)
    @rule(arrived=st.integers(0, 3))
    def all_is_lost(self, arrived: int) -> None:
        """Some frames reached the stages and their tokens were not heard of; the others were lost before."""
        for plan in list(self.under_way)[:arrived]:
            self.stages.run(plan)
        self.under_way.clear()
        self.batcher.on_all_lost()
        self.give_up()

    def give_up(self) -> None:
        for name in self.batcher.take_failed():
            self.live.pop(name, None)

    @invariant()
    def books_agree(self) -> None:
        self.batcher.check_invariants()
        assert set(self.batcher.sequences) == set(self.live)
        report = self.batcher.report()
        assert report.running + report.waiting == len(self.live)
        assert report.steps_under_way == len(self.under_way)

    def teardown(self) -> None:
        """From wherever it stands, everything ends and nothing is left."""
        for _ in range(3000):
            self.step()
            if self.under_way:
                self.result()
            elif not self.live:
                break
        self.books_agree()
        assert not self.live, "a sequence was starved"
        assert self.batcher.report().free_blocks == self.limits.num_blocks
        assert self.batcher.next_step() is None
        assert not self.stages.tables, "a stage still holds a sequence"


TestBatching = BatchingMachine.TestCase
TestBatching.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 12)), max_size=60),
    st.integers(1, 20),
)
def test_the_allocator_never_loses_or_doubles_a_block(moves: list[tuple[int, int, int]], num_blocks: int) -> None:
    allocator = BlockAllocator(num_blocks)
    held: dict[int, set[int]] = {}
    for sequence, count, expected in moves:
        if count == 0:
            allocator.release(sequence)
            held.pop(sequence, None)
        else:
            free = num_blocks - sum(map(len, held.values()))
            if count > free:
                with pytest.raises(CapacityError):
                    allocator.take(sequence, count, expected=expected)
            else:
                taken = allocator.take(sequence, count, expected=expected)
                assert len(taken) == count
                assert not set(taken) & set().union(*held.values())
                held.setdefault(sequence, set()).update(taken)
        allocator.check_invariants()
        assert allocator.num_free == num_blocks - sum(map(len, held.values()))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=30), st.integers(1, 4))
def test_without_trouble_every_sequence_gets_all_its_tokens(wishes: list[tuple[int, int]], under_way: int) -> None:
    limits = BatchLimits(num_blocks=64, block_size=4, step_tokens=16, max_running=8, max_steps_under_way=under_way)
    batcher, stages = Batcher(limits), Stages(limits)
    for number, (prompt, new) in enumerate(wishes):
        batcher.add(make_start(number, prompt, new))
    pending: deque[StepTokens] = deque()
    got: dict[str, list[int]] = {}
    for _ in range(sum(prompt + new for prompt, new in wishes) * 3 + 10):
        if (plan := batcher.next_step()) is not None:
            pending.append(stages.run(plan))
        elif pending:
            tokens = pending.popleft()
            for event in tokens.events:
                got.setdefault(event.sequence, []).append(event.token)
            batcher.on_tokens(tokens)
        batcher.check_invariants()
    for number, (_, new) in enumerate(wishes):
        assert got[sequence_id(number)] == [token_of(number, index) for index in range(new)]
    assert batcher.sequences == ()
