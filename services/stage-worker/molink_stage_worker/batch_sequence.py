"""What the head knows of a sequence at work and of a step under way.

    tokens     ├──────────── prompt ────────────┼── generated ──┤
    confirmed  ├────────────────────────┤         on every stage for sure: its steps came back in order
    planned    ├──────────────────────────────┤   steps under way or back

With a known beginning (see `prefix_cache`) all begin behind that. When a step is lost, `planned` goes back to
`confirmed` and the sequence opens again there, with the same KV blocks.
When a stage is replaced, `kept` is what all others have, and `confirmed` counts what the new one has got of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from molink_common.identity import sequence_number
from molink_common.messages import StartSequence
from molink_common.sampling import SamplingOptions
from molink_common.wire import Entry, Logits, Opening, Traffic
from molink_stage_worker.drafting import Guesser

_GRAMMAR_CHARACTERS_A_TOKEN = 4
"""In a frame: a token's number takes up to eight bytes, and a grammar's quotes are escaped once more."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence that waits or runs. `tokens` are those of the prompt and those generated so far."""

    id: str
    number: int
    arrival: int
    prompt: tuple[int, ...]
    options: SamplingOptions
    trace: str | None
    tokens: list[int]
    planned: int = 0
    """How many of `tokens` steps have been planned for."""
    confirmed: int = 0
    """How many of `tokens` have keys and values on every stage; with `kept`, on the stage that is rebuilt."""
    kept: int = 0
    """How many of `tokens` have them on every stage but the one that is rebuilt. 0: there is nothing to rebuild."""
    life: int = 0
    """Counts how often it went back. What comes back of an earlier life does not count."""
    last_steps: dict[Traffic, int] = field(default_factory=dict)
    """By class, the last step planned for it since it got its blocks."""
    is_open: bool = False
    """Whether its next step continues the one before; else it opens the sequence (again) where it goes on."""
    opened_by: int | None = None
    """The step that opened it last; None: no stage knows it."""
    restarts: int = 0
    interruptions: int = 0
    """Losses since its last token, here and before it came here."""
    tenant: str = ""
    priority: int = 0
    charged: int = 0
    """How many of `tokens` its tenant was charged for (see `fair_queue`)."""
    unsent_blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    """Of its first full blocks, as far as anybody wanted to know them (see `prefix_cache`)."""
    cached: int = 0
    """How many of `tokens` were in known KV blocks when it got its own. It never writes to these."""
    published: int = 0
    """How many of its blocks may be known."""
    is_distrustful: bool = False
    """A stage lacked what it should have had: it takes nothing over from others any more."""
    guesser: Guesser = field(default_factory=Guesser)

    @classmethod
    def starting(cls, start: StartSequence, arrival: int) -> Sequence:
        """As the scheduler hands it over."""
        return cls(
            id=start.sequence,
            number=sequence_number(start.sequence),
            arrival=arrival,
            prompt=start.prompt,
            options=start.options,
            trace=start.trace,
            tenant=start.tenant,
            priority=start.priority,
            interruptions=start.interruptions,
            tokens=[*start.prompt, *start.generated],
        )

    @property
    def is_decoding(self) -> bool:
        """Whether all but its newest token is computed or being computed."""
        return self.planned > 0 and len(self.tokens) - self.planned <= 1 and not self.kept

    @property
    def unplanned(self) -> int:
        """Tokens that a step may be planned for. What a stage still lacks comes first."""
        return 0 if self.kept else len(self.tokens) - self.planned

    @property
    def to_rebuild(self) -> int:
        """Tokens that no step has been planned for to rebuild them."""
        return self.kept - self.planned if self.kept else 0

    @property
    def tells_prompt(self) -> bool:
        """Whether its next chunk has the tail tell log probabilities of the prompt's tokens."""
        return self.options.prompt_logprobs is not None and self.planned + 1 < len(self.prompt)

    def logits_of_chunk(self, count: int) -> Logits:
        """The logits that its next chunk asks for."""
        if self.tells_prompt:
            return Logits.ALL
        return Logits.LAST if self.planned + count == len(self.tokens) else Logits.NONE

    def entry(self, count: int, *, guesses: int = 0) -> Entry:
        """Its part of a step: the next `count` of its tokens, and guesses behind them."""
        return Entry(
            sequence=self.number,
            start=self.planned,
            count=count + guesses,
            opens=not self.is_open,
            logits=Logits.DRAFTS if guesses else self.logits_of_chunk(count),
            new_blocks=tuple(self.unsent_blocks),
        )

    @property
    def opening_tokens(self) -> int:
        """How much room its opening takes in a frame, in tokens of a prompt."""
        return len(self.tokens) + len(self.options.grammar or "") // _GRAMMAR_CHARACTERS_A_TOKEN

    def opening(self) -> Opening:
        """What the tail must know of it."""
        # built without validation: the values come from a validated message
        return Opening.model_construct(
            sequence=self.id,
            prompt=self.prompt,
            generated=tuple(self.tokens[len(self.prompt) :]),
            options=self.options,
            cached_tokens=min(self.cached, len(self.prompt)),
        )

    @property
    def is_new(self) -> bool:
        """Whether it has blocks that nothing was planned for yet."""
        return self.opened_by is None

    def begin_at(self, cached: int, blocks: Iterable[int]) -> None:
        """Its first tokens are in known blocks: go on behind them. For one that is new."""
        self.cached = self.confirmed = self.planned = cached
        self.unsent_blocks = list(blocks)

    def go_back(self, blocks: Iterable[int]) -> None:
        """Plan again from `confirmed` on, with all the blocks that it has."""
        self.life += 1
        self.planned = self.confirmed
        self.is_open = False
        self.unsent_blocks = list(blocks)

    def forget_stages(self) -> None:
        """No stage knows it any more, and it has no blocks."""
        self.confirmed = self.kept = self.cached = self.published = 0
        self.go_back(())
        self.opened_by = None
        self.last_steps.clear()


class Served(NamedTuple):
    """What a step does for a sequence."""

    sequence: Sequence
    life: int
    end: int
    """How many of its tokens are computed after the step."""
    drafts: int = 0
    """Guesses behind these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepUnderWay:
    """A step that was planned and has not come back."""

    traffic: Traffic
    served: dict[str, Served]
    wanted: frozenset[str]
    """Sequences that are to get a token from it."""
    closes: dict[str, int]


class StepsUnderWay:
    """By number, oldest first; and how many there are of each class."""

    def __init__(self) -> None:
        self._steps: dict[int, StepUnderWay] = {}
        self.counts = dict.fromkeys(Traffic, 0)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[int]:
        """Over a copy: what is met may be taken off."""
        return iter(tuple(self._steps))

    @property
    def oldest(self) -> int | None:
        """Its number."""
        return next(iter(self._steps), None)

    def put(self, number: int, step: StepUnderWay) -> None:
        """A step was planned, a newer one than all others."""
        self._steps[number] = step
        self.counts[step.traffic] += 1

    def get(self, number: int) -> StepUnderWay | None:
        """The step of this number, if it is under way."""
        return self._steps.get(number)

    def take_off(self, number: int) -> StepUnderWay | None:
        """It came back, or never will."""
        taken = self._steps.pop(number, None)
        if taken is not None:
            self.counts[taken.traffic] -= 1
        return taken

    def older(self, number: int) -> list[int]:
        """Those of its class that were planned before a step that is under way."""
        traffic = self._steps[number].traffic
        return [one for one, step in self._steps.items() if one < number and step.traffic is traffic]

    def check_invariants(self) -> None:
        """Assert that the counts are right."""
        assert self.counts == {kind: sum(step.traffic is kind for step in self._steps.values()) for kind in Traffic}
