"""What the head knows of a sequence at work and of a step under way."""

from __future__ import annotations

from dataclasses import dataclass, field

from molink_common.identity import sequence_number
from molink_common.messages import StartSequence
from molink_common.sampling import SamplingOptions
from molink_common.wire import Opening, Traffic


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
    """How many of `tokens` steps have been planned for since it was opened last."""
    last_steps: dict[Traffic, int] = field(default_factory=dict)
    """By class, the last step planned for it since it was opened last."""
    is_open: bool = False
    opened_by: int = 0
    """The step that opened it last."""
    restarts: int = 0
    unsent_blocks: list[int] = field(default_factory=list)

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
            tokens=[*start.prompt, *start.generated],
        )

    @property
    def is_decoding(self) -> bool:
        """Whether all but its newest token is computed or being computed."""
        return self.planned > 0 and len(self.tokens) - self.planned <= 1

    @property
    def unplanned(self) -> int:
        """Tokens that no step has been planned for."""
        return len(self.tokens) - self.planned

    def opening(self) -> Opening:
        """What the tail must know of it."""
        # built without validation: the values come from a validated message
        return Opening.model_construct(
            sequence=self.id,
            prompt=self.prompt,
            generated=tuple(self.tokens[len(self.prompt) :]),
            options=self.options,
        )

    def forget_stages(self) -> None:
        """No stage knows it any more."""
        self.is_open = False
        self.planned = 0
        self.last_steps.clear()
        self.unsent_blocks.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepUnderWay:
    """A step that was planned and has not come back."""

    traffic: Traffic
    served: dict[str, Sequence]
    wanted: frozenset[str]
    """Sequences that are to get a token from it."""
    closes: dict[str, int]
