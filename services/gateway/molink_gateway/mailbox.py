"""Where the tokens of one request wait for the coroutine that answers it.

Bounded by what the request may generate. Every wait has an end: for the first token, for a further one, and for one
that was overtaken. Before that end, `on_doubt` is called for sequences whose tokens may have been lost on their way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from molink_common.identity import SequenceId
from molink_common.messages import FinishReason, PromptLogprobs, TokenEvent
from molink_gateway.api_errors import ApiError
from molink_gateway.inbox import Inbox
from molink_gateway.prompt_logprobs import PromptInbox
from molink_gateway.questions import HOLE_S, SILENCE_S, Questions


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to wait for a first token, for a further one, and for one that was overtaken."""

    queue_timeout_s: float
    stall_timeout_s: float
    gap_timeout_s: float
    doubt_hole_s: float = HOLE_S
    doubt_silence_s: float = SILENCE_S


def _ignore(_: SequenceId) -> None:
    return


class Mailbox:
    """Tokens of the sequences of one request, each sequence in order."""

    def __init__(
        self,
        sequences: Sequence[SequenceId],
        patience: Patience,
        on_doubt: Callable[[SequenceId], None] = _ignore,
        prompts: Mapping[SequenceId, PromptInbox] = MappingProxyType({}),
    ) -> None:
        self._inboxes = {sequence: Inbox() for sequence in sequences}
        self._choice_of = {sequence: choice for choice, sequence in enumerate(sequences)}
        self._ended: set[SequenceId] = set()
        self._patience = patience
        self._on_doubt = on_doubt
        self._prompts = prompts
        self._items: list[tuple[int, TokenEvent]] = []
        self._error: ApiError | None = None
        self._is_interrupted = False
        self._news = asyncio.Event()
        self._has_spoken = False
        self._quiet_since_s: float | None = None
        self._with_gap: set[SequenceId] = set()
        self._gap_since_s: float | None = None
        self._questions = Questions(
            asyncio.get_running_loop().time(), hole_s=patience.doubt_hole_s, silence_s=patience.doubt_silence_s
        )
        self.outlives_client = False
        """The client knows how to come back for the stream: its sequence runs on without it."""

    @property
    def sequences(self) -> tuple[SequenceId, ...]:
        """In the order of their choices."""
        return tuple(self._inboxes)

    @property
    def runs_on(self) -> bool:
        """Whether somebody may come back for what this mailbox does not wait for any more."""
        return self.outlives_client and (self._error is None or self._is_interrupted)

    def put(self, event: TokenEvent) -> None:
        """A token arrived, in any order, perhaps again."""
        if event.sequence in self._ended:
            return
        choice, inbox = self._choice_of[event.sequence], self._inboxes[event.sequence]
        for ready in inbox.accept(event):
            self._items.append((choice, ready))
            if ready.finish is not None:
                self._ended.add(event.sequence)
        self._note_gap(event.sequence, has_gap=inbox.has_gap and event.sequence not in self._ended)
        if self._items:
            self._news.set()

    def put_prompt(self, part: PromptLogprobs) -> None:
        """Log probabilities of a prompt arrived, perhaps again. They come before the first token."""
        if (inbox := self._prompts.get(part.sequence)) is not None:
            inbox.put(part)

    def fill(self, sequence: SequenceId, generated: Sequence[int], finish: FinishReason | None) -> None:
        """All tokens of a sequence so far, as the scheduler has them: take those that are not here."""
        first = self._inboxes[sequence].next_index
        for index, token in enumerate(generated[first:], first):
            is_last = index == len(generated) - 1
            self.put(TokenEvent(sequence=sequence, index=index, token=token, finish=finish if is_last else None))

    def num_in_order(self, sequence: SequenceId) -> int:
        """How many of a sequence's tokens have come without a gap."""
        return self._inboxes[sequence].next_index

    def fail(self, sequence: SequenceId, error: ApiError) -> None:
        """One sequence cannot go on: the request fails, unless that sequence has ended."""
        if sequence not in self._ended:
            self._ended.add(sequence)
            self.close(error)

    def close(self, error: ApiError) -> None:
        """The request fails once the tokens that are here are taken."""
        self._error = self._error or error
        self._news.set()

    def interrupt(self, error: ApiError) -> None:
        """As `close`, but only this answer ends: the stream may be taken up again."""
        if self._error is None:
            self._is_interrupted = True
        self.close(error)

    def end(self, sequence: SequenceId) -> None:
        """No more tokens of this sequence are wanted."""
        self._ended.add(sequence)
        self._note_gap(sequence, has_gap=False)

    def has_ended(self, sequence: SequenceId) -> bool:
        """Whether the pipeline has nothing more to do for this sequence, as far as is known here."""
        return sequence in self._ended

    async def take(self, wait_s: float) -> list[tuple[int, TokenEvent]]:
        """The tokens that have come, each with the number of its choice; empty when none came in `wait_s`.

        Raises:
            ApiError: a sequence failed, or nothing came for longer than there is patience.
        """
        loop = asyncio.get_running_loop()
        until_s = loop.time() + wait_s
        if self._quiet_since_s is None:
            self._quiet_since_s = loop.time()
        while not self._items:
            if self._error is not None:
                raise self._error
            now_s = loop.time()
            given_up_s = self._given_up_s(self._quiet_since_s)
            if now_s >= given_up_s:
                self._error = self._out_of_patience()
                raise self._error
            if now_s >= until_s:
                return []
            if now_s >= self._questions.due_s:
                self._questions.asked(now_s)
                self._doubt()
            self._news.clear()
            try:
                async with asyncio.timeout_at(min(until_s, given_up_s, self._questions.due_s)):
                    await self._news.wait()
            except TimeoutError:
                continue
        self._news.clear()
        items, self._items = self._items, []
        self._has_spoken = True
        self._quiet_since_s = loop.time()
        self._questions.heard(self._quiet_since_s)
        return items

    def _doubt(self) -> None:
        for sequence in self._with_gap or self._inboxes.keys() - self._ended:
            self._on_doubt(sequence)

    def _note_gap(self, sequence: SequenceId, *, has_gap: bool) -> None:
        if has_gap == (sequence in self._with_gap):
            return
        now_s = asyncio.get_running_loop().time()
        if has_gap:
            self._with_gap.add(sequence)
            self._gap_since_s = self._gap_since_s or now_s
        else:
            self._with_gap.discard(sequence)
            if not self._with_gap:
                self._gap_since_s = None
        self._questions.holes(now_s, has_hole=bool(self._with_gap))
        self._news.set()

    def _given_up_s(self, quiet_since_s: float) -> float:
        if self._gap_since_s is not None:
            return self._gap_since_s + self._patience.gap_timeout_s
        return quiet_since_s + self._most_silent_s()

    def _most_silent_s(self) -> float:
        return self._patience.stall_timeout_s if self._has_spoken else self._patience.queue_timeout_s

    def _out_of_patience(self) -> ApiError:
        if self._gap_since_s is not None:
            return ApiError(503, "A token was lost on its way and did not come again.", code="stalled", retry_after_s=1)
        what = "further" if self._has_spoken else "first"
        return ApiError(
            503, f"No {what} token came within {self._most_silent_s():g} s.", code="stalled", retry_after_s=5
        )
