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
