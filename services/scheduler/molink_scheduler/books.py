"""What the scheduler knows: workers, pipelines, sequences, gateways. Changed only by the machine's desks.

The tables below say which moves are legal; an illegal one is our own mistake and raises with the story.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from molink_common.messages import Heartbeat, ModelCard, PreloadStages, StageReport
from molink_scheduler.key_book import KeyBook
from molink_scheduler.lags import Lag
from molink_scheduler.overload import Overload
from molink_scheduler.placement import LayerMap, Placement
from molink_scheduler.records import PipelineRecord, SequenceRecord
from molink_scheduler.settings import SchedulerSettings

FIRST_PIPELINE = 1
"""The number of the pipeline that is formed first."""


class PipelinePhase(StrEnum):
    """The life of a pipeline, through its epochs."""

    WAITING = "waiting"
    """For workers that can hold the model."""
    FORMING = "forming"
    """For a new epoch."""
    LOADING = "loading"
    """Stages are assigned; not every one is ready."""
    READY = "ready"
    REPLACING = "replacing"
    """Other workers are to take lost stages over; it waits for a new epoch."""


NEXT_PIPELINE_PHASE: dict[PipelinePhase, frozenset[PipelinePhase]] = {
    PipelinePhase.WAITING: frozenset({PipelinePhase.FORMING, PipelinePhase.LOADING}),
    PipelinePhase.FORMING: frozenset({PipelinePhase.LOADING, PipelinePhase.WAITING}),
    PipelinePhase.LOADING: frozenset({PipelinePhase.READY, PipelinePhase.REPLACING, PipelinePhase.WAITING}),
    PipelinePhase.READY: frozenset({PipelinePhase.REPLACING, PipelinePhase.WAITING}),
    PipelinePhase.REPLACING: frozenset({PipelinePhase.LOADING, PipelinePhase.READY, PipelinePhase.WAITING}),
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
    probed_s: float | None = None
    """When it was last asked whether it is there."""
    leaving_since_s: float | None = None
    """Since when it has said that it is about to stop."""
    preload: PreloadStages | None = None
    """What it was last told to have in memory."""
    preload_told_s: float = 0.0
    preload_taken: bool = False
    """Whether it has answered that."""

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
    """A pipeline and how it came to be where it is."""

    number: int = FIRST_PIPELINE
    phase: PipelinePhase = PipelinePhase.WAITING
    phase_since_s: float = 0.0
    layout: PipelineRecord | None = None
    """While LOADING, READY or REPLACING."""
    card: ModelCard | None = None
    """The model of the last layout."""
    accepted_s: dict[str, float] = field(default_factory=dict)
    """When each worker of the layout took its stage."""
    gone: dict[str, str] = field(default_factory=dict)
    """Why workers of the layout are not in the books any more."""
    lost_s: float | None = None
    """When it stopped serving; None before it has served and while it serves."""
    lost_because: str = ""
    awaited_until_s: float = 0.0
    """After a restart: until when its workers may still be unheard of."""
    stepped_s: float = 0.0
    """When a step last came out."""
    compared_s: float = 0.0
    """When the books were last compared with the head's."""
    better: LayerMap | None = None
    """A much faster layer map, whose stages are being preloaded."""
    better_since_s: float = 0.0
    """When one was last looked for."""
    regroupings: int = 0
    """How often one was found. Each time the next one has to wait longer."""
    regrouped_for: tuple[str, ...] | None = None
    """The workers over which the last one was found: over the same ones none is looked for again."""
    is_draining: bool = False
    """A worker of it leaves for good: its sequences move elsewhere, and nothing new is started here."""
    # replacing
    is_kept: bool = False
    """The layout has served: it is kept, and lost stages are given to others, before anything is placed anew."""
    replaced: frozenset[str] = frozenset()
    """While REPLACING: whose stages others are to take over."""
    may_continue: bool = False
    """While REPLACING: whether the stages that are left can go on with what they hold."""
    continued_epoch: int | None = None
    """While LOADING: the epoch that is gone on with; its last tokens may still arrive."""
    newcomers: frozenset[str] = frozenset()
    """While LOADING: who has taken a stage over from another."""
    refused_because: str | None = None
    """While LOADING: why a worker cannot go on with what it held."""
    # forming
    placement: Placement | None = None
    """The last one that was computed, for its reasons."""
    refused_for: tuple[object, ...] | None = None
    """What the last placement that failed was computed from: it need not be computed again."""
    fit: tuple[str, ...] = ()
    """Who could be given a stage of it."""
    fit_since_s: float = 0.0

    def move(self, phase: PipelinePhase, now_s: float) -> None:
        """Make a legal move."""
        assert phase in NEXT_PIPELINE_PHASE[self.phase], (
            f"pipeline {self.number}: {self.phase} → {phase} ({self.lost_because})"
        )
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
    pipeline: int | None = None
    """Where it was last started, and in which epoch."""
    epoch: int | None = None
    ends_after: int | None = None
    """How many tokens its gateway has use for, once that is known."""
    has_hole: bool = False
    """A token was missed since it was last started: what came after it is not kept."""
    attempts: int = 0
    interruptions: int = 0
    """Losses since its last token."""
    confirmed_s: float | None = None
    """When its head said that it has it."""
    moved_with: int | None = None
    """How many tokens it had when it was last moved away from a pipeline that drains."""
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

    @property
    def num_tokens(self) -> int:
        """Of its prompt and of its answer so far."""
        return len(self.record.request.prompt) + len(self.generated)

    @property
    def is_resumable(self) -> bool:
        """Whether another gateway may go on with its stream."""
        return self.record.request.resume_state is not None

    def move(self, phase: SequencePhase, now_s: float) -> None:
        """Make a legal move."""
        assert phase in NEXT_SEQUENCE_PHASE[self.phase], f"sequence {self.id}: {self.phase} → {phase}"
        self.phase, self.since_s = phase, now_s


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedSequence:
    """A sequence that has ended and that somebody may ask for."""

    record: SequenceRecord
    generated: tuple[int, ...]
    ended_s: float


@dataclass(slots=True, kw_only=True)
class Books:
    """All that the decisions are made from."""

    settings: SchedulerSettings
    workers: dict[str, Worker] = field(default_factory=dict)
    """In the order in which they came."""
    pipelines: dict[int, Pipeline] = field(default_factory=lambda: {FIRST_PIPELINE: Pipeline()})
    """By number. One at least."""
    sequences: dict[str, Sequence] = field(default_factory=dict)
    """In the order in which they came; ended ones are not here."""
    ended: dict[str, EndedSequence] = field(default_factory=dict)
    """Those whose clients may come back, in the order in which they ended."""
    holed: dict[str, Sequence] = field(default_factory=dict)
    """Those that have ended, with tokens missing here, in the order in which they ended."""
    recent: dict[str, EndedSequence] = field(default_factory=dict)
    """Other ones, not in the store: their gateways may have missed the last tokens."""
    keys: KeyBook = field(default_factory=KeyBook)
    gateways_heard_s: dict[str, float] = field(default_factory=dict)
    finished_s: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    """When the last sequences ended, for the estimate of a time to retry."""
    lags: dict[str, Lag] = field(default_factory=dict)
    """How late heartbeats come, by worker, those heard last at the end; also of workers that are lost."""
    highest_epoch: int = 0
    idle_seen: tuple[object, ...] = ()
    """Idle workers, as they were last looked at, and since when it is these."""
    idle_since_s: float = 0.0
    idle_hopeless: tuple[object, ...] = ()
    """Idle workers that cannot hold the model."""
    deaf_until_s: float = 0.0
    """Silence before this moment is ours, not theirs."""
    store_down_s: float | None = None
    """Since when the store does not answer."""
    ticked_s: float | None = None
    """When time last passed."""
    broadcast_s: float | None = None
    overload: Overload = field(init=False)

    def __post_init__(self) -> None:
        """How long newcomers wait is learnt anew."""
        self.overload = Overload(self.settings.ttft_target_s)

    @property
    def pipeline(self) -> Pipeline:
        """The first that has a layer map, else the first."""
        pipelines = self.pipelines.values()
        return next((one for one in pipelines if one.layout is not None), next(iter(pipelines)))

    @property
    def ready_pipelines(self) -> list[Pipeline]:
        """Those that serve."""
        return [one for one in self.pipelines.values() if one.is_ready]

    def pipeline_of(self, worker: str) -> Pipeline | None:
        """Whose layer map a worker is in."""
        for pipeline in self.pipelines.values():
            if pipeline.layout is not None and worker in pipeline.layout.workers:
                return pipeline
        return None
