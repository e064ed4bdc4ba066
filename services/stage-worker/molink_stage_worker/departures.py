"""Which sequences are leaving the stages, and what the next steps are to close.

A frame of one class may arrive after a frame of the other that was sent later. So the blocks of a sequence that
leaves stay taken until no frame that names them can be on its way: until every step of it, or a later one of the same
class, has come back. Its close then travels with the next step of each class, so whoever gets such a block gets it
after the close, whichever class it goes by.

Who comes back itself (after a preemption) waits longer: until a step with its close has come back. If the close and
the new opening were lost together, a step after them could go on where the former life stood, in blocks that are
somebody else's now.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from molink_common.wire import Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """A sequence that no further step will serve in this life."""

    id: str
    number: int
    last_steps: Mapping[Traffic, int]
    """By class, the last step that served it."""
    opened_by: int | None
    """The step that opened it; None: none has."""


class Departures:
    """No IO, no clock."""

    def __init__(self) -> None:
        self._leaving: dict[int, Leaving] = {}
        """By number."""
        self._returned = dict.fromkeys(Traffic, 0)
        """By class, the newest step that came back: none before it is still on its way."""
        self._closes: dict[Traffic, dict[str, int]] = {traffic: {} for traffic in Traffic}
        """By class, what its next step closes, with the step that opened it."""
        self._closing: dict[str, int] = {}
        """The same, until such a step has come back."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of the sequences whose blocks are still taken."""
        return tuple(self._leaving)

    def is_leaving(self, number: int) -> bool:
        """Whether the blocks of the sequence's former life are still taken."""
        return number in self._leaving

    def may_come_back(self, name: str, number: int) -> bool:
        """Whether every stage has forgotten the sequence's former life."""
        return number not in self._leaving and name not in self._closing

    def has_returned(self, last_steps: Mapping[Traffic, int], *, but: Traffic | None = None) -> bool:
        """Whether nothing of a sequence can be on its way, not looking at class `but`."""
        return all(traffic is but or last <= self._returned[traffic] for traffic, last in last_steps.items())

    def is_awaited(self, traffic: Traffic, last_steps: Mapping[Traffic, int]) -> bool:
        """Whether a step of this class must come back before nothing of a sequence can be on its way."""
        return last_steps.get(traffic, 0) > self._returned[traffic]

    def awaits(self, traffic: Traffic) -> bool:
        """Whether a step of this class must come back before all can leave."""
        return any(self.is_awaited(traffic, one.last_steps) for one in self._leaving.values())

    def leave(self, leaving: Leaving) -> bool:
        """True: its blocks are free now. False: `step_returned` will name it."""
        if self.has_returned(leaving.last_steps):
            self._close(leaving)
            return True
        self._leaving[leaving.number] = leaving
        return False

    def step_returned(self, step: int, traffic: Traffic, closes: Mapping[str, int]) -> list[int]:
        """Numbers of the sequences whose blocks are free now."""
        self._returned[traffic] = step
        for name, opened in closes.items():
            for pending in (*self._closes.values(), self._closing):
                if pending.get(name) == opened:
                    del pending[name]
        return self._let_go()

    def nothing_on_its_way(self, step: int) -> list[int]:
        """No frame of `step` or of one before it will be taken any more: a new epoch has begun. As `step_returned`."""
        self._returned = dict.fromkeys(Traffic, step)
        return self._let_go()

    def step_lost(self, traffic: Traffic, closes: Mapping[str, int]) -> None:
        """What the step was to close is to be closed by another."""
        for name, opened in closes.items():
            self._closes[traffic].setdefault(name, opened)

    def take_closes(self, traffic: Traffic) -> dict[str, int]:
        """For the step of this class that is being made."""
        closes, self._closes[traffic] = self._closes[traffic], {}
        return closes

    def class_to_close(self) -> Traffic | None:
        """By which class a step that only closes should go; None: there is nothing to close."""
        return next((traffic for traffic, closes in self._closes.items() if closes), None)

    def _close(self, leaving: Leaving) -> None:
        if leaving.opened_by is not None:
            for pending in (*self._closes.values(), self._closing):
                pending[leaving.id] = leaving.opened_by

    def _let_go(self) -> list[int]:
        clear = [one for one in self._leaving.values() if self.has_returned(one.last_steps)]
        for one in clear:
            del self._leaving[one.number]
            self._close(one)
        return [one.number for one in clear]
