"""Sequences that begin with the KV blocks of others, through traffic, losses, epochs: nothing is ever read wrongly."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from molink_common.errors import CapacityError
from molink_common.wire import Entry
from molink_stage_worker.batch_plan import BatchLimits, StepPlan
from molink_stage_worker.kv_blocks import BlockAllocator
from molink_stage_worker.prefix_cache import ChainKeys
from molink_stage_worker.stage_step import StageStep
from tests.batcher_stages import Stages
from tests.integration.counting_engine import BLOCK, VOCABULARY
from tests.property.test_worker_batching import BatchingMachine
from tests.property.test_worker_rebuilds import NUM_BLOCKS, NUM_STAGES, RebuildMachine, Stage, storm

SECRET = b"secret"


class SharingStages(Stages):
    """Of each position of a block it is known which text it belongs to. Nobody writes where another reads."""

    def __init__(self, limits: BatchLimits) -> None:
        super().__init__(limits)
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}
        """By block and place in it, the text up to there."""
        self.read: dict[int, list[int]] = {}
        """By sequence, the tokens that are computed."""
        self.taken_over = 0

    def check_opening(self, entry: Entry) -> None:
        if entry.start > self.lengths.get(entry.sequence, 0):
            assert entry.start % self.limits.block_size == 0
            self.taken_over += 1
        self.read[entry.sequence] = self.texts[entry.sequence][: entry.start]

    def fill(self, entry: Entry, tokens: tuple[int, ...]) -> None:
        size, table = self.limits.block_size, self.tables[entry.sequence]
        text = self.read[entry.sequence]
        del text[entry.start :]
        text.extend(tokens)
        assert len(tokens) == entry.count
        others = {
            block
            for name, blocks in self.tables.items()
            if name != entry.sequence and name not in self.stale
            for block in blocks
        }
        for at in range(entry.start, entry.start + entry.count):
            block = table[at // size]
            assert block not in others, "it writes to a block of another"
            self.memory[block, at % size] = tuple(text[: at + 1])
        for at in range(len(text)):
            assert self.memory[table[at // size], at % size] == tuple(text[: at + 1]), "it reads another text"

    def check_blocks(self) -> None:
        """Two sequences may have a block."""


class SharingMachine(BatchingMachine):
    """As its base, where many prompts begin alike."""

    limits = BatchLimits(
        num_blocks=12, block_size=3, step_tokens=7, max_running=4, max_waiting=20, prefix_secret=SECRET
    )

    def make_stages(self) -> Stages:
        return SharingStages(self.limits)

    def make_prompt(self, length: int) -> tuple[int, ...]:
        family = self.added % 3
        return tuple(at if at < 6 else family * 100 + at for at in range(length))


TestSharing = SharingMachine.TestCase
TestSharing.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


class SharingRebuildMachine(RebuildMachine):
    """As its base, where prompts begin alike; and now and then all stages are lost."""

    limits = BatchLimits(num_blocks=NUM_BLOCKS, block_size=BLOCK, step_tokens=8, max_running=4, prefix_secret=SECRET)

    def make_prompt(self, length: int) -> tuple[int, ...]:
        family = self.added % 2
        return tuple((at if at < 5 else family * 11 + at * 3) % VOCABULARY for at in range(length))

    def as_step(self, plan: StepPlan) -> StageStep:
        written: set[int] = set()
        for entry in plan.entries:
            table = self.batcher._residents._blocks.table(entry.sequence)
            touched = table[entry.start // BLOCK : (entry.start + entry.count - 1) // BLOCK + 1]
            assert written.isdisjoint(touched), "two write to a block in one step"
            written.update(touched)
        return super().as_step(plan)

    @rule()
    def replace_all(self) -> None:
        self.epoch += 1
        self.stages = [Stage(index, 1 << 20) for index in range(NUM_STAGES)]
        for stage in self.stages:
            stage.join(self.epoch)
        self.batcher.on_new_epoch(None)


TestSharingRebuilds = SharingRebuildMachine.TestCase
TestSharingRebuilds.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_a_storm_of_losses_changes_no_text_that_is_shared(seed: int) -> None:
    dice = random.Random(seed)
    machine = SharingRebuildMachine()
    storm(machine, dice)
    machine = SharingRebuildMachine()
    for _ in range(4):
        for _ in range(3):
            machine.add(dice.randint(1, 14), dice.randint(1, 10))
        machine.steps(dice.randint(1, 12))
        machine.replace_all() if dice.random() < 0.5 else machine.replace(1, False, True)
    machine.teardown()


def test_most_of_what_is_alike_is_computed_once() -> None:
    machine = SharingMachine()
    for _ in range(9):
        machine.add(20, 2, 0, "", 0)
    machine.teardown()
    assert isinstance(machine.stages, SharingStages)
    assert machine.stages.taken_over >= 5
    report = machine.batcher.report()
    assert report.prefix_hits_tokens > report.prefix_queries_tokens // 8


MOVES = st.lists(
    st.tuples(
        st.sampled_from(("begin", "grow", "release", "forget", "forget_all")),
        st.integers(0, 5),
        st.lists(st.integers(0, 1), min_size=1, max_size=6),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(MOVES, st.integers(4, 16))
def test_the_allocator_gives_what_it_said_and_shares_only_what_is_the_same(
    moves: list[tuple[str, int, list[int]]], num_blocks: int
) -> None:
    """Texts of a few blocks, two tokens: chains meet and part all the time."""
    allocator, chain = BlockAllocator(num_blocks), ChainKeys(SECRET, 1)
    texts: dict[int, tuple[int, ...]] = {}
    holds: dict[int, tuple[int, ...]] = {}
    """By block, the text up to its end."""
    for move, sequence, tokens in moves:
        if move == "begin" and sequence not in texts:
            keys: list[bytes] = []
            chain.extend(keys, len(tokens), "", tokens)
            known, in_use = allocator.known(keys)
            if allocator.num_free < len(tokens) - in_use:
                continue
            allocator.share(sequence, keys[:known])
            for at in range(known):
                assert holds[allocator.table(sequence)[at]] == tuple(tokens[: at + 1])
            try:
                allocator.take(sequence, len(tokens) - known, expected=len(tokens) + 2)
            except CapacityError as error:
                raise AssertionError("it was said to fit") from error
            texts[sequence] = tuple(tokens)
            for at, block in enumerate(allocator.table(sequence)[known:], start=known):
                assert all(block not in allocator.table(other) for other in texts if other != sequence)
                holds[block] = tuple(tokens[: at + 1])
            allocator.publish(sequence, keys, known)
        elif move == "grow" and sequence in texts and allocator.num_free:
            (block,) = allocator.take(sequence, 1)
            assert all(block not in allocator.table(other) for other in texts if other != sequence)
            holds.pop(block, None)
        elif move == "release":
            allocator.release(sequence)
            texts.pop(sequence, None)
        elif move == "forget":
            allocator.forget(sequence)
        elif move == "forget_all":
            allocator.forget_all()
        allocator.check_invariants()
        used = {block for other in texts for block in allocator.table(other)}
        assert allocator.num_free == num_blocks - len(used)
