"""The state of everything, for ``molink status`` and the gateways."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from molink_common.messages.codec import Count, Message
from molink_common.messages.model import Dtype, ModelCard
from molink_common.messages.pool import HeadReport, PipelinePolicy, StageReport


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
    policy: PipelinePolicy = PipelinePolicy()
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
    term: Count = 0
    """Of the scheduler that says this. One of a higher term has taken over from it."""
    sequences: Count = 0
    max_sequences: Count = 0
    keys_revision: str = ""
    """Another one whenever the table of API keys is; empty while there is none."""
