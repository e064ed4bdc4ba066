"""Which faults are done, in which order, drawn from a seed. Decisions only."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum


class FaultKind(StrEnum):
    """What is done to the system."""

    KILL_HEAD = "kill-head"
    KILL_MIDDLE = "kill-middle"
    KILL_TAIL = "kill-tail"
    KILL_STANDBY = "kill-standby"
    STOP_HEAD = "stop-head"
    STOP_MIDDLE = "stop-middle"
    STOP_TAIL = "stop-tail"
    STOP_STANDBY = "stop-standby"
    HOLD_LINK = "hold-link"
    """A serving worker's link carries nothing for a while, as when a cable is out; connections stay open."""
    CLOSE_LINK = "close-link"
    """A serving worker's connections are broken off, and it gets no new ones for a while."""
    KILL_SCHEDULER = "kill-scheduler"
    """The active one."""
    RESTART_NATS = "restart-nats"
    RESTART_REDIS = "restart-redis"
    KILL_GATEWAY = "kill-gateway"


WITHOUT_GATEWAYS = tuple(kind for kind in FaultKind if kind is not FaultKind.KILL_GATEWAY)

_LASTS_S = {
    FaultKind.STOP_HEAD: (3.0, 6.0),
    FaultKind.STOP_MIDDLE: (3.0, 6.0),
    FaultKind.STOP_TAIL: (3.0, 6.0),
    FaultKind.STOP_STANDBY: (3.0, 6.0),
    FaultKind.HOLD_LINK: (1.0, 5.0),
    FaultKind.CLOSE_LINK: (1.0, 5.0),
    FaultKind.RESTART_NATS: (0.3, 2.0),
    FaultKind.RESTART_REDIS: (0.3, 3.0),
}
_AWAY_S = (1.0, 5.0)
"""How long a killed part stays away until its operator starts it again."""
_STREAMS_BEFORE_S = (1.0, 4.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault to do."""

    kind: FaultKind
    pick: float
    """In [0, 1): which one, where several would do."""
    lasts_s: float
    """Until it is mended: the process goes on or is started again, the link carries again."""
    streams_before_s: float
    """How long streams run undisturbed before it."""

    def choose(self, candidates: Sequence[str]) -> str | None:
        """The one of `candidates` that it is done to; None if there is none."""
        return candidates[int(self.pick * len(candidates))] if candidates else None


def plan_faults(count: int, kinds: Sequence[FaultKind], seed: int) -> list[Fault]:
    """`count` faults. Kinds come in random order, each of them once before any comes again."""
    dice = random.Random(seed)
    order = _endless_rounds(kinds, dice)
    return [
        Fault(
            kind=(kind := next(order)),
            pick=dice.random(),
            lasts_s=round(dice.uniform(*_LASTS_S.get(kind, _AWAY_S)), 2),
            streams_before_s=round(dice.uniform(*_STREAMS_BEFORE_S), 2),
        )
        for _ in range(count)
    ]


def _endless_rounds(kinds: Sequence[FaultKind], dice: random.Random) -> Iterator[FaultKind]:
    while True:
        yield from dice.sample(list(kinds), len(kinds))


def stage_place(kind: FaultKind, num_stages: int, pick: float) -> int | None:
    """The index of the stage that a kill or stop is for; None: it is for a worker without a stage.

    A pipeline without a middle has its tail hit instead.
    """
    match kind:
        case FaultKind.KILL_HEAD | FaultKind.STOP_HEAD:
            return 0
        case FaultKind.KILL_MIDDLE | FaultKind.STOP_MIDDLE if num_stages > 2:
            return 1 + int(pick * (num_stages - 2))
        case FaultKind.KILL_STANDBY | FaultKind.STOP_STANDBY:
            return None
        case _:
            return num_stages - 1
