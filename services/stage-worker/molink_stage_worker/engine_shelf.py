"""Loaded engines that no stage uses at present: a stage of the same layers is ready without loading anything."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from molink_common.messages import AssignStage, ModelCard
from molink_stage_worker.engine.interface import Engine
from molink_stage_worker.stage_loading import Blocks, Weights, kv_bytes, weight_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What the stage that the worker holds, or is about to hold, takes."""

    weights: Weights
    weight_bytes: int
    kv_bytes: int

    @classmethod
    def of(cls, card: ModelCard, stage: AssignStage) -> Held:
        """By the model's card."""
        weights = Weights.of(stage)
        return cls(
            weights=weights,
            weight_bytes=weight_bytes(card, weights),
            kv_bytes=kv_bytes(card, weights, Blocks.of(stage)),
        )


class EngineShelf:
    """Keeps engines, without sequences, within a room that they share with the stage that is held. No IO.

    Whatever needs room gets it from what is not wanted, oldest first, then from what is wanted least.
    """

    def __init__(self, room_bytes: int) -> None:
        self.room_bytes = room_bytes
        """For all of the worker: the stage that is held, and the weights here."""
        self.wanted: tuple[Weights, ...] = ()
        """What it is here for, most important first."""
        self._held: Held | None = None
        self._engines: dict[Weights, Engine] = {}

    def __contains__(self, weights: Weights) -> bool:
        """Whether an engine of these weights is here."""
        return weights in self._engines

    @property
    def held(self) -> Weights | None:
        """The weights of the stage that is held, whether they are here still or with the stage."""
        return None if self._held is None else self._held.weights

    def hold(self, held: Held | None) -> None:
        """A stage is held from now on, or none: what it takes is not for the shelf."""
        self._held = held
        self.make_room(0)

    def take(self, weights: Weights) -> Engine | None:
        """An engine of these weights; it is not here any more."""
        return self._engines.pop(weights, None)

    def put(self, weights: Weights, engine: Engine) -> bool:
        """Keep an engine that was reset, if there is room. A second one of the same weights is not kept."""
        if weights in self._engines:
            return False
        self._engines[weights] = engine
        self.make_room(0)
        return weights in self._engines

    def make_room(self, extra_bytes: int, *, sparing: Collection[Weights] = ()) -> bool:
        """Drop engines until that much is free; False if even then it is not."""
        for weights in self._least_wanted_first():
            if self._used_bytes() + extra_bytes <= self.room_bytes:
                break
            if weights not in sparing and weights != self.held:
                del self._engines[weights]
        return self._used_bytes() + extra_bytes <= self.room_bytes

    def _used_bytes(self) -> int:
        used = sum(engine.weight_bytes for engine in self._engines.values())
        if self._held is None:
            return used
        # until the stage has taken its engine from here, that is counted already
        own = 0 if self._held.weights in self._engines else self._held.weight_bytes
        return used + own + self._held.kv_bytes

    def _least_wanted_first(self) -> list[Weights]:
        wanted = [weights for weights in reversed(self.wanted) if weights in self._engines]
        return [weights for weights in self._engines if weights not in wanted] + wanted
