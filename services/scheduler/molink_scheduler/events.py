"""What can happen to the scheduler. Every event is a value; the time of its arrival comes beside it."""

from __future__ import annotations

from dataclasses import dataclass

from molink_common.messages import ApiKey, Heartbeat, ResumeSequence, SequencesHeld, StepTokens, SubmitSequence
from molink_scheduler.records import Snapshot


@dataclass(frozen=True, slots=True)
class Restored:
    """The scheduler begins, with what the store has kept. Always the first event."""

    snapshot: Snapshot
    utc_s: float = 0.0
    """Seconds since 1970 now. The time beside an event says nothing of days."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed. Silence of workers and gateways counts only while NATS could be heard."""

    bus_up: bool = True
    utc_s: float | None = None
    """Seconds since 1970, where a clock was looked at."""


@dataclass(frozen=True, slots=True)
class HeartbeatArrived:
    """A worker lives."""

    heartbeat: Heartbeat


@dataclass(frozen=True, slots=True)
class WorkerDisconnected:
    """The broker tells that a connection of a worker is closed. It may have another, or connect again."""

    worker: str


@dataclass(frozen=True, slots=True)
class WorkerProbed:
    """The answer to `ProbeWorker`: whether anybody listens where the worker takes orders."""

    worker: str
    is_there: bool


@dataclass(frozen=True, slots=True)
class GatewayAliveArrived:
    """A gateway lives."""

    gateway: str


@dataclass(frozen=True, slots=True)
class SequenceSubmitted:
    """A gateway asks for a sequence; `reply` stands for its question."""

    request: SubmitSequence
    reply: int


@dataclass(frozen=True, slots=True)
class SequenceSaved:
    """The store has the sequence."""

    sequence: str


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """A gateway has no more use for a sequence, or none for what comes after some tokens of it."""

    sequence: str
    reason: str
    after_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ResumeAsked:
    """A gateway wants to go on with a stream; `reply` stands for its question."""

    request: ResumeSequence
    reply: int


@dataclass(frozen=True, slots=True)
class TokensArrived:
    """A step came out of a pipeline."""

    step: StepTokens


@dataclass(frozen=True, slots=True)
class EpochTaken:
    """The answer to `TakeEpoch`."""

    epoch: int
    pipeline: int = 1


@dataclass(frozen=True, slots=True)
class AssignAnswered:
    """A worker took its stage, or there was a problem."""

    worker: str
    epoch: int
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class PreloadAnswered:
    """A worker takes on what it was told to preload, or there was a problem."""

    worker: str
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class StartAnswered:
    """The head took a sequence, or there was a problem."""

    sequence: str
    epoch: int
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class SequencesHeldArrived:
    """The head's answer to the question of `asked_at_s`."""

    held: SequencesHeld
    asked_at_s: float


@dataclass(frozen=True, slots=True)
class StoreChanged:
    """The store answers again, or has stopped answering."""

    up: bool


@dataclass(frozen=True, slots=True)
class StoreEmptied:
    """The store answers but has forgotten everything."""


@dataclass(frozen=True, slots=True)
class KeysAsked:
    """Somebody wants to know the API keys; `reply` stands for the question."""

    reply: int


@dataclass(frozen=True, slots=True)
class KeyAddAsked:
    """An operator adds an API key; `reply` stands for his order."""

    key: ApiKey
    reply: int


@dataclass(frozen=True, slots=True)
class KeyRevokeAsked:
    """An operator revokes an API key; `reply` stands for his order."""

    key: str
    reply: int


@dataclass(frozen=True, slots=True)
class KeySaved:
    """The store has an API key as it is now."""

    key: str


Event = (
    Restored
    | Tick
    | HeartbeatArrived
    | WorkerDisconnected
    | WorkerProbed
    | GatewayAliveArrived
    | SequenceSubmitted
    | SequenceSaved
    | CancelAsked
    | ResumeAsked
    | TokensArrived
    | EpochTaken
    | AssignAnswered
    | PreloadAnswered
    | StartAnswered
    | SequencesHeldArrived
    | StoreChanged
    | StoreEmptied
    | KeysAsked
    | KeyAddAsked
    | KeyRevokeAsked
    | KeySaved
)
