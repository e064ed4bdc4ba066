"""From an assignment's layers to an engine that holds them, and what memory they need."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from molink_common.memory import spare_what_lives
from molink_common.messages import AssignStage, Dtype, ModelCard
from molink_stage_worker.engine.interface import Engine, Progress, StageSpec

_CHECKPOINT_SHARE = 0.5
"""Of the progress of loading: fetching the tensors; the rest is the engine's."""

Told = Callable[[str, float | None], None]
"""Told what is being done and the share that is done, None where nobody knows."""

EngineLoader = Callable[[StageSpec, Progress], Engine]


class Checkpoints(Protocol):
    """Where a stage's tensors come from."""

    @property
    def card(self) -> ModelCard:
        """The model."""

    def checkpoint_for(self, first: int, last: int, progress: Told) -> Path:
        """A folder with at least the tensors of layers ``[first, last)``. Blocks; runs in a thread."""


class LoadingAbandoned(Exception):
    """What is being loaded is not wanted any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Which weights an engine holds. Engines of equal weights can stand for each other."""

    fingerprint: str
    first_layer: int
    last_layer: int
    dtype: Dtype

    @classmethod
    def of(cls, stage: AssignStage) -> Weights:
        """What a stage needs."""
        return cls(
            fingerprint=stage.fingerprint,
            first_layer=stage.first_layer,
            last_layer=stage.last_layer,
            dtype=stage.dtype,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """How many KV blocks a stage has, of how many tokens each."""

    num_blocks: int
    block_size: int

    @classmethod
    def of(cls, stage: AssignStage) -> Blocks:
        """What a stage is to have."""
        return cls(num_blocks=stage.num_blocks, block_size=stage.block_size)


def weight_bytes(card: ModelCard, weights: Weights) -> int:
    """What these weights take, by the model's card."""
    parameters = sum(card.layer_parameters[weights.first_layer : weights.last_layer])
    if weights.first_layer == 0:
        parameters += card.embedding_parameters
    if weights.last_layer == card.num_layers:
        parameters += card.output_parameters
    return parameters * weights.dtype.size_bytes


def kv_bytes(card: ModelCard, weights: Weights, blocks: Blocks) -> int:
    """What a stage's KV blocks take once all have been used."""
    scalars = sum(card.kv_scalars_per_token[weights.first_layer : weights.last_layer])
    return scalars * weights.dtype.size_bytes * blocks.num_blocks * blocks.block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLoader:
    """Loads on this machine's device. Its calls block and belong into a thread."""

    load_engine: EngineLoader
    device: str

    def load(
        self,
        weights: Weights,
        blocks: Blocks,
        checkpoints: Checkpoints,
        *,
        abandoned: threading.Event,
        advance: Progress,
    ) -> Engine:
        """Fetch no more than these layers and make an engine of them. `advance` is told the share that is done.

        Raises:
            LoadingAbandoned: `abandoned` was set meanwhile.
            ModelError: the tensors cannot be fetched or loaded.
        """

        def told(share: float) -> None:
            if abandoned.is_set():
                raise LoadingAbandoned
            advance(share)

        told(0.0)
        folder = checkpoints.checkpoint_for(
            weights.first_layer,
            weights.last_layer,
            lambda _doing, share: told((share or 0.0) * _CHECKPOINT_SHARE),
        )
        spec = StageSpec(
            checkpoint=folder,
            first_layer=weights.first_layer,
            last_layer=weights.last_layer,
            num_layers=checkpoints.card.num_layers,
            dtype=weights.dtype,
            device=self.device,
            num_blocks=blocks.num_blocks,
            block_size=blocks.block_size,
        )
        engine = self.load_engine(spec, lambda share: told(_CHECKPOINT_SHARE + share * (1 - _CHECKPOINT_SHARE)))
        spare_what_lives()
        told(1.0)
        return engine
