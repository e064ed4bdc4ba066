"""Three stages that compute out of their KV blocks, through losses, late frames, and stages that are replaced.

The engine asserts that every position it looks back on was filled by this sequence, and a token is the sum of all
before it: whatever is lost or replaced, the text of every sequence is the undisturbed one.
"""

from __future__ import annotations

import random
from collections import deque
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from molink_common.identity import sequence_id
from molink_common.messages import Dtype, LinkCodec, StartSequence, StepTokens
from molink_common.sampling import SamplingOptions
from molink_common.wire import StepFrame, Traffic, decode_extra, decode_frame
from molink_stage_worker.batch_plan import BatchLimits, BatchPlan, StepPlan
from molink_stage_worker.batching import Batcher
from molink_stage_worker.codec_choice import CodecChoice
from molink_stage_worker.compute import StageCompute
from molink_stage_worker.engine.interface import StageSpec
from molink_stage_worker.fence import Drop, Fence
from molink_stage_worker.journal import Journal
from molink_stage_worker.sampling import Sampler
from molink_stage_worker.stage_step import StageResult, StageStep, emptied
from tests.integration.counting_engine import BLOCK, HIDDEN, LAYERS, VOCABULARY, CountingEngine, expected_text

NUM_STAGES = 3
NUM_BLOCKS = 12
_SMALL_JOURNAL_BYTES = 2500
"""Holds a sequence or two."""


class Stage:
    """What outlives an epoch, and what does not."""

    def __init__(self, index: int, journal_bytes: int) -> None:
        cuts = [LAYERS * stage // NUM_STAGES for stage in range(NUM_STAGES + 1)]
        self.index = index
        self.engine = CountingEngine(
            StageSpec(
                checkpoint=Path("/nowhere"),
                first_layer=cuts[index],
                last_layer=cuts[index + 1],
                num_layers=LAYERS,
                dtype=Dtype.FLOAT32,
                device="cpu",
                num_blocks=NUM_BLOCKS,
                block_size=BLOCK,
            ),
            loses_closes=True,
        )
        is_tail = index == NUM_STAGES - 1
        sampler = Sampler(eos_token_ids=(), vocabulary_size=VOCABULARY) if is_tail else None
        self.compute = StageCompute(self.engine, sampler, codecs=CodecChoice(LinkCodec.LOSSLESS))
        self.journal = None if is_tail else Journal(journal_bytes, BLOCK)
        self.compute.take_place(index, self.journal)
        self.join(1)

    def join(self, epoch: int) -> None:
        self.fence = Fence(pipeline=1, epoch=epoch, block_size=BLOCK)
        self.compute.take_place(self.index, self.journal)

    def take(self, data: bytes | bytearray) -> StageResult | None:
        """As the inlet and the runner do."""
        frame = decode_frame(data)
        extra = decode_extra(frame.extra)
        if self.fence.check(frame) is not None:
            return None
        step = StageStep(frame=frame, extra=extra, ready_ns=0)
        if self.fence.enter(frame.step, frame.entries, extra.closes) is Drop.HOLE:
            step = emptied(step)
        return self.run(step)

    def run(self, step: StageStep) -> StageResult:
        (result,) = self.compute.run([step])
        if result.refused:
            self.fence.refuse(result.refused, Drop.REFUSED)
        if self.journal is not None:
            self.journal.check_invariants()
        return result


class RebuildMachine(RuleBasedStateMachine):
    """A head in front of three stages. Frames wait on links, are lost, or come after the head gave them up."""

    limits = BatchLimits(num_blocks=NUM_BLOCKS, block_size=BLOCK, step_tokens=8, max_running=4)

    def __init__(self) -> None:
        super().__init__()
        plan = BatchPlan(micro_batches=2, chunk_tokens=5, chunks_under_way=2, separate_prefill=True, draft_price=0.0)
        self.batcher = Batcher(self.limits, plan)
        self.stages = [Stage(index, 1 << 20) for index in range(NUM_STAGES)]
        self.epoch = 1
        self.links: dict[tuple[int, Traffic], deque[bytes | bytearray]] = {}
        """By the stage that they lead to; `NUM_STAGES` is the head again."""
        self.clear_links()
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.texts: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}
        self.added = 0

    def clear_links(self) -> None:
        self.links = {(index, traffic): deque() for index in range(1, NUM_STAGES + 1) for traffic in Traffic}

    @precondition(lambda self: self.added < 60)
    @rule(prompt=st.integers(1, 14), new=st.integers(1, 12))
    def add(self, prompt: int, new: int) -> None:
        self.added += 1
        tokens = self.make_prompt(prompt)
        name = sequence_id(self.added)
        options = SamplingOptions(max_tokens=new, temperature=0.0)
        self.batcher.add(StartSequence(pipeline=1, epoch=1, sequence=name, prompt=tokens, options=options))
        self.prompts[name], self.texts[name], self.lengths[name] = tokens, [], new

    def make_prompt(self, length: int) -> tuple[int, ...]:
        return tuple((self.added * 7 + at) % VOCABULARY for at in range(length))

    @precondition(lambda self: self.batcher.sequences)
    @rule(which=st.integers(0, 7))
    def stop(self, which: int) -> None:
        sequences = self.batcher.sequences
        name = sequences[which % len(sequences)]
        self.batcher.stop(name)
        del self.prompts[name]

    @rule(
        chunk=st.integers(1, 8), separate=st.booleans(), riding=st.sampled_from((0, 3)),
        micro_batches=st.integers(1, 3), guesses=st.booleans(),
    )  # fmt: skip
    def plan_anew(self, chunk: int, separate: bool, riding: int, micro_batches: int, guesses: bool) -> None:
        self.batcher.plan = BatchPlan(
            micro_batches=micro_batches, chunk_tokens=chunk, chunks_under_way=2, separate_prefill=separate,
            riding_tokens=riding, draft_price=0.0 if guesses else None,
        )  # fmt: skip

    @rule()
    def step(self) -> None:
        plan = self.batcher.next_step()
        assert not self.batcher.take_failed()
        if plan is not None:
            self.send(self.stages[0].run(self.as_step(plan)), 1)

    @rule(times=st.integers(1, 6))
    def steps(self, times: int) -> None:
        for _ in range(times):
            self.step()
            for index in range(1, NUM_STAGES + 1):
                for traffic in Traffic:
                    self.deliver(index, traffic)

    def as_step(self, plan: StepPlan) -> StageStep:
        extra = plan.extra()
        frame = StepFrame(
            pipeline=1,
            epoch=self.epoch,
            step=plan.step,
            entries=plan.entries,
            extra=extra.encode(),
            hidden_size=HIDDEN,
            dtype=Dtype.FLOAT32,
            hidden=memoryview(b""),
            traffic=plan.traffic,
        )
        return StageStep(frame=frame, extra=extra, token_ids=plan.token_ids, ready_ns=0)

    def send(self, result: StageResult, to: int) -> None:
        self.links[to, result.traffic].append(result.payload)

    @rule(to=st.integers(1, NUM_STAGES), traffic=st.sampled_from(Traffic))
    def deliver(self, to: int, traffic: Traffic) -> None:
        if not self.links[to, traffic]:
            return
        data = self.links[to, traffic].popleft()
        if to < NUM_STAGES:
            result = self.stages[to].take(data)
            if result is not None:
                self.send(result, to + 1)
            return
        tokens = StepTokens.model_validate_json(data)
        if tokens.epoch != self.epoch:
            return
        for event in tokens.events:
            if event.sequence in self.prompts:
                text = self.texts[event.sequence]
                if event.index == len(text):  # as the gateway takes it: whatever the head makes of the step
                    text.append(event.token)
                else:
                    assert text[event.index] == event.token, "a token was drawn twice, and differently"
        self.batcher.on_tokens(tokens)

    @rule(to=st.integers(1, NUM_STAGES), traffic=st.sampled_from(Traffic))
    def lose(self, to: int, traffic: Traffic) -> None:
        """One message, of which nobody hears."""
        if self.links[to, traffic]:
            self.links[to, traffic].popleft()

    @rule(loses=st.lists(st.booleans(), max_size=12))
    def cut_off(self, loses: list[bool]) -> None:
        """The head gives everything up; what is not lost arrives all the same, sooner or later."""
        choices = iter(loses)
        for link in self.links.values():
            kept = [data for data in link if not next(choices, False)]
            link.clear()
            link.extend(kept)
        self.batcher.on_all_lost()

    @rule(index=st.integers(1, NUM_STAGES - 1), small=st.booleans(), stale=st.booleans())
    def replace(self, index: int, small: bool, stale: bool) -> None:
        """A stage dies. The others go on in the next epoch; frames of the old one may still be on their way."""
        self.epoch += 1
        if not stale:
            self.clear_links()
        self.stages[index] = Stage(index, _SMALL_JOURNAL_BYTES if small else 1 << 20)
        for stage in self.stages:
            stage.join(self.epoch)
        self.batcher.on_new_epoch(index)

    @invariant()
    def texts_are_the_undisturbed_ones(self) -> None:
        self.batcher.check_invariants()
        for name, prompt in self.prompts.items():
            text = self.texts[name]
            assert text == expected_text(prompt, len(text))

    def teardown(self) -> None:
        for _ in range(600):
            if not self.batcher.sequences:
                break
            for _ in range(4):
                self.steps(2)
            if not any(self.links.values()) and self.batcher.report().steps_under_way:
                self.batcher.on_all_lost()  # what was lost without a word: the broker's outage is over
        self.texts_are_the_undisturbed_ones()
        assert not self.batcher.sequences, "a sequence was starved"
        for name in self.prompts:
            assert len(self.texts[name]) == self.lengths[name]


TestRebuilds = RebuildMachine.TestCase
TestRebuilds.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


EVENTS = ("add", "stop", "plan", "step", "steps", "deliver", "lose", "cut_off", "replace")
WEIGHTS = (8, 1, 3, 20, 20, 60, 1, 2, 3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_a_storm_of_losses_changes_no_text(seed: int) -> None:
    """The same as above with many more events than hypothesis would choose one by one."""
    storm(RebuildMachine(), random.Random(seed))


def storm(machine: RebuildMachine, dice: random.Random) -> None:
    """Many events, then peace until all have ended."""
    for event in dice.choices(EVENTS, WEIGHTS, k=300):
        traffic = dice.choice(tuple(Traffic))
        match event:
            case "add" if len(machine.batcher.sequences) < 6:
                machine.add(dice.randint(1, 14), dice.randint(1, 20))
            case "stop" if machine.batcher.sequences:
                machine.stop(dice.randrange(8))
            case "plan":
                machine.plan_anew(
                    chunk=dice.randint(1, 8), separate=dice.random() < 0.7, riding=dice.choice((0, 3)),
                    micro_batches=dice.randint(1, 3), guesses=dice.random() < 0.6,
                )  # fmt: skip
            case "step":
                machine.step()
            case "steps":
                machine.steps(dice.randint(1, 6))
            case "deliver":
                machine.deliver(dice.randint(1, NUM_STAGES), traffic)
            case "lose":
                machine.lose(dice.randint(1, NUM_STAGES), traffic)
            case "cut_off":
                machine.cut_off([dice.random() < 0.5 for _ in range(12)])
            case "replace":
                machine.replace(dice.randint(1, NUM_STAGES - 1), dice.random() < 0.3, dice.random() < 0.5)
        machine.texts_are_the_undisturbed_ones()
    machine.teardown()
