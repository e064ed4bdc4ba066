"""What runs of layers need and what they cost a worker, by prefix sums.

A stage's time for a decode step is that of passing its parameters once, the output head's included (that of a small
model with a large vocabulary computes as much as several layers), a constant for each layer, whose many calls take
their time however few its parameters are, and a constant for the stage. A worker whose speed was not measured counts
as the median of those whose speed was. Where nobody's was, the share of the layers is that of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median

from molink_common.messages import Dtype, ModelCard
from molink_scheduler.placement_values import Link, Offer, PlacementSettings

LAYER_CALLS_S = 0.3e-3
"""What a layer's norms, rotation and attention take beside its products in a decode step, on any device: they are
small, so that starting them is most of it."""
STAGE_S = 1e-3
"""What a step costs a stage beside its layers: receiving, masks and positions, sending."""
_TYPICAL_PARAMETERS_PER_S = 13e9
"""One core of a server CPU. Only the unit of time where no speed was measured."""
_AMPLE = 8
"""Times the least KV room: for as much, a pipeline takes more stages than its speed needs."""
_SLOW_ROUND_TRIP_S = 5e-3
"""From here on a measured link counts as a slow crossing."""
_UNMEASURED_CROSSING_S = 20e-3
"""One way between two sites that nobody has measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long a worker takes for a decode step's parts."""

    parameter_s: float
    layer_s: float
    stage_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A worker that may hold a stage."""

    offer: Offer
    room_bytes: int
    """For weights and KV blocks."""
    pace: Pace

    @property
    def site(self) -> str:
        """Where it is."""
        return self.offer.site


class Sizes:
    """Bytes of runs of layers, and what they cost a worker."""

    def __init__(self, card: ModelCard, dtype: Dtype, settings: PlacementSettings) -> None:
        scalar = dtype.size_bytes
        self.num_layers = card.num_layers
        self.step_bytes = settings.step_tokens * card.hidden_size * scalar
        """What a decode step carries over a link."""
        self.most_blocks = max(1, settings.kv_tokens // settings.block_size)
        least_tokens = min(settings.min_kv_tokens, settings.kv_tokens, card.context_length)
        self.least_blocks = min(self.most_blocks, -(-least_tokens // settings.block_size))
        self.ample_blocks = min(self.most_blocks, _AMPLE * self.least_blocks)
        layers = card.layer_parameters
        # the embedding is a look-up: it is held, at no time; it counts for the stage that begins at layer 0
        self._held = [0, *(total + card.embedding_parameters for total in accumulate(layers))]
        self._passed = [0, *accumulate(layers)]
        for totals in (self._held, self._passed):
            totals[-1] += card.output_parameters
        self._kv_bytes = [0, *accumulate(kv * scalar * settings.block_size for kv in card.kv_scalars_per_token)]
        self._scalar = scalar
        self._layer_parameters = sum(layers) / card.num_layers
        self.smallest_layer_bytes = min(
            layers[i] * scalar + self.least_blocks * self.block_bytes(i, i + 1) for i in range(card.num_layers)
        )

    def weight_bytes(self, first: int, last: int) -> int:
        """Of layers ``[first, last)``, with the embedding at the head and the output head at the tail."""
        return (self._held[last] - self._held[first]) * self._scalar

    def block_bytes(self, first: int, last: int) -> int:
        """Of one KV block on the stage."""
        return self._kv_bytes[last] - self._kv_bytes[first]

    def needed_bytes(self, first: int, last: int, num_blocks: int) -> int:
        """Weights and KV blocks."""
        return self.weight_bytes(first, last) + num_blocks * self.block_bytes(first, last)

    def stage_s(self, pace: Pace, first: int, last: int) -> float:
        """How long the stage takes for a decode step."""
        passed = self._passed[last] - self._passed[first]
        return pace.stage_s + passed * pace.parameter_s + (last - first) * pace.layer_s

    def slowest_s(self, order: Sequence[Candidate], ends: Sequence[int]) -> float:
        """Of the stages on these workers that end at these layers."""
        return max(
            self.stage_s(candidate.pace, first, last)
            for candidate, first, last in zip(order, [0, *ends[:-1]], ends, strict=True)
        )

    def reach(self, candidate: Candidate, first: int, most_s: float, num_blocks: int) -> int:
        """The farthest end of a stage from `first` within time and memory; `first` where not one layer is."""
        low, high = first, self.num_layers
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits(candidate, first, middle, most_s, num_blocks):
                low = middle
            else:
                high = middle - 1
        return low

    def reaches(self, candidate: Candidate, most_s: float, num_blocks: int) -> list[int]:
        """`reach` from every layer."""
        ends: list[int] = []
        last = 0
        for first in range(self.num_layers):
            last = max(first, last)
            while last < self.num_layers and self.fits(candidate, first, last + 1, most_s, num_blocks):
                last += 1
            ends.append(last)
        return ends

    def reach_back(self, candidate: Candidate, most_s: float, num_blocks: int) -> int:
        """The first layer of the longest stage that ends the model; the number of layers where there is none."""
        low, high = 0, self.num_layers
        while low < high:
            middle = (low + high) // 2
            if self.fits(candidate, middle, self.num_layers, most_s, num_blocks):
                high = middle
            else:
                low = middle + 1
        return low

    def usual_reach(self, candidate: Candidate, most_s: float, num_blocks: int) -> int:
        """How many layers of the mean size keep within time and memory."""
        pace = candidate.pace
        layer_bytes = self._layer_parameters * self._scalar + num_blocks * self._kv_bytes[-1] / self.num_layers
        room = candidate.room_bytes / max(layer_bytes, 1)
        time = (most_s - pace.stage_s) / (self._layer_parameters * pace.parameter_s + pace.layer_s)
        return int(max(0.0, min(room, time, self.num_layers)))

    def fits(self, candidate: Candidate, first: int, last: int, most_s: float, num_blocks: int) -> bool:
        """Whether the stage keeps within time and memory. If it does, so does every part of it."""
        # as `stage_s` and `needed_bytes` have it, written out: most of the time of planning goes by here
        pace = candidate.pace
        passed = self._passed[last] - self._passed[first]
        if pace.stage_s + passed * pace.parameter_s + (last - first) * pace.layer_s > most_s:
            return False
        held = (self._held[last] - self._held[first]) * self._scalar
        return held + num_blocks * (self._kv_bytes[last] - self._kv_bytes[first]) <= candidate.room_bytes


class Roads:
    """The ways between workers: which are slow, and how long a step's bytes take where the rate was measured."""

    def __init__(self, offers: Sequence[Offer], step_bytes: int) -> None:
        self._links: dict[tuple[str, str], Link] = {}
        for offer in offers:
            for link in offer.links:
                self._links[offer.worker, link.peer] = link
        self._step_bytes = step_bytes

    def crosses(self, sender: Offer, receiver: Offer) -> bool:
        """Whether the way is a slow one: as measured, else between sites."""
        link = self._link(sender, receiver)
        return sender.site != receiver.site if link is None else link.round_trip_s >= _SLOW_ROUND_TRIP_S

    def step_s(self, sender: Offer, receiver: Offer) -> float:
        """How long the link is busy with a step; 0 where its rate is not known."""
        link = self._link(sender, receiver)
        return self._step_bytes / link.bytes_per_s if link is not None and link.bytes_per_s else 0.0

    def one_way_s(self, sender: Offer, receiver: Offer) -> float:
        """How long a step is under way, beside the time that the link is busy with it."""
        link = self._link(sender, receiver)
        if link is not None:
            return link.round_trip_s / 2
        return _UNMEASURED_CROSSING_S if sender.site != receiver.site else 0.0

    def _link(self, sender: Offer, receiver: Offer) -> Link | None:
        there = self._links.get((sender.worker, receiver.worker))
        return there if there is not None else self._links.get((receiver.worker, sender.worker))


def are_measured(offers: Sequence[Offer]) -> bool:
    """Whether anybody's speed is known: then shares follow speed, else memory."""
    return any(offer.parameters_per_s for offer in offers)


def candidates_of(offers: Sequence[Offer], dtype: Dtype, overhead_bytes: int) -> list[Candidate]:
    """The offers with their paces. Paces depend on the whole pool: those of two pools do not compare."""
    rooms = [offer.memory_bytes - overhead_bytes for offer in offers]
    speeds = [_parameters_per_s(offer, dtype) for offer in offers]
    known = [speed for speed in speeds if speed is not None]
    if known:
        usual = median(known)
        paces = [Pace(parameter_s=1 / (speed or usual), layer_s=LAYER_CALLS_S, stage_s=STAGE_S) for speed in speeds]
    else:
        mean_room = max(1.0, sum(rooms) / max(1, len(rooms)))
        shares = [max(room, 1) / mean_room for room in rooms]
        paces = [
            Pace(parameter_s=1 / (_TYPICAL_PARAMETERS_PER_S * share), layer_s=LAYER_CALLS_S / share, stage_s=0.0)
            for share in shares
        ]
    return [
        Candidate(offer=offer, room_bytes=room, pace=pace)
        for offer, room, pace in zip(offers, rooms, paces, strict=True)
    ]


def _parameters_per_s(offer: Offer, dtype: Dtype) -> float | None:
    """In the pipeline's format: a decode step waits for memory, so half the bytes are twice the parameters."""
    if not offer.parameters_per_s:
        return None
    measured_bytes = (offer.measured_in or dtype).size_bytes
    return offer.parameters_per_s * measured_bytes / dtype.size_bytes
