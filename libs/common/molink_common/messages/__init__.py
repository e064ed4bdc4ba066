"""Control messages: small, versioned, typed, orjson.

Every message is a frozen pydantic model with a `TYPE`. On the wire it is one JSON object with two more keys,
``"v"`` (protocol version) and ``"type"``. Fields that a receiver does not know are ignored, so that a newer
peer may add some; an unknown type, a wrong version or a wrong value is a `ProtocolError`.
"""

from molink_common.messages.admission import (
    Admitted,
    CancelSequence,
    Done,
    Failed,
    GatewayAlive,
    RefusalCode,
    Refused,
    SequenceFailed,
    SubmitSequence,
)
from molink_common.messages.cluster import AskState, ClusterState, PipelineState, WorkerState
from molink_common.messages.codec import Count, M, Message, PeerId, SequenceIdField, TokenIds, decode, encode
from molink_common.messages.model import Dtype, FetchFile, FileChunk, FileOffer, ModelCard
from molink_common.messages.pool import (
    AssignStage,
    HeadReport,
    Heartbeat,
    JoinPool,
    ReleaseStage,
    StagePhase,
    StageReport,
    Welcome,
)
from molink_common.messages.steps import (
    AskSequences,
    FinishReason,
    SequencesHeld,
    StartSequence,
    StepTokens,
    StopSequence,
    TokenEvent,
    TokenLogprob,
)

__all__ = [
    "Admitted",
    "AskSequences",
    "AskState",
    "AssignStage",
    "CancelSequence",
    "ClusterState",
    "Count",
    "Done",
    "Dtype",
    "Failed",
    "FetchFile",
    "FileChunk",
    "FileOffer",
    "FinishReason",
    "GatewayAlive",
    "HeadReport",
    "Heartbeat",
    "JoinPool",
    "M",
    "Message",
    "ModelCard",
    "PeerId",
    "PipelineState",
    "RefusalCode",
    "Refused",
    "ReleaseStage",
    "SequenceFailed",
    "SequenceIdField",
    "SequencesHeld",
    "StagePhase",
    "StageReport",
    "StartSequence",
    "StepTokens",
    "StopSequence",
    "SubmitSequence",
    "TokenEvent",
    "TokenIds",
    "TokenLogprob",
    "Welcome",
    "WorkerState",
    "decode",
    "encode",
]
