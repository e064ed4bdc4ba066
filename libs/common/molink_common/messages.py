"""Control messages: small, versioned, typed, orjson.

Every message is a frozen pydantic model with a `TYPE`. On the wire it is one JSON object with two more keys,
``"v"`` (protocol version) and ``"type"``. Fields that a receiver does not know are ignored, so that a newer
peer may add some; an unknown type, a wrong version or a wrong value is a `ProtocolError`.
"""

from __future__ import annotations

import base64
from enum import StrEnum
from typing import Annotated, Any, ClassVar, TypeVar

import orjson
from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, ValidationError

from molink_common import PROTOCOL_VERSION
from molink_common.errors import ProtocolError
from molink_common.sampling import SamplingOptions

PeerId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
SequenceIdField = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Count = Annotated[int, Field(ge=0)]
TokenIds = tuple[Count, ...]


class Message(BaseModel):
    """Base of all control messages."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    TYPE: ClassVar[str]


M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """One JSON object with the message's fields, its type and the protocol version."""
    body: dict[str, Any] = message.model_dump(mode="python")
    body["v"] = PROTOCOL_VERSION
    body["type"] = message.TYPE
    return orjson.dumps(body, option=orjson.OPT_NON_STR_KEYS, default=_encode_rest)


def _encode_rest(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("ascii")  # pydantic has made it base64 already
    raise TypeError(f"{type(value).__name__} cannot stand in a message")


def decode(data: bytes | memoryview, *expected: type[M]) -> M:
    """The message in `data`, which must be one of the `expected` types.

    Raises:
        ProtocolError: not JSON, another version, another type, or a field with a wrong value.
    """
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ProtocolError(f"a control message is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ProtocolError("a control message is not a JSON object")
    if body.get("v") != PROTOCOL_VERSION:
        raise ProtocolError(f"protocol version {body.get('v')!r}, this side speaks {PROTOCOL_VERSION}")
    for message_type in expected:
        if body.get("type") == message_type.TYPE:
            try:
                return message_type.model_validate(body)
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(str(part) for part in first["loc"])
                raise ProtocolError(f"{message_type.TYPE}: {place}: {first['msg']}") from error
    names = ", ".join(message_type.TYPE for message_type in expected)
    raise ProtocolError(f"a message of type {body.get('type')!r} where one of ({names}) belongs")


# --- the model ---------------------------------------------------------------------------------------------


class FileOffer(BaseModel):
    """A file that a worker hands out on request (see `FetchFile`)."""

    model_config = ConfigDict(frozen=True)
    name: str
    size_bytes: Count
    sha256: str


class ModelCard(BaseModel):
    """What the parts need to know of a model without its weights.

    Parameter counts are numbers of scalars, so that memory follows from the pipeline's dtype.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    """Its real name in the API, e.g. ``SmolLM2-135M-Instruct``."""
    aliases: tuple[str, ...] = ()
    """Other names that the API accepts, e.g. ``demo``."""
    fingerprint: str
    """Equal fingerprints mean the same configuration and the same weights."""
    family: str
    """transformers' ``model_type``."""
    packed: bool
    """Whether steps of many sequences run as one packed pass; else sequence by sequence."""
    num_layers: Annotated[int, Field(ge=1)]
    hidden_size: Annotated[int, Field(ge=1)]
    vocabulary_size: Annotated[int, Field(ge=1)]
    context_length: Annotated[int, Field(ge=1)]
    checkpoint_dtype: str
    layer_parameters: tuple[int, ...]
    """Per layer."""
    embedding_parameters: Count
    """What the head holds beside its layers."""
    output_parameters: Count
    """What the tail holds beside its layers (final norm and output head, also when tied)."""
    kv_scalars_per_token: tuple[int, ...]
    """Per layer: keys and values of one token."""
    eos_token_ids: tuple[int, ...] = ()
    tokenizer_files: tuple[FileOffer, ...] = ()


class Dtype(StrEnum):
    """Number formats of weights and activations."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def size_bytes(self) -> int:
        """Bytes of one scalar."""
        return 4 if self is Dtype.FLOAT32 else 2


# --- answers -----------------------------------------------------------------------------------------------


class Done(Message):
    """The request was carried out or taken on."""

    TYPE = "done"


class Failed(Message):
    """The request was not carried out; nothing changed."""

    TYPE = "failed"
    message: str


# --- gateway ↔ scheduler -----------------------------------------------------------------------------------


class SubmitSequence(Message):
    """A new sequence. The gateway chose its id and listens for its tokens already."""

    TYPE = "submit_sequence"
    sequence: SequenceIdField
    gateway: PeerId
    request: str
    """The request id, for logs."""
    model: str
    prompt: Annotated[TokenIds, Field(min_length=1)]
    options: SamplingOptions
    trace: str | None = None
    """W3C ``traceparent`` of the request's span, if it is sampled."""


class Admitted(Message):
    """The sequence is in the scheduler's books; from now on it ends in tokens or in `SequenceFailed`."""

    TYPE = "admitted"
    sequence: SequenceIdField


class RefusalCode(StrEnum):
    """Why a sequence was not admitted."""

    UNKNOWN_MODEL = "model_not_found"
    TOO_LONG = "context_length_exceeded"
    QUEUE_FULL = "queue_full"
    NO_PIPELINE = "no_pipeline"


class Refused(Message):
    """The sequence was not admitted; nothing was kept."""

    TYPE = "refused"
    sequence: SequenceIdField
    code: RefusalCode
    message: str
    retry_after_s: Annotated[float, Field(ge=0)] | None = None


class CancelSequence(Message):
    """The client went away or a stop string was met: free everything. Unknown ids are ignored."""

    TYPE = "cancel_sequence"
    sequence: SequenceIdField
    reason: str


class SequenceFailed(Message):
    """An admitted sequence cannot be finished."""

    TYPE = "sequence_failed"
    sequence: SequenceIdField
    message: str


class GatewayAlive(Message):
    """Sent every two seconds. A gateway that is silent for ten has its sequences cancelled."""

    TYPE = "gateway_alive"
    gateway: PeerId


# --- scheduler ↔ worker ------------------------------------------------------------------------------------


class JoinPool(Message):
    """A worker asks to be let in and which model to prepare for."""

    TYPE = "join_pool"
    worker: PeerId


class Welcome(Message):
    """What the pool serves. `model` is a reference: ``demo``, a folder, a GGUF file or a hub id."""

    TYPE = "welcome"
    model: str


class StagePhase(StrEnum):
    """The life of a stage on a worker."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


class HeadReport(BaseModel):
    """The head's queue and KV blocks."""

    model_config = ConfigDict(frozen=True)
    running: Count
    waiting: Count
    free_blocks: Count
    num_blocks: Count
    steps_under_way: Count
    oldest_step_age_s: float = 0.0
    preemptions: Count = 0


class StageReport(BaseModel):
    """The stage that a worker holds or is loading."""

    model_config = ConfigDict(frozen=True)
    pipeline: Count
    epoch: Count
    index: Count
    first_layer: Count
    last_layer: Count
    phase: StagePhase
    progress: Annotated[float, Field(ge=0, le=1)] = 0.0
    problem: str | None = None
    steps_done: Count = 0
    tokens_done: Count = 0
    compute_s: float = 0.0
    """Time spent computing since the stage was loaded."""
    frames_dropped: Count = 0
    head: HeadReport | None = None


class Heartbeat(Message):
    """Sent every second and at once when something in it changes."""

    TYPE = "heartbeat"
    worker: PeerId
    site: str = "default"
    version: str
    device: str
    """``cpu``, ``cuda:0``, ``mps``."""
    device_name: str
    native_dtypes: tuple[Dtype, ...]
    """What this device computes natively, best first."""
    memory_bytes: Count
    """What the worker offers for weights and KV blocks together."""
    rss_bytes: Count = 0
    card: ModelCard | None = None
    """None until the model is prepared."""
    preparing: str | None = None
    """What the worker is doing before it can take a stage: ``downloading 40 %``."""
    problem: str | None = None
    """Why the worker cannot serve, in words for a person."""
    leaving: bool = False
    """The worker is about to stop: its stage is to be placed elsewhere."""
    stage: StageReport | None = None


class AssignStage(Message):
    """Load layers ``[first_layer, last_layer)`` and serve them. Answered at once; progress is in heartbeats.

    Whatever the worker held before is dropped. An assignment of an older epoch than the present one fails.
    """

    TYPE = "assign_stage"
    pipeline: Count
    epoch: Count
    fingerprint: str
    index: Count
    num_stages: Annotated[int, Field(ge=1)]
    first_layer: Count
    last_layer: Count
    dtype: Dtype
    num_blocks: Annotated[int, Field(ge=1)]
    block_size: Annotated[int, Field(ge=1)]
    """Tokens a KV block."""
    max_steps_under_way: Annotated[int, Field(ge=1)]
    """How many micro-batches the head keeps in the pipeline."""


class ReleaseStage(Message):
    """Drop the stage of this pipeline, whatever its epoch."""

    TYPE = "release_stage"
    pipeline: Count


class StartSequence(Message):
    """To the head: run this sequence. `generated` is what it has produced already (after a recovery)."""

    TYPE = "start_sequence"
    pipeline: Count
    epoch: Count
    sequence: SequenceIdField
    prompt: Annotated[TokenIds, Field(min_length=1)]
    generated: TokenIds = ()
    options: SamplingOptions
    trace: str | None = None


class StopSequence(Message):
    """To the head: forget this sequence and free its blocks on every stage. Unknown ids are ignored."""

    TYPE = "stop_sequence"
    pipeline: Count
    sequence: SequenceIdField


class AskSequences(Message):
    """To the head: which sequences do you hold? A scheduler that has restarted compares its books."""

    TYPE = "ask_sequences"
    pipeline: Count


class SequencesHeld(Message):
    """The head's answer to `AskSequences`."""

    TYPE = "sequences_held"
    pipeline: Count
    epoch: Count
    sequences: tuple[SequenceIdField, ...]


# --- tail → head, gateway, scheduler -----------------------------------------------------------------------


class FinishReason(StrEnum):
    """Why a sequence ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


class TokenLogprob(BaseModel):
    """A token with its natural-log probability."""

    model_config = ConfigDict(frozen=True)
    token: Count
    logprob: float


class TokenEvent(BaseModel):
    """One new token of one sequence."""

    model_config = ConfigDict(frozen=True)
    sequence: SequenceIdField
    index: Count
    """0 for the first generated token. A receiver drops an index that it has seen."""
    token: Count
    finish: FinishReason | None = None
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


class StepTokens(Message):
    """A step reached the end of the pipeline. Published for every step, also one without a token."""

    TYPE = "step_tokens"
    pipeline: Count
    epoch: Count
    step: Count
    events: tuple[TokenEvent, ...] = ()
    failed: tuple[SequenceIdField, ...] = ()
    """Sequences whose logits were not finite: they cannot go on."""


# --- files -------------------------------------------------------------------------------------------------


class FetchFile(Message):
    """A piece of one of the card's `tokenizer_files`."""

    TYPE = "fetch_file"
    name: str
    offset_bytes: Count
    size_bytes: Annotated[int, Field(ge=1, le=512 * 1024)]


class FileChunk(Message):
    """The bytes asked for; fewer only at the end of the file."""

    TYPE = "file_chunk"
    data: Base64Bytes

    @classmethod
    def holding(cls, raw: bytes) -> FileChunk:
        """A chunk that carries `raw`."""
        return cls(data=base64.b64encode(raw))


# --- the state of everything -------------------------------------------------------------------------------


class AskState(Message):
    """Ask the scheduler for a `ClusterState` now."""

    TYPE = "ask_state"


class WorkerState(BaseModel):
    """A worker as the scheduler sees it."""

    model_config = ConfigDict(frozen=True)
    worker: str
    site: str
    device: str
    device_name: str
    memory_bytes: int
    rss_bytes: int
    silent_s: float
    """Seconds since its last heartbeat."""
    role: str
    """``stage 0 of pipeline 1``, ``standby``, ``preparing``, ``unfit``."""
    reason: str
    """Why it has that role, in words."""
    stage: StageReport | None = None


class PipelineState(BaseModel):
    """A pipeline and its layer map."""

    model_config = ConfigDict(frozen=True)
    pipeline: int
    epoch: int
    ready: bool
    model: str
    dtype: Dtype
    num_blocks: int
    block_size: int
    max_steps_under_way: int
    stages: tuple[str, ...]
    """Worker ids, head first."""
    layers: tuple[tuple[int, int], ...]
    """``[first, last)`` of each stage."""
    head: HeadReport | None = None


class ClusterState(Message):
    """Everything that `molink status` and the gateways need to know."""

    TYPE = "cluster_state"
    ready: bool
    """Whether a request sent now can be answered."""
    reason: str
    """Why not, or ``ready``."""
    card: ModelCard | None = None
    workers: tuple[WorkerState, ...] = ()
    pipelines: tuple[PipelineState, ...] = ()
    sequences: Count = 0
    max_sequences: Count = 0
