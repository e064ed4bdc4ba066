"""Which life of a sequence a stage knows.

A sequence may be closed and opened again (after a preemption or a loss). Frames of two classes may overtake each
other, so a close can come after the opening of the next life: it names the step that opened the life it ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from molink_common.identity import sequence_number
from molink_common.wire import Entry


class Lives:
    """By sequence, the step that opened its present life here."""

    def __init__(self) -> None:
        self._opened: dict[int, int] = {}

    def close(self, closes: Mapping[str, int]) -> tuple[str, ...]:
        """Those of `closes` that end the present life of their sequence."""
        ended = []
        for name, opened in closes.items():
            number = sequence_number(name)
            if self._opened.get(number, opened) <= opened:
                self._opened.pop(number, None)
                ended.append(name)
        return tuple(ended)

    def open(self, entries: Iterable[Entry], step: int) -> None:
        """Take up the sequences that a step opens."""
        for entry in entries:
            if entry.opens:
                self._opened[entry.sequence] = step
