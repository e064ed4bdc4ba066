"""Between scheduler and head, and from the tail to all: sequences at work and their tokens."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from molink_common.messages.codec import Count, Message, Priority, SequenceIdField, Tenant, TokenIds
from molink_common.sampling import SamplingOptions


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
    tenant: Tenant = ""
    priority: Priority = 0
    interruptions: Count = 0
    """How many losses it has met since its last token: who has waited through several goes on first."""


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
    cached_tokens: Count | None = None
    """With the first token: how many of the prompt's tokens needed no computing, since their KV blocks were there."""


class PromptLogprobs(BaseModel):
    """Log probabilities of a run of the prompt's tokens, before any sampling option is applied."""

    model_config = ConfigDict(frozen=True)
    sequence: SequenceIdField
    start: Annotated[int, Field(ge=1)]
    """Place in the prompt of the first token told; the very first token of a prompt has no probability."""
    logprobs: tuple[float, ...]
    """Of the prompt's own tokens."""
    ranks: tuple[Count, ...] = ()
    """Of the prompt's own tokens: 1 is the likeliest of the vocabulary."""
    likeliest: tuple[tuple[TokenLogprob, ...], ...] = ()
    """At each place, as many as `SamplingOptions.prompt_logprobs` asks for."""


class StepTokens(Message):
    """A step reached the end of the pipeline. Published for every step, also one without a token."""

    TYPE = "step_tokens"
    pipeline: Count
    epoch: Count
    step: Count
    events: tuple[TokenEvent, ...] = ()
    failed: tuple[SequenceIdField, ...] = ()
    """Sequences that are given up: their logits were not finite, or their steps were lost again and again."""
    refused: tuple[SequenceIdField, ...] = ()
    """Of whose tokens in this step a stage could make nothing. The head computes them again."""
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    """Of the prompts in this step that ask for them. A gateway may get a place twice (after a loss)."""
    timings: tuple[tuple[Count, Count, Count, Count, Count, Count], ...] = ()
    """Of each stage, head first: the fields of `wire.StageTiming`."""
