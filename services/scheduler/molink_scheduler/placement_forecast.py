"""What a layer map is expected to do, and whether another one is worth the move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from molink_common.messages import Dtype, ModelCard
from molink_scheduler.placement_sizes import Candidate, Roads, Sizes, candidates_of
from molink_scheduler.placement_values import LayerMap, Offer, Placement, PlacementSettings

_DEFAULT = PlacementSettings()


class Forecast:
    """Times of layer maps over one pool. They compare with each other only within a pool: see `candidates_of`."""

    def __init__(
        self, card: ModelCard, offers: Sequence[Offer], *, dtype: Dtype, settings: PlacementSettings = _DEFAULT
    ) -> None:
        self._sizes = Sizes(card, dtype, settings)
        self._roads = Roads(offers, self._sizes.step_bytes)
        self._candidates: Mapping[str, Candidate] = {
            one.offer.worker: one for one in candidates_of(offers, dtype, settings.overhead_bytes)
        }

    def bottleneck_s(self, layer_map: LayerMap) -> float:
        """The slowest stage or link: one step comes out every so many seconds when enough are under way.

        Raises:
            KeyError: a worker of the map is not in the pool.
        """
        links_s = [self._roads.step_s(a.offer, b.offer) for a, b in self._links(layer_map)]
        return max(*self.stages_s(layer_map), *links_s, 0.0)

    def stages_s(self, layer_map: LayerMap) -> list[float]:
        """Of each stage, head first. Raises as `bottleneck_s`."""
        return [
            self._sizes.stage_s(self._candidates[stage.worker].pace, stage.first_layer, stage.last_layer)
            for stage in layer_map.stages
        ]

    def crossings(self, layer_map: LayerMap) -> int:
        """How many links are slow ones."""
        return sum(self._roads.crosses(a.offer, b.offer) for a, b in self._links(layer_map))

    def steps_per_s(self, layer_maps: Sequence[LayerMap]) -> float:
        """Of pipelines side by side."""
        return sum(1 / self.bottleneck_s(layer_map) for layer_map in layer_maps)

    def _links(self, layer_map: LayerMap) -> list[tuple[Candidate, Candidate]]:
        workers = [self._candidates[stage.worker] for stage in layer_map.stages]
        return list(pairwise(workers))


def can_hold(
    card: ModelCard,
    offer: Offer,
    first: int,
    last: int,
    num_blocks: int,
    dtype: Dtype,
    settings: PlacementSettings = _DEFAULT,
) -> bool:
    """Whether the worker has room for layers ``[first, last)`` and that many KV blocks beside the overhead."""
    needed = Sizes(card, dtype, settings).needed_bytes(first, last, num_blocks)
    return needed + settings.overhead_bytes <= offer.memory_bytes


def is_worth_moving(
    present: LayerMap | Sequence[LayerMap],
    better: Placement,
    offers: Sequence[Offer],
    card: ModelCard,
    *,
    dtype: Dtype,
    settings: PlacementSettings = _DEFAULT,
    factor: float = 1.2,
    pause_s: float = 5.0,
    horizon_s: float = 300.0,
) -> bool:
    """Whether to serve by `better` instead: its throughput must exceed the present one by `factor`.

    And it must win back, within `horizon_s`, the steps that are not made in the `pause_s` of the move. True where the
    present pipelines cannot go on, because one of their workers is not among the offers.
    """
    maps = [present] if isinstance(present, LayerMap) else list(present)
    if not better.pipelines or tuple(maps) == better.pipelines:
        return False
    there = {offer.worker for offer in offers}
    if not all(stage.worker in there for layer_map in maps for stage in layer_map.stages):
        return True
    forecast = Forecast(card, offers, dtype=dtype, settings=settings)
    now_per_s, then_per_s = forecast.steps_per_s(maps), forecast.steps_per_s(better.pipelines)
    return then_per_s >= factor * now_per_s and then_per_s * (horizon_s - pause_s) > now_per_s * horizon_s
