"""Which worker holds which layers: a pure function from the model and the workers' offers to a layer map.

A stage's cost is its number of parameters, the output head's included (that of a small model with a large
vocabulary computes as much as several layers), and a constant for each layer, whose many calls take their time
however few its parameters are. A worker's share is its memory. The cut makes the largest
cost ÷ share as small as memory allows, then evens out the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from molink_common.messages import Dtype, ModelCard

_CALLS_OF_A_LAYER = 4_000_000
"""What a layer's norms, rotation and attention cost beside its products, in parameters of a product that would
take as long: about 0.3 ms at 13 million parameters a millisecond, of a decode step on one core of a server CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What was measured between a worker and a peer."""

    peer: str
    round_trip_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a worker brings. `memory_bytes` is for weights, KV blocks and the fixed overhead together."""

    worker: str
    memory_bytes: int
    device: str = "cpu"
    site: str = "default"
    parameters_per_s: float | None = None
    """Measured speed; None until measured. Not weighed yet."""
    links: tuple[Link, ...] = ()
    """Measured links to peers. Not weighed yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSettings:
    """Bounds of a placement."""

    min_stages: int = 1
    max_stages: int | None = None
    """None: as many as there are workers and layers."""
    kv_tokens: int = 131072
    min_kv_tokens: int = 2048
    block_size: int = 16
    overhead_bytes: int = 64 * 1024 * 1024


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
    """Empty when the pool cannot hold the model."""
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


def choose_dtype(setting: Dtype | None, native: Sequence[tuple[Dtype, ...]]) -> Dtype:
    """The pipeline's dtype; `setting` None means: bfloat16 where every worker is best at it, else float32."""
    if setting is not None:
        return setting
    all_best_at_bfloat16 = bool(native) and all(kinds[:1] == (Dtype.BFLOAT16,) for kinds in native)
    return Dtype.BFLOAT16 if all_best_at_bfloat16 else Dtype.FLOAT32


def place(card: ModelCard, offers: Sequence[Offer], *, dtype: Dtype, settings: PlacementSettings) -> Placement:
    """Cut the model over the offers: every layer once, in order, within memory.

    Every fit worker gets a stage, up to `max_stages` and the number of layers, the larger ones first. A worker
    without room for a single layer is left out; so are the smallest when no cut over all of them fits.
    """
    sizes = _Sizes(card, dtype, settings)
    reasons: dict[str, str] = {}
    able: list[Offer] = []
    for offer in offers:
        if sizes.usable_bytes(offer) < sizes.smallest_layer_bytes:
            reasons[offer.worker] = (
                f"its {_mib(offer.memory_bytes)} do not hold one layer "
                f"({_mib(sizes.smallest_layer_bytes + settings.overhead_bytes)} with KV room and overhead)"
            )
        else:
            able.append(offer)
    most = min(len(able), card.num_layers, settings.max_stages or card.num_layers)
    if settings.min_stages > card.num_layers:
        return _without_pipeline(
            reasons, able, 0, f"{settings.min_stages} stages asked for, the model has {card.num_layers} layers"
        )
    if most >= settings.min_stages:
        largest_first = sorted(able, key=lambda offer: -offer.memory_bytes)
        for count in range(most, settings.min_stages - 1, -1):
            chosen = {offer.worker for offer in largest_first[:count]}
            for order in _orders([offer for offer in able if offer.worker in chosen]):
                cuts = sizes.cut([sizes.usable_bytes(offer) for offer in order])
                if cuts is not None:
                    reasons |= _why_unused(able, chosen, most, card.num_layers, settings)
                    return _placed(sizes, order, cuts, reasons)
    return _refused(sizes, able, reasons, settings)


class _Sizes:
    """Bytes and costs of runs of layers, by prefix sums."""

    def __init__(self, card: ModelCard, dtype: Dtype, settings: PlacementSettings) -> None:
        scalar = dtype.size_bytes
        self.num_layers = card.num_layers
        self.block_size = settings.block_size
        self.overhead_bytes = settings.overhead_bytes
        self.most_blocks = max(1, settings.kv_tokens // settings.block_size)
        least_tokens = min(settings.min_kv_tokens, settings.kv_tokens, card.context_length)
        self.least_blocks = min(self.most_blocks, -(-least_tokens // settings.block_size))
        self._parameters = [0, *accumulate(card.layer_parameters)]
        self._kv_bytes = [0, *accumulate(kv * scalar * settings.block_size for kv in card.kv_scalars_per_token)]
        self._scalar = scalar
        self._embedding = card.embedding_parameters
        self._output = card.output_parameters
        self.smallest_layer_bytes = min(
            self._scalar * (self._parameters[i + 1] - self._parameters[i])
            + self.least_blocks * self.block_bytes(i, i + 1)
            for i in range(card.num_layers)
        )

    def usable_bytes(self, offer: Offer) -> int:
        return offer.memory_bytes - self.overhead_bytes

    def weight_bytes(self, first: int, last: int) -> int:
        parameters = self._parameters[last] - self._parameters[first]
        if first == 0:
            parameters += self._embedding
        if last == self.num_layers:
            parameters += self._output
        return parameters * self._scalar

    def block_bytes(self, first: int, last: int) -> int:
        """Of one KV block on the stage."""
        return self._kv_bytes[last] - self._kv_bytes[first]

    def needed_bytes(self, first: int, last: int) -> int:
        return self.weight_bytes(first, last) + self.least_blocks * self.block_bytes(first, last)

    def cost(self, first: int, last: int) -> int:
        """In parameters. The embedding is a look-up and costs nothing."""
        layers = self._parameters[last] - self._parameters[first] + (last - first) * _CALLS_OF_A_LAYER
        return layers + (self._output if last == self.num_layers else 0)

    def cut(self, usable: Sequence[int]) -> list[int] | None:
        """Where each stage ends, or None when no cut in this order fits. O(stages × layers²)."""
        total = sum(usable)
        best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
        for index, room in enumerate(usable):
            left = len(usable) - index - 1
            ends = range(index + 1, self.num_layers - left + 1) if left else (self.num_layers,)
            reached: dict[int, tuple[float, float, list[int]]] = {}
            for last in ends:
                for first, (worst, squares, cuts) in best.items():
                    if first >= last or self.needed_bytes(first, last) > room:
                        continue
                    load = self.cost(first, last) * total / room
                    found = (max(worst, load), squares + load * load)
                    if last not in reached or found < reached[last][:2]:
                        reached[last] = (*found, [*cuts, last])
            best = reached
        return best[self.num_layers][2] if self.num_layers in best else None


def _orders(offers: Sequence[Offer]) -> Iterator[list[Offer]]:
    """Orders worth trying: sites kept together; the head also holds the embedding, the tail the output head."""
    memory_of_site: dict[str, int] = {}
    for offer in offers:
        memory_of_site[offer.site] = memory_of_site.get(offer.site, 0) + offer.memory_bytes
    by_site = sorted(offers, key=lambda offer: (-memory_of_site[offer.site], offer.site))
    yield by_site
    if len({offer.memory_bytes for offer in offers}) == 1 and len(memory_of_site) == 1:
        return
    yield by_site[::-1]
    small_first = sorted(offers, key=lambda offer: offer.memory_bytes)
    yield small_first
    yield small_first[::-1]
    yield [*small_first[-2:-1], *small_first[:-2], *small_first[-1:]]


def _placed(sizes: _Sizes, order: Sequence[Offer], cuts: Sequence[int], reasons: dict[str, str]) -> Placement:
    stages: list[PlacedStage] = []
    num_blocks = sizes.most_blocks
    first = 0
    for offer, last in zip(order, cuts, strict=True):
        weights = sizes.weight_bytes(first, last)
        block_bytes = sizes.block_bytes(first, last)
        if block_bytes:
            num_blocks = min(num_blocks, (sizes.usable_bytes(offer) - weights) // block_bytes)
        stages.append(PlacedStage(worker=offer.worker, first_layer=first, last_layer=last, weight_bytes=weights))
        reasons[offer.worker] = f"holds layers {first} to {last - 1} of {sizes.num_layers} ({_mib(weights)} of weights)"
        first = last
    return Placement(pipelines=(LayerMap(stages=tuple(stages), num_blocks=num_blocks),), reasons=reasons)


def _why_unused(
    able: Sequence[Offer], chosen: set[str], most: int, num_layers: int, settings: PlacementSettings
) -> dict[str, str]:
    if len(chosen) < most:
        why = "with it, no cut of the layers fits into everybody's memory"
    elif most == num_layers:
        why = f"the model has only {num_layers} layers"
    else:
        why = f"the pipeline has the {settings.max_stages} stages that the settings ask for"
    return {offer.worker: why for offer in able if offer.worker not in chosen}


def _refused(sizes: _Sizes, able: Sequence[Offer], reasons: dict[str, str], settings: PlacementSettings) -> Placement:
    if len(able) < settings.min_stages and settings.min_stages > 1:
        problem = f"waiting for {settings.min_stages} workers that have room, {len(able)} are there"
        return _without_pipeline(reasons, able, 0, problem)
    needed = sizes.needed_bytes(0, sizes.num_layers)
    usable = sum(sizes.usable_bytes(offer) for offer in able)
    missing = max(needed - usable, 0)
    if missing:
        problem = (
            f"{_mib(missing)} of memory are missing: the model needs {_mib(needed)} with the least KV room, "
            f"{len(able)} fit worker(s) offer {_mib(usable)} beside the overhead"
        )
    else:
        missing = 1
        problem = f"the workers' {_mib(usable)} are enough in sum, but no cut of the layers fits into every one"
    return _without_pipeline(reasons, able, missing, problem)


def _without_pipeline(reasons: dict[str, str], able: Sequence[Offer], missing: int, problem: str) -> Placement:
    return Placement(
        pipelines=(),
        reasons=reasons | {offer.worker: problem for offer in able},
        missing_bytes=missing,
        problem=problem,
    )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB" if size_bytes >= 2**20 else f"{size_bytes:,} bytes"
