"""The head's batcher in front of a pipeline that exists only as a list: whatever happens, in whatever order."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from molink_common.errors import CapacityError
from molink_common.identity import sequence_id
from molink_common.wire import Traffic
from molink_stage_worker.batch_plan import BatchLimits, BatchPlan, StepPlan
from molink_stage_worker.batching import Batcher
from molink_stage_worker.kv_blocks import BlockAllocator
from tests.batcher_stages import Stages, make_start, token_of

PLANS = st.builds(
    BatchPlan,
    micro_batches=st.integers(1, 3),
    chunk_tokens=st.integers(1, 9),
    chunks_under_way=st.integers(1, 3),
    separate_prefill=st.booleans(),
    riding_tokens=st.integers(0, 5),
    draft_price=st.sampled_from((None, 0.0, 0.2)),
)


class BatchingMachine(RuleBasedStateMachine):
    """Adds, stops, plans that change, classes that overtake each other, results late, results lost, frames that
    arrive after they were given up; blocks are scarce, so preemption is common."""

    limits = BatchLimits(num_blocks=10, block_size=3, step_tokens=7, max_running=4, max_waiting=20)

    def __init__(self) -> None:
        super().__init__()
        plan = BatchPlan(micro_batches=3, chunk_tokens=7, chunks_under_way=2, separate_prefill=False)
        self.batcher = Batcher(self.limits, plan)
        self.stages = self.make_stages()
        self.under_way: dict[Traffic, deque[StepPlan]] = {traffic: deque() for traffic in Traffic}
        self.given_up: set[int] = set()
        """Steps that the head takes for lost, though they will arrive."""
        self.live: dict[str, tuple[int, int]] = {}
        self.heard: dict[str, int] = {}
        self.added = 0

    @rule(
        prompt=st.integers(1, 22),
        new=st.integers(1, 14),
        given=st.integers(0, 3),
        tenant=st.sampled_from(("a", "b", "c")),
        priority=st.integers(-1, 1),
    )
    def add(self, prompt: int, new: int, given: int, tenant: str, priority: int) -> None:
        if len(self.live) >= 15:
            return
        self.added += 1
        given = min(given, new - 1)
        generated = tuple(token_of(self.added, index) for index in range(given))
        start = make_start(self.added, prompt, new, generated, tenant, priority)
        start = start.model_copy(update={"prompt": self.make_prompt(prompt)})
        try:
            self.batcher.add(start)
        except CapacityError:
            assert prompt + given > 30
        else:
            self.live[start.sequence] = (prompt, new)
            self.heard[start.sequence] = given

    def make_stages(self) -> Stages:
        return Stages(self.limits)

    def make_prompt(self, length: int) -> tuple[int, ...]:
        return tuple(range(length))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100))
    def stop(self, which: int) -> None:
        name = list(self.live)[which % len(self.live)]
        assert self.batcher.stop(name)
        assert not self.batcher.stop(name)
        del self.live[name]

    @rule(plan=PLANS)
    def plan_anew(self, plan: BatchPlan) -> None:
        self.batcher.plan = plan

    @rule()
    def step(self) -> None:
        counts = {traffic: self.alive(traffic) for traffic in Traffic}
        plan = self.batcher.next_step()
        self.give_up()
        if plan is None:
            return
        if plan.entries:
            most = self.batcher.plan.micro_batches
            if plan.traffic is Traffic.BULK:
                assert self.batcher.plan.separate_prefill
                most = self.batcher.plan.chunks_under_way
            assert counts[plan.traffic] < most
        assert sum(entry.count for entry in plan.entries) == len(plan.token_ids) <= self.limits.step_tokens
        assert len({entry.sequence for entry in plan.entries}) == len(plan.entries)
        self.under_way[plan.traffic].append(plan)

    @rule(traffic=st.sampled_from(Traffic))
    def result(self, traffic: Traffic) -> None:
        if not self.under_way[traffic]:
            return
        plan = self.under_way[traffic].popleft()
        tokens = self.stages.run(plan)
        for event in tokens.events:
            if event.sequence in self.live and event.index == self.heard[event.sequence]:
                assert event.token == token_of(int(event.sequence, 16), event.index)
                if plan.step in self.given_up:
                    continue  # the scheduler hears of it; here only the head's own books are of interest
                self.heard[event.sequence] += 1
                if event.finish is not None:
                    del self.live[event.sequence]
        self.batcher.on_tokens(tokens)
        self.give_up()

    @rule(arrive=st.lists(st.booleans(), max_size=8))
    def all_is_lost(self, arrive: list[bool]) -> None:
        """The head gives everything up. Some frames never arrive; others do, sooner or later."""
        for traffic in Traffic:
            kept: deque[StepPlan] = deque()
            for index, plan in enumerate(self.under_way[traffic]):
                if index < len(arrive) and arrive[index]:
                    self.given_up.add(plan.step)
                    kept.append(plan)
                else:
                    self.stages.lose(plan)
            self.under_way[traffic] = kept
        self.batcher.on_all_lost()
        self.give_up()

    def alive(self, traffic: Traffic) -> int:
        return sum(plan.step not in self.given_up for plan in self.under_way[traffic])

    def give_up(self) -> None:
        for name in self.batcher.take_failed():
            self.live.pop(name, None)

    @invariant()
    def books_agree(self) -> None:
        self.batcher.check_invariants()
        assert set(self.batcher.sequences) == set(self.live)
        report = self.batcher.report()
        assert report.running + report.waiting == len(self.live)
        assert report.steps_under_way == sum(self.alive(traffic) for traffic in Traffic)

    def teardown(self) -> None:
        """From wherever it stands, everything ends and nothing is left."""
        for _ in range(3000):
            self.step()
            if any(self.under_way.values()):
                for traffic in Traffic:
                    self.result(traffic)
            elif not self.live:
                break
        self.step()  # what the last result made room for
        for traffic in Traffic:
            self.result(traffic)
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
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(1, 20),
    st.booleans(),
    st.booleans(),
    st.sampled_from((0, 2, 15)),
    st.sampled_from((None, 0.0, 0.2)),
)
def test_without_trouble_every_sequence_gets_all_its_tokens(
    wishes: list[tuple[int, int]],
    most: int,
    chunk: int,
    separate: bool,
    only_along: bool,
    riding: int,
    price: float | None,
) -> None:
    limits = BatchLimits(num_blocks=64, block_size=4, step_tokens=16, max_running=8)
    plan = BatchPlan(
        micro_batches=most, chunk_tokens=chunk, chunks_under_way=3, separate_prefill=separate, along_tokens=chunk,
        only_along=only_along, riding_tokens=riding, draft_price=price,
    )  # fmt: skip
    batcher, stages = Batcher(limits, plan), Stages(limits)
    for number, (prompt, new) in enumerate(wishes):
        batcher.add(make_start(number, prompt, new))
    under_way: dict[Traffic, deque[StepPlan]] = {traffic: deque() for traffic in Traffic}
    got: dict[str, list[int]] = {}
    for _ in range(sum(prompt + new for prompt, new in wishes) * 4 + 10):
        step = batcher.next_step()
        if step is not None:
            under_way[step.traffic].append(step)
        if step is not None and (along := batcher.step_along()) is not None:
            under_way[along.traffic].append(along)
        if step is None:
            # decode overtakes whatever it can
            queue = under_way[Traffic.DECODE] or under_way[Traffic.BULK]
            if not queue:
                break
            tokens = stages.run(queue.popleft())
            for event in tokens.events:
                got.setdefault(event.sequence, []).append(event.token)
            batcher.on_tokens(tokens)
        batcher.check_invariants()
    for number, (_, new) in enumerate(wishes):
        assert got[sequence_id(number)] == [token_of(number, index) for index in range(new)]
    assert batcher.sequences == ()
    assert not stages.holes, "a step overtook one that it builds on"


def test_guesses_save_steps() -> None:
    steps = {}
    for price in (None, 0.0):
        limits = BatchLimits(num_blocks=64, block_size=4, step_tokens=16, max_running=8)
        plan = BatchPlan(
            micro_batches=1, chunk_tokens=16, chunks_under_way=1, separate_prefill=False, draft_price=price
        )
        batcher, stages = Batcher(limits, plan), Stages(limits)
        batcher.add(make_start(1, 3, 60))
        steps[price] = 0
        while (step := batcher.next_step()) is not None:
            batcher.on_tokens(stages.run(step))
            batcher.check_invariants()
            steps[price] += 1
        assert stages.verified[True] == batcher.report().accepted_tokens
        assert stages.verified[True] + stages.verified[False] <= batcher.report().drafted_tokens
    assert stages.verified[True] > 20
    assert steps[0.0] == steps[None] - stages.verified[True]
