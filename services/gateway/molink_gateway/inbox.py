"""One sequence's tokens, brought into order. Pure.

Each token carries its index. One that was seen before is dropped (a pipeline that was rebuilt may say some again),
one that comes early waits until the gap before it is filled: a gap is never shown.
"""

from __future__ import annotations

from molink_common.messages import TokenEvent


class Inbox:
    """The order of one sequence."""

    def __init__(self) -> None:
        self.next_index = 0
        """Of the token whose turn it is."""
        self._early: dict[int, TokenEvent] = {}
        self.num_repeated = 0

    @property
    def has_gap(self) -> bool:
        """Whether a later token is here and an earlier one is not."""
        return bool(self._early)

    def accept(self, event: TokenEvent) -> list[TokenEvent]:
        """Take a token; gives those whose turn it is now, in order."""
        if event.index != self.next_index:
            if event.index < self.next_index or event.index in self._early:
                self.num_repeated += 1
            else:
                self._early[event.index] = event
            return []
        ready = [event]
        self.next_index += 1
        while self._early and (following := self._early.pop(self.next_index, None)) is not None:
            ready.append(following)
            self.next_index += 1
        return ready
