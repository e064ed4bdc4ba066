"""What the scheduler knows: workers, the pipeline, sequences, gateways. Changed only by the machine's desks.

The tables below say which moves are legal; an illegal one is our own mistake and raises with the story.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from molink_common.messages import Heartbeat, ModelCard, StageReport
from molink_scheduler.placement import Placement
from molink_scheduler.records import PipelineRecord, SequenceRecord
from molink_scheduler.settings import SchedulerSettings

PIPELINE = 1
"""The one pipeline's number."""


class PipelinePhase(StrEnum):
    """The life of the pipeline, through its epochs."""

    WAITING = "waiting"
    """For workers that can hold the model."""
    FORMING = "forming"
    """For a new epoch."""
    LOADING = "loading"
    """Stages are assigned; not every one is ready."""
    READY = "ready"


NEXT_PIPELINE_PHASE: dict[PipelinePhase, frozenset[PipelinePhase]] = {
    PipelinePhase.WAITING: frozenset({PipelinePhase.FORMING, PipelinePhase.LOADING}),
    PipelinePhase.FORMING: frozenset({PipelinePhase.LOADING, PipelinePhase.WAITING}),
    PipelinePhase.LOADING: frozenset({PipelinePhase.READY, PipelinePhase.WAITING}),
    PipelinePhase.READY: frozenset({PipelinePhase.WAITING}),
}


class SequencePhase(StrEnum):
    """The life of a sequence."""

    SAVING = "saving"
    """Not admitted yet: the store is to have it first."""
    WAITING = "waiting"
    """For a pipeline, or for another attempt to start it."""
    STARTING = "starting"
    """Sent to the head, which has not answered."""
    RUNNING = "running"
    ENDED = "ended"


NEXT_SEQUENCE_PHASE: dict[SequencePhase, frozenset[SequencePhase]] = {
    SequencePhase.SAVING: frozenset({SequencePhase.WAITING, SequencePhase.ENDED}),
    SequencePhase.WAITING: frozenset({SequencePhase.STARTING, SequencePhase.ENDED}),
    SequencePhase.STARTING: frozenset({SequencePhase.RUNNING, SequencePhase.WAITING, SequencePhase.ENDED}),
    SequencePhase.RUNNING: frozenset({SequencePhase.WAITING, SequencePhase.ENDED}),
    SequencePhase.ENDED: frozenset(),
}


@dataclass(slots=True, kw_only=True)
class Worker:
    """A worker that was heard of not long ago."""

    heartbeat: Heartbeat
    heard_s: float
    progress_s: float
    """When its stage last got on with loading."""
    barred_until_s: float = 0.0
    barred_because: str = ""
    released_s: float | None = None
    """When it was last told to drop a stage that nobody needs."""

    @property
    def name(self) -> str:
        """Its id."""
        return self.heartbeat.worker

    def report_of(self, layout: PipelineRecord) -> StageReport | None:
        """Its stage, if that is one of the pipeline in this epoch."""
        stage = self.heartbeat.stage
        if stage is not None and (stage.pipeline, stage.epoch) == (layout.pipeline, layout.epoch):
            return stage
        return None


@dataclass(slots=True, kw_only=True)
class Pipeline:
    """The pipeline and how it came to be where it is."""

    phase: PipelinePhase = PipelinePhase.WAITING
    phase_since_s: float = 0.0
    layout: PipelineRecord | None = None
    """While LOADING or READY."""
    card: ModelCard | None = None
    """The model of the last layout."""
    placement: Placement | None = None
    """The last one that was computed, for its reasons."""
    refused_for: tuple[object, ...] | None = None
    """What the last placement that failed was computed from: it need not be computed again."""
    accepted_s: dict[str, float] = field(default_factory=dict)
    """When each worker of the layout took its stage."""
    lost_s: float | None = None
    """When it stopped serving; None before it has served and while it serves."""
    lost_because: str = ""
    awaited_until_s: float = 0.0
    """After a restart: until when its workers may still be unheard of."""
    stepped_s: float = 0.0
    """When a step last came out."""
    fit: tuple[str, ...] = ()
    fit_since_s: float = 0.0

    def move(self, phase: PipelinePhase, now_s: float) -> None:
        """Make a legal move."""
        assert phase in NEXT_PIPELINE_PHASE[self.phase], f"pipeline: {self.phase} → {phase} ({self.lost_because})"
        self.phase, self.phase_since_s = phase, now_s

    @property
    def is_ready(self) -> bool:
        """Whether sequences can be started."""
        return self.phase is PipelinePhase.READY


@dataclass(slots=True, kw_only=True)
class Sequence:
    """A sequence and its tokens so far, without gaps."""

    record: SequenceRecord
    phase: SequencePhase
    since_s: float
    """When it began to wait for what its phase waits for."""
    replies: list[int] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    epoch: int | None = None
    """Where it was last started."""
    attempts: int = 0
    confirmed_s: float | None = None
    """When its head said that it has it."""
    is_restored: bool = False
    """From the store, and not yet seen at the head since."""

    @property
    def id(self) -> str:
        """16 hex digits."""
        return self.record.request.sequence

    @property
    def gateway(self) -> str:
        """Who waits for it."""
        return self.record.request.gateway

    @property
    def most_tokens(self) -> int:
        """What it may come to hold in KV blocks."""
        return len(self.record.request.prompt) + self.record.request.options.max_tokens

    def move(self, phase: SequencePhase, now_s: float) -> None:
        """Make a legal move."""
        assert phase in NEXT_SEQUENCE_PHASE[self.phase], f"sequence {self.id}: {self.phase} → {phase}"
        self.phase, self.since_s = phase, now_s


@dataclass(slots=True, kw_only=True)
class Books:
    """All that the decisions are made from."""

    settings: SchedulerSettings
    workers: dict[str, Worker] = field(default_factory=dict)
    """In the order in which they came."""
    pipeline: Pipeline = field(default_factory=Pipeline)
    sequences: dict[str, Sequence] = field(default_factory=dict)
    """In the order in which they came; ended ones are not here."""
    gateways_heard_s: dict[str, float] = field(default_factory=dict)
    finished_s: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    """When the last sequences ended, for the estimate of a time to retry."""
    highest_epoch: int = 0
    deaf_until_s: float = 0.0
    """Silence before this moment is ours, not theirs."""
    store_down_s: float | None = None
    """Since when the store does not answer."""
    broadcast_s: float | None = None
    compared_s: float = 0.0
    """When the books were last compared with the head's."""
