"""Where the tokens of one request wait for the coroutine that answers it.

Bounded by what the request may generate. Every wait has an end: for the first token, for a further one, and for one
that was overtaken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from molink_common.identity import SequenceId
from molink_common.messages import TokenEvent
from molink_gateway.api_errors import ApiError
from molink_gateway.inbox import Inbox


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to wait for a first token, for a further one, and for one that was overtaken."""

    queue_timeout_s: float
    stall_timeout_s: float
    gap_timeout_s: float


class Mailbox:
    """Tokens of the sequences of one request, each sequence in order."""

    def __init__(self, sequences: Sequence[SequenceId], patience: Patience) -> None:
        self._inboxes = {sequence: Inbox() for sequence in sequences}
        self._choice_of = {sequence: choice for choice, sequence in enumerate(sequences)}
        self._ended: set[SequenceId] = set()
        self._patience = patience
        self._items: list[tuple[int, TokenEvent]] = []
        self._error: ApiError | None = None
        self._news = asyncio.Event()
        self._has_spoken = False
        self._quiet_since_s: float | None = None

    def put(self, event: TokenEvent) -> None:
        """A token arrived, in any order, perhaps again."""
        if event.sequence in self._ended:
            return
        choice = self._choice_of[event.sequence]
        for ready in self._inboxes[event.sequence].accept(event):
            self._items.append((choice, ready))
            if ready.finish is not None:
                self._ended.add(event.sequence)
        if self._items:
            self._news.set()

    def fail(self, sequence: SequenceId, error: ApiError) -> None:
        """One sequence cannot go on: the request fails, unless that sequence has ended."""
        if sequence not in self._ended:
            self._ended.add(sequence)
            self.close(error)

    def close(self, error: ApiError) -> None:
        """The request fails once the tokens that are here are taken."""
        self._error = self._error or error
        self._news.set()

    def end(self, sequence: SequenceId) -> None:
        """No more tokens of this sequence are wanted."""
        self._ended.add(sequence)

    def has_ended(self, sequence: SequenceId) -> bool:
        """Whether the pipeline has nothing more to do for this sequence, as far as is known here."""
        return sequence in self._ended

    async def take(self, wait_s: float) -> list[tuple[int, TokenEvent]]:
        """The tokens that have come, each with the number of its choice; empty when none came in `wait_s`.

        Raises:
            ApiError: a sequence failed, or nothing came for longer than there is patience.
        """
        loop = asyncio.get_running_loop()
        if self._quiet_since_s is None:
            self._quiet_since_s = loop.time()
        if not self._items and self._error is None:
            left_s = self._quiet_since_s + self._patience_s() - loop.time()
            try:
                async with asyncio.timeout(min(wait_s, max(left_s, 0))):
                    await self._news.wait()
            except TimeoutError:
                if loop.time() - self._quiet_since_s >= self._patience_s():
                    raise self._out_of_patience() from None
                return []
        self._news.clear()
        if self._items:
            items, self._items = self._items, []
            self._has_spoken = True
            self._quiet_since_s = loop.time()
            return items
        assert self._error is not None
        raise self._error

    def _has_gap(self) -> bool:
        return any(inbox.has_gap for sequence, inbox in self._inboxes.items() if sequence not in self._ended)

    def _patience_s(self) -> float:
        if self._has_gap():
            return self._patience.gap_timeout_s
        return self._patience.stall_timeout_s if self._has_spoken else self._patience.queue_timeout_s

    def _out_of_patience(self) -> ApiError:
        waited_s = self._patience_s()
        if self._has_gap():
            return ApiError(503, "A token was lost on its way and did not come again.", code="stalled", retry_after_s=1)
        what = "further" if self._has_spoken else "first"
        return ApiError(503, f"No {what} token came within {waited_s:g} s.", code="stalled", retry_after_s=5)
