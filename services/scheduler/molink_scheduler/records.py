"""What survives a restart: the values that the store keeps, and a snapshot of all of them."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from molink_common.messages import (
    ApiKey,
    Dtype,
    FinishReason,
    Heartbeat,
    LinkCodec,
    ModelCard,
    PipelinePolicy,
    SubmitSequence,
)


class StageRecord(BaseModel):
    """Layers ``[first_layer, last_layer)`` on a worker."""

    model_config = ConfigDict(frozen=True)
    worker: str
    first_layer: int
    last_layer: int
    codec: LinkCodec = LinkCodec.AUTO
    """Of the link to the next stage."""


class PipelineRecord(BaseModel):
    """A pipeline's layer map in one epoch."""

    model_config = ConfigDict(frozen=True)
    pipeline: int
    epoch: int
    card: ModelCard
    dtype: Dtype
    num_blocks: int
    block_size: int
    policy: PipelinePolicy = PipelinePolicy()
    stages: tuple[StageRecord, ...]
    """Head first."""
    continued_epochs: tuple[int, ...] = ()
    """Earlier epochs whose sequences the head has taken along into this one, oldest first."""

    @property
    def head(self) -> str:
        """The worker of the first stage."""
        return self.stages[0].worker

    @property
    def lives(self) -> frozenset[int]:
        """Epochs in which a sequence may have been started that the head holds now."""
        return frozenset((self.epoch, *self.continued_epochs))

    @property
    def workers(self) -> frozenset[str]:
        """Everybody who holds a stage."""
        return frozenset(stage.worker for stage in self.stages)

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that the KV blocks of the pipeline hold."""
        return self.num_blocks * self.block_size


class SequenceRecord(BaseModel):
    """An admitted sequence without its tokens."""

    model_config = ConfigDict(frozen=True)
    request: SubmitSequence
    fingerprint: str
    """Of the model that began it; tokens of another model cannot continue it."""
    started_epoch: int | None = None
    """The epoch whose head has confirmed that it holds the sequence."""
    finish: FinishReason | None = None
    """Why it ended; None while it is served."""
    num_generated: int | None = None
    """How many of its tokens count, once it has ended: a stop string may end it before the last of them."""


class KeyUsage(BaseModel):
    """What an API key has used on the last day on which it was used."""

    model_config = ConfigDict(frozen=True)
    key: str
    day: int
    """Since 1970, UTC."""
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSequence:
    """A sequence with the tokens that were kept of it."""

    record: SequenceRecord
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything that the store holds."""

    epoch: int = 0
    pipelines: tuple[PipelineRecord, ...] = ()
    sequences: tuple[StoredSequence, ...] = ()
    workers: tuple[Heartbeat, ...] = ()
    keys: tuple[ApiKey, ...] = ()
    usage: tuple[KeyUsage, ...] = ()
