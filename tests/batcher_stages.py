"""A pipeline that exists only as a list, behind the head's batcher: what its stages know and rely on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from molink_common.identity import sequence_id
from molink_common.messages import Dtype, FinishReason, StartSequence, StepTokens, TokenEvent
from molink_common.sampling import SamplingOptions
from molink_common.wire import Entry, Logits, StepFrame
from molink_stage_worker.batch_plan import BatchLimits, StepPlan
from molink_stage_worker.fence import Fence
from molink_stage_worker.lives import Lives


def make_start(
    number: int, prompt: int, new: int, generated: tuple[int, ...] = (), tenant: str = "", priority: int = 0
) -> StartSequence:
    """Every third one has the log probabilities of its prompt told."""
    return StartSequence(
        pipeline=1,
        epoch=1,
        sequence=sequence_id(number),
        prompt=tuple(range(prompt)),
        generated=generated,
        options=SamplingOptions(max_tokens=new, prompt_logprobs=None if number % 3 else 0),
        tenant=tenant,
        priority=priority,
    )


def token_of(number: int, index: int) -> int:
    """Two in turn, for longer and longer: a guess is right now and then."""
    return number * 31 % 1000 + index * index // 3 % 2


class Stages:
    """What every stage and the tail would know. Asserts what an engine relies on."""

    def __init__(self, limits: BatchLimits) -> None:
        self.limits = limits
        self.fence = Fence(pipeline=1, epoch=1, block_size=limits.block_size)
        self.lives = Lives()
        self.holes = 0
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self.guessed: dict[int, int] = {}
        """By sequence, of how many tokens it is not certain that they are its."""
        self.verified = Counter[bool]()
        """How many guesses were right, and how many wrong."""
        self.generated: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self.texts: dict[int, list[int]] = {}
        """As the tail was told when they opened."""
        self.stale: set[int] = set()
        """Sequences that ended, which a step that was lost was to say."""
        self.untold: dict[str, set[int]] = {}
        """Places of prompts whose log probabilities have not been told and are to be."""

    def run(self, plan: StepPlan) -> StepTokens:
        frame = StepFrame(
            pipeline=1, epoch=1, step=plan.step, entries=plan.entries, extra=b"", hidden_size=1, dtype=Dtype.FLOAT32,
            hidden=memoryview(b""), traffic=plan.traffic,
        )  # fmt: skip
        assert self.fence.check(frame) is None
        hole = self.fence.enter(plan.step, plan.entries, plan.closes)
        self.holes += hole is not None
        for name in self.lives.close(plan.closes):
            self.tables.pop(int(name, 16), None)
            self.lengths.pop(int(name, 16), None)
            self.generated.pop(name, None)
            self.stale.discard(int(name, 16))
        for opening in plan.opens:
            self.texts[int(opening.sequence, 16)] = [*opening.prompt, *opening.generated]
            self.generated[opening.sequence] = len(opening.generated)
            self.most[opening.sequence] = opening.options.max_tokens
            tells = opening.options.prompt_logprobs is not None
            self.untold.setdefault(opening.sequence, set(range(1, len(opening.prompt))) if tells else set())
        entries = () if hole else plan.entries
        self.lives.open(entries, plan.step)
        events = []
        token_at = 0
        for entry in entries:
            if entry.opens:
                self.tables[entry.sequence] = []
                self.stale.discard(entry.sequence)
                self.check_opening(entry)
            else:
                length = self.lengths[entry.sequence]
                certain = length - self.guessed[entry.sequence]
                assert certain <= entry.start <= length, "positions are not contiguous"
                assert entry.sequence not in self.stale, "it goes on after its end"
            self.lengths[entry.sequence] = entry.start
            self.tables[entry.sequence].extend(entry.new_blocks)
            self.lengths[entry.sequence] += entry.count
            guesses = plan.drafts.get(sequence_id(entry.sequence), ())
            self.guessed[entry.sequence] = len(guesses)
            assert (entry.logits is Logits.DRAFTS) == bool(guesses)
            assert len(self.tables[entry.sequence]) * self.limits.block_size >= self.lengths[entry.sequence]
            self.fill(entry, plan.token_ids[token_at : token_at + entry.count])
            token_at += entry.count
            name, end = sequence_id(entry.sequence), entry.start + entry.count - len(guesses)
            if entry.logits is Logits.ALL:
                self.untold[name].difference_update(range(entry.start + 1, end + 1))
            if entry.logits is not Logits.NONE and end == len(self.texts[entry.sequence]):
                assert not self.untold[name], "a token before all of its prompt was told"
                events += self.sample(entry.sequence, guesses)
        self.check_blocks()
        return StepTokens(pipeline=1, epoch=1, step=plan.step, events=tuple(events))

    def sample(self, number: int, guesses: tuple[int, ...]) -> Iterator[TokenEvent]:
        """A token, and one more for each guess that is right."""
        name = sequence_id(number)
        for guess in (*guesses, None):
            index = self.generated[name]
            token = token_of(number, index)
            self.texts[number].append(token)
            self.generated[name] += 1
            finish = FinishReason.LENGTH if index + 1 == self.most[name] else None
            yield TokenEvent(sequence=name, index=index, token=token, finish=finish)
            assert finish is None or guess is None, "a guess behind the end"
            if guess is not None:
                self.verified[token == guess] += 1
            if token != guess:
                return

    def lose(self, plan: StepPlan) -> None:
        """A step never arrives."""
        self.stale.update(int(name, 16) for name in plan.closes if int(name, 16) in self.tables)

    def check_opening(self, entry: Entry) -> None:
        assert entry.start <= self.lengths.get(entry.sequence, 0), "it opens behind what is here"

    def fill(self, entry: Entry, tokens: tuple[int, ...]) -> None:
        """The entry's tokens are computed."""

    def check_blocks(self) -> None:
        owned = [block for name, table in self.tables.items() if name not in self.stale for block in table]
        assert len(owned) == len(set(owned)), "two sequences in one block"
