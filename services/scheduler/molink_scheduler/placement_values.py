"""The values that placement takes and gives. Import them from `placement`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from molink_common.messages import Dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What was measured between a worker and a peer, in either direction."""

    peer: str
    round_trip_s: float
    bytes_per_s: float | None = None
    """None: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a worker brings. `memory_bytes` is for weights, KV blocks and the fixed overhead together."""

    worker: str
    memory_bytes: int
    device: str = "cpu"
    site: str = "default"
    parameters_per_s: float | None = None
    """Measured speed; None until measured."""
    measured_in: Dtype | None = None
    """The format of the numbers that `parameters_per_s` was measured with; None: the pipeline's."""
    links: tuple[Link, ...] = ()
    """Measured links to peers; where there is none, workers at one site are near each other, others far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSettings:
    """Bounds of a placement."""

    min_stages: int = 1
    """Of each pipeline."""
    max_stages: int | None = None
    """Of each pipeline; None: as many as there are workers and layers."""
    max_pipelines: int = 1
    hold_back: int = 0
    """How many fit workers are to hold no stage, where the model fits without them."""
    kv_tokens: int = 131072
    min_kv_tokens: int = 2048
    block_size: int = 16
    overhead_bytes: int = 64 * 1024 * 1024
    step_tokens: int = 8
    """What a decode step carries, for the time that it takes a measured link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedStage:
    """Layers ``[first_layer, last_layer)`` on a worker."""

    worker: str
    first_layer: int
    last_layer: int
    weight_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMap:
    """One pipeline: its stages, head first, and the KV blocks that each of them has room for."""

    stages: tuple[PlacedStage, ...]
    num_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The pipelines that the offers make up, and why each worker is or is not used."""

    pipelines: tuple[LayerMap, ...]
    """Empty when the pool cannot hold the model. The first is the one to have if there is to be one."""
    reasons: Mapping[str, str]
    """For every offer, a sentence."""
    missing_bytes: int = 0
    """How much more memory would be needed, 0 when there is a pipeline."""
    problem: str | None = None
    """Why there is no pipeline, in a sentence."""

    @property
    def workers(self) -> frozenset[str]:
        """Those that hold a stage."""
        return frozenset(stage.worker for layer_map in self.pipelines for stage in layer_map.stages)
