"""Between scheduler and workers: joining, heartbeats, stages."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from molink_common.messages.codec import Count, Message, PeerId
from molink_common.messages.model import Dtype, ModelCard


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


class Scheduling(StrEnum):
    """How a pipeline forms micro-batches and sends activations."""

    ADAPTIVE = "adaptive"
    """Micro-batches planned from measurement, decode before bulk, a window adapted to the measured delay."""
    PLAIN = "plain"
    """One micro-batch under way, whole prompts, whole tensors, first in first out. A baseline."""
    PUBLISHED = "published"
    """As the MoLink paper has it: prompts cut for sending, fair turns with decode, the number of micro-batches
    from an assumed link speed. A baseline."""


class Speculation(StrEnum):
    """Whether tokens are guessed, to be verified several in one trip round the pipeline. The text is the same."""

    OFF = "off"
    LOOKUP = "lookup"
    """What followed the last tokens where they stood before in the same text."""


class PipelinePolicy(BaseModel):
    """What the stages of a pipeline must agree on about scheduling."""

    model_config = ConfigDict(frozen=True)
    scheduling: Scheduling = Scheduling.ADAPTIVE
    micro_batches: Annotated[int, Field(ge=1, le=256)] | None = None
    """How many the head keeps under way; None: it plans."""
    assumed_link_bytes_per_s: Annotated[float, Field(gt=0)] = 12.5e6
    """`Scheduling.PUBLISHED` plans with it; nothing else looks at it."""
    speculation: Speculation = Speculation.OFF
    """Only `Scheduling.ADAPTIVE` guesses."""


class LinkCodec(StrEnum):
    """How hidden states are encoded on a link."""

    AUTO = "auto"
    """Raw or lossless, whichever gets them there sooner, by what the link and the encoding were measured to take."""
    RAW = "raw"
    LOSSLESS = "lossless"
    INT8 = "int8"


class LinkReport(BaseModel):
    """The link to the next stage, as its sender has measured it. None: not known yet."""

    model_config = ConfigDict(frozen=True)
    codec: LinkCodec = LinkCodec.AUTO
    """As it was wanted."""
    present_codec: LinkCodec = LinkCodec.RAW
    """Of the newest frame."""
    exactness: str = ""
    share_left: float = 1.0
    """Bytes on the link for each byte of hidden states, lately."""
    round_trip_s: float | None = None
    """The least, of a small frame and its acknowledgement."""
    rate_bytes_per_s: float | None = None
    window_bytes: Count = 0
    """How much of class bulk may be under way."""
    queued_bytes: Count = 0
    """Of class bulk, waiting for the window."""
    sent_bytes: Count = 0
    unacknowledged_s: Annotated[float, Field(ge=0)] = 0.0
    """For how long nothing has been heard of the oldest frame that is not acknowledged."""


class StageCostReport(BaseModel):
    """What a step costs at a stage, as measured: a sum of these times what the step holds."""

    model_config = ConfigDict(frozen=True)
    fixed_s: float
    per_token_s: float
    per_sequence_s: float
    per_context_token_s: float
    observations: Count


class HeadReport(BaseModel):
    """The head's queue, KV blocks and plan."""

    model_config = ConfigDict(frozen=True)
    running: Count
    waiting: Count
    """For a place or for KV blocks."""
    places: Count = 0
    """Most sequences that run at a time. 0: not told."""
    prompt_tokens_waiting: Count = 0
    """Of prompts, running and waiting, for which no step has been planned."""
    free_blocks: Count
    num_blocks: Count
    steps_under_way: Count
    oldest_step_age_s: float = 0.0
    preemptions: Count = 0
    rewinds: Count = 0
    """How often a sequence went back to what every stage has of it, because a step was lost."""
    recomputed: Count = 0
    """How often a sequence was computed anew from its beginning, because a stage lacked a part of it."""
    rebuilt: Count = 0
    """How often a replaced stage got a sequence's KV blocks back out of the journal of the stage before it."""
    cached_blocks: Count = 0
    """Of the free blocks, those that hold the beginning of an earlier text, to be found again."""
    prefix_queries_tokens: Count = 0
    """Tokens of the sequences that were begun."""
    prefix_hits_tokens: Count = 0
    """Of these, the ones that needed no computing since others had left them in KV blocks."""
    drafted_tokens: Count = 0
    """Guesses that were verified with decode steps."""
    accepted_tokens: Count = 0
    """Of these, the right ones: tokens that took no trip round the pipeline of their own."""
    micro_batches: Count = 0
    chunk_tokens: Count = 0
    """Most prompt tokens a step."""
    along_tokens: Count = 0
    """Most prompt tokens of a step of their own that is computed in one pass with a decode step."""
    riding_tokens: Count = 0
    """Most tokens of short prompts in a decode step itself."""
    separate_prefill: bool = False
    """Whether prompts are computed in steps of their own, but for those that ride in decode steps."""
    cycle_s: float | None = None
    """Predicted time between two tokens of a stream."""
    costs: tuple[StageCostReport, ...] = ()
    """By stage, head first, as the head knows them from the timings that come back."""


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
    pass_age_s: Annotated[float, Field(ge=0)] = 0.0
    """How long the present pass has been computing, 0 between passes: a device that hangs shows here."""
    longest_pass_s: Annotated[float, Field(ge=0)] = 0.0
    """Of the passes that ended."""
    frames_dropped: Count = 0
    link: LinkReport | None = None
    """None at the tail."""
    head: HeadReport | None = None


LayerRange = tuple[Count, Count]
"""``[first, last)``."""


class Heartbeat(Message):
    """Sent twice a second and at once when something in it changes."""

    TYPE = "heartbeat"
    worker: PeerId
    sent_s: float | None = None
    """By the worker's own monotonic clock."""
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
    preloaded: tuple[LayerRange, ...] = ()
    """Whose weights are in memory beside the stage at work, for the last `PreloadStages`."""
    parameters_per_s: Annotated[float, Field(gt=0)] | None = None
    """How many parameters a decode step passes in a second on this device, measured at the start."""


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
    policy: PipelinePolicy = PipelinePolicy()
    codec: LinkCodec = LinkCodec.AUTO
    """Of the link to the next stage."""
    continues_epoch: Count | None = None
    """The worker holds this very stage (layers, dtype, blocks, place) in this earlier epoch and is to go on with its
    KV blocks and, at the head, with its sequences. Fails where that is not so."""
    rebuild: Count | None = None
    """With `continues_epoch` at others: the one stage whose KV blocks are empty in this epoch. The head has the
    tokens so far computed again for it alone, from what the stage before it has kept of what it sent."""


class PreloadStages(Message):
    """Have these layers' weights in memory, so that a stage of theirs can be taken on at once.

    The first ones first, as many as there is room for. Replaces what was to be preloaded before. Answered at once.
    """

    TYPE = "preload_stages"
    fingerprint: str
    layers: tuple[LayerRange, ...]
    dtype: Dtype
    num_blocks: Annotated[int, Field(ge=1)]
    block_size: Annotated[int, Field(ge=1)]


class ReleaseStage(Message):
    """Drop the stage of this pipeline, whatever its epoch."""

    TYPE = "release_stage"
    pipeline: Count
