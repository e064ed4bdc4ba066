"""Tokens that were lost on their way to this gateway alone: the scheduler has them, so it is asked.

One question at a time for a sequence, a few at a time in all. Each ends: with the tokens, or after some attempts.
"""

from __future__ import annotations

import asyncio

from molink_common.identity import SequenceId
from molink_common.logs import get_logger
from molink_gateway.api_errors import ApiError
from molink_gateway.mailbox import Mailbox
from molink_gateway.scheduler_link import Recovered, SchedulerLink

log = get_logger("gateway.mending")

_MOST_AT_A_TIME = 16
_PAUSES_S = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Between attempts: after a broker's restart the scheduler may come back later than the gateway."""
_UNKNOWN_PAUSE_S = 1.0
_FORGOTTEN = "The pool does not know this sequence any more. Send the request again."


class Mender:
    """`serve` must run while `ask` is used; without it nothing is asked."""

    def __init__(self, scheduler: SchedulerLink) -> None:
        self._scheduler = scheduler
        self._slots = asyncio.Semaphore(_MOST_AT_A_TIME)
        self._group: asyncio.TaskGroup | None = None
        self._asking: set[SequenceId] = set()
        self.num_filled = 0
        """Tokens that came this way."""

    async def serve(self) -> None:
        """Be the parent of all questions. Runs until cancelled."""
        async with asyncio.TaskGroup() as self._group:
            await asyncio.Event().wait()

    def ask(self, sequence: SequenceId, mailbox: Mailbox) -> None:
        """Fill the mailbox with what the scheduler has of a sequence, unless that is under way already."""
        if self._group is not None and sequence not in self._asking:
            self._asking.add(sequence)
            self._group.create_task(self._mend(sequence, mailbox))

    async def _mend(self, sequence: SequenceId, mailbox: Mailbox) -> None:
        try:
            for pause_s in _PAUSES_S:
                if mailbox.has_ended(sequence):
                    return
                try:
                    if await self._fill(sequence, mailbox):
                        return
                except ApiError as error:
                    log.debug("tokens cannot be asked for yet", sequence=sequence, problem=error.message)
                await asyncio.sleep(pause_s)  # a pause between attempts, of which there are few
        finally:
            self._asking.discard(sequence)

    async def _fill(self, sequence: SequenceId, mailbox: Mailbox) -> bool:
        """Whether there is an answer: tokens, or that there will be none."""
        before = mailbox.num_in_order(sequence)
        recovered = await self._resume(sequence)
        if recovered is None and mailbox.outlives_client:
            # its last tokens may still be on their way here, when it has just ended
            await asyncio.sleep(_UNKNOWN_PAUSE_S)
            recovered = await self._resume(sequence)
            if recovered is None and mailbox.num_in_order(sequence) == before:
                mailbox.fail(sequence, ApiError(503, _FORGOTTEN, code="sequence_lost", retry_after_s=1))
        if recovered is not None:
            had = mailbox.num_in_order(sequence)
            mailbox.fill(sequence, recovered.generated, recovered.finish)
            filled = min(mailbox.num_in_order(sequence), len(recovered.generated)) - had
            if filled > 0:
                self.num_filled += filled
                log.info("tokens that were lost are here", sequence=sequence, tokens=filled)
        return True

    async def _resume(self, sequence: SequenceId) -> Recovered | None:
        async with self._slots:
            return await self._scheduler.resume(sequence)
