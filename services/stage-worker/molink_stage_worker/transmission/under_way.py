"""What has been sent of one class and is not acknowledged."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

_MAX_ENTRIES = 16384
"""More are forgotten, oldest first: without acknowledgements the ledger must not grow for ever."""


@dataclass(slots=True)
class InFlight:
    """One published message."""

    step: int
    end: int
    size_bytes: int
    sent_s: float
    has_more: bool
    """Something else waited to be sent behind it."""
    foreseen_s: float | None
    """What `LinkQueue.on_send` said; None: the rate was not known."""
    number: int


class UnderWay:
    """A ledger in the order of sending. An acknowledgement settles everything sent before it, too."""

    def __init__(self) -> None:
        self.bytes = 0
        """Sent, and neither acknowledged nor written off."""
        self._entries: deque[InFlight] = deque()
        self._by_place: dict[tuple[int, int], InFlight] = {}
        self._next_number = 0
        self._written_off_before = 0

    def add(
        self, *, step: int, end: int, size_bytes: int, sent_s: float, has_more: bool, foreseen_s: float | None
    ) -> None:
        """`end` is where the message ends in its frame."""
        self.bytes += size_bytes
        entry = InFlight(step, end, size_bytes, sent_s, has_more, foreseen_s, self._next_number)
        self._next_number += 1
        self._entries.append(entry)
        self._by_place[step, end] = entry
        if len(self._entries) > _MAX_ENTRIES:
            self._settle()

    def take(self, step: int, end: int) -> Sequence[InFlight]:
        """Everything sent up to there, the acknowledged message last; nothing if that is not under way."""
        acknowledged = self._by_place.get((step, end))
        if acknowledged is None:
            return ()
        taken = [self._settle()]
        while taken[-1] is not acknowledged:
            taken.append(self._settle())
        return taken

    @property
    def oldest_s(self) -> float | None:
        """When the oldest of what is not acknowledged was sent, written off or not; None: there is nothing."""
        return self._entries[0].sent_s if self._entries else None

    def write_off(self) -> int:
        """Count what is under way no longer. Its late acknowledgements are still understood."""
        gone = self.bytes
        self.bytes = 0
        self._written_off_before = self._next_number
        return gone

    def clear(self) -> set[int]:
        """Forget everything: the steps of which a part was under way."""
        steps = {entry.step for entry in self._entries}
        self._entries.clear()
        self._by_place.clear()
        self.bytes = 0
        return steps

    def _settle(self) -> InFlight:
        entry = self._entries.popleft()
        if self._by_place.get((entry.step, entry.end)) is entry:
            del self._by_place[entry.step, entry.end]
        if entry.number >= self._written_off_before:
            self.bytes -= entry.size_bytes
        return entry

    def check_invariants(self) -> None:
        """For tests: the books agree."""
        counted = sum(entry.size_bytes for entry in self._entries if entry.number >= self._written_off_before)
        assert counted == self.bytes, (counted, self.bytes)
        assert len(self._by_place) <= len(self._entries)
