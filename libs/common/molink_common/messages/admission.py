"""Between gateway and scheduler: a sequence comes, is refused, cancelled or given up."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from molink_common.messages.codec import Count, Message, PeerId, Priority, SequenceIdField, Tenant, TokenIds
from molink_common.sampling import SamplingOptions


class Done(Message):
    """The request was carried out or taken on."""

    TYPE = "done"


class Failed(Message):
    """The request was not carried out; nothing changed."""

    TYPE = "failed"
    message: str


class SubmitSequence(Message):
    """A new sequence. The gateway chose its id and listens for its tokens already."""

    TYPE = "submit_sequence"
    sequence: SequenceIdField
    gateway: PeerId
    request: str
    """The request id, for logs."""
    choice: Count = 0
    """Which of the request's answers it is; the first one counts as the request."""
    model: str
    prompt: Annotated[TokenIds, Field(min_length=1)]
    options: SamplingOptions
    tenant: Tenant = ""
    priority: Priority = 0
    trace: str | None = None
    """W3C ``traceparent`` of the request's span, if it is sampled."""
    resume_state: str | None = None
    """What a gateway needs to go on with the stream in place of another one. With it the sequence runs on when its
    client or its gateway goes away, and is kept for a minute after its end."""


class ResumeSequence(Message):
    """A client has come back for a stream: the sequence is this gateway's now, which listens for its tokens already."""

    TYPE = "resume_sequence"
    sequence: SequenceIdField
    gateway: PeerId
    tenant: Tenant | None = None
    """Whose stream it has to be; None: it is this gateway's already."""


class Resumed(Message):
    """The sequence and every token so far; what comes later is published as for any sequence."""

    TYPE = "resumed"
    request: SubmitSequence
    generated: TokenIds = ()
    finish: str | None = None
    """A `FinishReason`; None while it runs."""


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
    OVERLOADED = "overloaded"
    """Its first token would come too late; in time for others than a full queue."""
    RATE_LIMITED = "rate_limit_exceeded"
    """The tenant asks more often, or for more at a time, than its key allows."""
    QUOTA = "insufficient_quota"
    """The tenant's tokens are used up."""
    REVOKED = "invalid_api_key"
    """The tenant's key is not valid any more."""


class Refused(Message):
    """The sequence was not admitted; nothing was kept."""

    TYPE = "refused"
    sequence: SequenceIdField
    code: RefusalCode
    message: str
    retry_after_s: Annotated[float, Field(ge=0)] | None = None
    holds_s: Annotated[float, Field(ge=0)] | None = None
    """For so long every request of the same tenant would be refused alike: nobody need ask."""


class CancelSequence(Message):
    """The client went away or a stop string was met: free everything. Unknown ids are ignored."""

    TYPE = "cancel_sequence"
    sequence: SequenceIdField
    reason: str
    after_tokens: Count | None = None
    """A stop string ends the answer with this many tokens. A sequence with `resume_state` is then kept as one that
    has ended, once these tokens are in the books: its client may not have read the end."""


class SequenceFailed(Message):
    """An admitted sequence cannot be finished."""

    TYPE = "sequence_failed"
    sequence: SequenceIdField
    message: str


class GatewayAlive(Message):
    """Sent every two seconds. A gateway that is silent for ten has its sequences cancelled."""

    TYPE = "gateway_alive"
    gateway: PeerId
