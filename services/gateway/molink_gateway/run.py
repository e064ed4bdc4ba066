"""The choices of a request, growing from its mailbox."""

from __future__ import annotations

from molink_common.identity import SequenceId
from molink_gateway.access_log import RequestRecord
from molink_gateway.choice import Delta
from molink_gateway.mailbox import Mailbox
from molink_gateway.preparation import Prepared
from molink_gateway.replies import Chunk, usage_of
from molink_gateway.sequences import Sequences
from molink_gateway.stream_place import Part, Place


class Run:
    """Feeds tokens to choices, stops what has met a stop string, and counts."""

    def __init__(self, prepared: Prepared, mailbox: Mailbox, sequences: Sequences, record: RequestRecord) -> None:
        self._prepared = prepared
        self._mailbox = mailbox
        self._sequences = sequences
        self._record = record
        self._num_going_on = len(prepared.choices)
        self._num_tokens = 0

    @property
    def is_going_on(self) -> bool:
        """Whether a choice has not ended."""
        return self._num_going_on > 0

    def usage(self) -> Chunk:
        """Token counts so far."""
        return usage_of(self._prepared.num_prompt_tokens, self._num_tokens)

    def place(self, part: Part) -> str | None:
        """The id of the event that is told now; None for an answer of several sequences."""
        stream = self._prepared.stream
        return None if stream is None else Place(sequence=stream, num_tokens=self._num_tokens, part=part).encode()

    async def grow(self, wait_s: float) -> list[tuple[int, Delta]]:
        """What the choices grew by; empty when nothing came for `wait_s`. What the client has is left out.

        Raises:
            ApiError: the request cannot be answered to its end.
        """
        deltas: dict[int, Delta] = {}
        for choice, event in await self._mailbox.take(wait_s):
            growing = self._prepared.choices[choice]
            if growing.finish is not None:
                continue
            self._record.saw_token()
            self._num_tokens += 1
            delta = self._untold(growing.feed(event))
            known = deltas.get(choice)
            deltas[choice] = delta if known is None else known.joined(delta)
            if growing.finish is not None:
                self._num_going_on -= 1
                if growing.is_cut_short:
                    await self._cut(self._prepared.submission.ids[choice], growing.num_tokens)
        self._record.completion_tokens = self._num_tokens
        return list(deltas.items())

    async def _cut(self, sequence: SequenceId, num_tokens: int) -> None:
        is_kept = self._mailbox.outlives_client and self._mailbox.has_ended(sequence)
        if not is_kept:  # what is kept for a client that may come back needs no stopping, and must stay
            await self._sequences.cut(sequence, num_tokens)

    def _untold(self, delta: Delta) -> Delta:
        """Of a stream that is taken up: what comes after the client's last event."""
        told = self._prepared.told
        if told is None or self._num_tokens > told.num_tokens:
            return delta
        return Delta(finish=delta.finish if told.part is Part.TEXT else None)
