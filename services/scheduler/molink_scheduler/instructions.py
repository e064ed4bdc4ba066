"""What the scheduler wants done. The shell carries instructions out in their order and reports by events."""

from __future__ import annotations

from dataclasses import dataclass

from molink_common.messages import (
    Admitted,
    ApiKey,
    AssignStage,
    Done,
    Failed,
    Heartbeat,
    Keys,
    PreloadStages,
    Refused,
    Resumed,
    SequenceFailed,
    StartSequence,
    StopSequence,
)
from molink_scheduler.records import KeyUsage, PipelineRecord, SequenceRecord


@dataclass(frozen=True, slots=True)
class TakeEpoch:
    """Draw a new epoch, larger than `above` and than any drawn before; answered by `EpochTaken`."""

    above: int
    pipeline: int = 1
    """Who wants it."""


@dataclass(frozen=True, slots=True)
class AssignStageTo:
    """Answered by `AssignAnswered`."""

    worker: str
    stage: AssignStage


@dataclass(frozen=True, slots=True)
class PreloadStagesAt:
    """Answered by `PreloadAnswered`."""

    worker: str
    stages: PreloadStages


@dataclass(frozen=True, slots=True)
class ProbeWorker:
    """Ask whether a worker is there; answered by `WorkerProbed`, or not at all when nothing can be said."""

    worker: str


@dataclass(frozen=True, slots=True)
class NoteLoss:
    """Write to the log that a worker, or its stage, is lost."""

    worker: str
    reason: str
    silent_s: float
    """Since its last heartbeat."""


@dataclass(frozen=True, slots=True)
class ReleaseStageOf:
    """A worker's stage is no longer needed. The answer does not matter."""

    worker: str
    pipeline: int


@dataclass(frozen=True, slots=True)
class StartSequenceAt:
    """Answered by `StartAnswered`."""

    worker: str
    start: StartSequence


@dataclass(frozen=True, slots=True)
class StopSequenceAt:
    """The answer does not matter: what a stop misses, the next comparison of the books finds."""

    worker: str
    stop: StopSequence


@dataclass(frozen=True, slots=True)
class AskSequencesOf:
    """Answered by `SequencesHeldArrived`, or not at all."""

    worker: str
    pipeline: int


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """Answer whatever came with a number for its reply."""

    reply: int
    message: Admitted | Refused | Resumed | Failed | Keys | Done


@dataclass(frozen=True, slots=True)
class FailSequence:
    """Tell the gateway that a sequence cannot be finished."""

    gateway: str
    failed: SequenceFailed


@dataclass(frozen=True, slots=True)
class SaveSequence:
    """Keep a sequence; answered by `SequenceSaved`."""

    record: SequenceRecord


@dataclass(frozen=True, slots=True)
class AppendTokens:
    """Keep tokens of a sequence, the first of them at index `start`."""

    sequence: str
    start: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DeleteSequence:
    """Forget a sequence and its tokens."""

    sequence: str


@dataclass(frozen=True, slots=True)
class SavePipeline:
    """Keep a pipeline's layer map."""

    record: PipelineRecord


@dataclass(frozen=True, slots=True)
class SaveWorker:
    """Keep a worker's last heartbeat for a few seconds."""

    heartbeat: Heartbeat


@dataclass(frozen=True, slots=True)
class SaveKey:
    """Keep an API key; answered by `KeySaved`."""

    key: ApiKey


@dataclass(frozen=True, slots=True)
class DeleteKey:
    """Forget an API key and what it has used."""

    key: str


@dataclass(frozen=True, slots=True)
class SaveUsage:
    """Keep what an API key has used."""

    usage: KeyUsage


@dataclass(frozen=True, slots=True)
class BroadcastState:
    """Tell everybody the state of everything, now."""


Write = SaveSequence | AppendTokens | DeleteSequence | SavePipeline | SaveWorker | SaveKey | DeleteKey | SaveUsage
"""What goes to the store."""

Question = (
    TakeEpoch
    | AssignStageTo
    | PreloadStagesAt
    | ProbeWorker
    | ReleaseStageOf
    | StartSequenceAt
    | StopSequenceAt
    | AskSequencesOf
)
"""What another part is asked, and answers or not."""

Instruction = Question | ReplyTo | FailSequence | NoteLoss | Write | BroadcastState
