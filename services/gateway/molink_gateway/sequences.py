"""The life of sequences as the gateway sees it: submit, tokens, failure, cancel.

Every sequence that was submitted ends here in tokens, in an error or in a cancellation: `open` cancels on leaving
whatever has not ended. What the scheduler could not be told is told again with the next sign of life.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from molink_common import messages, subjects
from molink_common.bus import Bus, Incoming
from molink_common.errors import BusError, BusUnavailable, NobodyListens, ProtocolError, RequestTimeout
from molink_common.identity import SequenceId
from molink_common.logs import get_logger
from molink_common.messages import (
    Admitted,
    CancelSequence,
    GatewayAlive,
    RefusalCode,
    Refused,
    SequenceFailed,
    StepTokens,
    SubmitSequence,
)
from molink_gateway.api_errors import ApiError, bad_request, busy, unavailable
from molink_gateway.mailbox import Mailbox, Patience

log = get_logger("gateway.sequences")

ALIVE_EVERY_S = 2.0
SUBMIT_TIMEOUT_S = 5.0
_GIVEN_UP = (
    "The pipeline gave this sequence up: its output was not finite, or its steps were lost again and again. Try again."
)
_MOST_UNSENT_CANCELS = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """The sequences of one request, in the order of its choices."""

    sequences: tuple[SubmitSequence, ...]

    @property
    def ids(self) -> tuple[SequenceId, ...]:
        """Their ids."""
        return tuple(one.sequence for one in self.sequences)


def error_of_refusal(refused: Refused) -> ApiError:
    """What the client reads when the scheduler does not take a sequence."""
    retry_after_s = refused.retry_after_s if refused.retry_after_s is not None else 1.0
    match refused.code:
        case RefusalCode.UNKNOWN_MODEL:
            return ApiError(404, refused.message, param="model", code="model_not_found")
        case RefusalCode.TOO_LONG:
            return bad_request(refused.message, code="context_length_exceeded")
        case RefusalCode.QUEUE_FULL:
            return busy(refused.message, retry_after_s=retry_after_s)
        case RefusalCode.NO_PIPELINE:
            return unavailable(refused.message, retry_after_s=retry_after_s)


class Sequences:
    """All open sequences of this gateway. `serve` must run while `open` is used."""

    def __init__(self, bus: Bus, *, gateway: str, patience: Patience) -> None:
        self._bus = bus
        self._gateway = gateway
        self._patience = patience
        self._mailboxes: dict[SequenceId, Mailbox] = {}
        self._unsent_cancels: dict[SequenceId, str] = {}
        self.is_listening = asyncio.Event()

    @property
    def num_open(self) -> int:
        """Sequences whose tokens are awaited."""
        return len(self._mailboxes)

    async def serve(self) -> None:
        """Listen for tokens and failures, and say that this gateway lives. Runs until cancelled."""
        async with contextlib.AsyncExitStack() as stack:
            for subject, handler in (
                (subjects.ALL_TOKENS, self._hear_tokens),
                (subjects.gateway_failures(self._gateway), self._hear_failure),
            ):
                subscription = await self._bus.subscribe(subject, handler)
                stack.push_async_callback(subscription.close)
            self.is_listening.set()
            while True:
                await self._say_alive()
                await asyncio.sleep(ALIVE_EVERY_S)  # a heart beats by the clock

    async def _say_alive(self) -> None:
        with contextlib.suppress(BusUnavailable):
            await self._bus.send(subjects.gateway_alive(self._gateway), GatewayAlive(gateway=self._gateway))
            while self._unsent_cancels:
                sequence, reason = next(iter(self._unsent_cancels.items()))
                await self._bus.send(subjects.CANCEL, CancelSequence(sequence=sequence, reason=reason))
                del self._unsent_cancels[sequence]

    async def _hear_tokens(self, incoming: Incoming) -> None:
        try:
            step = messages.decode(incoming.data, StepTokens)
        except ProtocolError as error:
            log.warning("tokens dropped", problem=str(error))
            return
        for event in step.events:
            mailbox = self._mailboxes.get(event.sequence)  # most may be another gateway's
            if mailbox is not None:
                mailbox.put(event)
        for sequence in step.failed:
            self._fail(sequence, ApiError(500, _GIVEN_UP, code="given_up"))

    async def _hear_failure(self, incoming: Incoming) -> None:
        try:
            failed = messages.decode(incoming.data, SequenceFailed)
        except ProtocolError as error:
            log.warning("failure dropped", problem=str(error))
            return
        self._fail(failed.sequence, ApiError(503, failed.message, code="sequence_failed", retry_after_s=1))

    def _fail(self, sequence: SequenceId, error: ApiError) -> None:
        mailbox = self._mailboxes.get(sequence)
        if mailbox is not None:
            mailbox.fail(sequence, error)

    def fail_all(self, error: ApiError) -> None:
        """End every open request with this error: the gateway stops."""
        for mailbox in set(self._mailboxes.values()):
            mailbox.close(error)

    @contextlib.asynccontextmanager
    async def open(self, submission: Submission) -> AsyncIterator[Mailbox]:
        """Submit the sequences and give the mailbox that their tokens arrive in.

        Raises:
            ApiError: the scheduler refuses one of them or cannot be reached; none goes on then.
        """
        mailbox = Mailbox(submission.ids, self._patience)
        self._mailboxes.update(dict.fromkeys(submission.ids, mailbox))
        # A client that hangs up while the scheduler decides must not cut the question off: its sequences would
        # then run for nobody. So the question goes on beside, and is awaited before the cancellation is sent.
        asking = asyncio.create_task(self._submit(submission.sequences))
        try:
            error = await asyncio.shield(asking)
            if error is not None:
                raise error
            yield mailbox
        finally:
            await self._close(submission.ids, mailbox, asking)

    async def _submit(self, sequences: Sequence[SubmitSequence]) -> ApiError | None:
        """Ask the scheduler for all of them; gives the first error."""
        errors = await asyncio.gather(*(self._submit_one(sequence) for sequence in sequences))
        return next((error for error in errors if error is not None), None)

    async def _submit_one(self, sequence: SubmitSequence) -> ApiError | None:
        try:
            answer = await self._bus.ask(subjects.SUBMIT, sequence, Admitted, Refused, timeout_s=SUBMIT_TIMEOUT_S)
        except NobodyListens:
            return unavailable("No scheduler is running. Try again soon.")
        except RequestTimeout:
            return unavailable(f"The scheduler did not answer within {SUBMIT_TIMEOUT_S:g} s. Try again soon.")
        except ProtocolError as error:
            log.error("the scheduler's answer does not parse", request=sequence.request, problem=str(error))
            return ApiError(500, "The scheduler answered in a way that this gateway cannot read.", code="protocol")
        except BusError as error:
            log.warning("submit failed", request=sequence.request, problem=str(error))
            return unavailable("The gateway cannot reach the scheduler. Try again soon.")
        return error_of_refusal(answer) if isinstance(answer, Refused) else None

    async def _close(self, ids: Sequence[SequenceId], mailbox: Mailbox, asking: asyncio.Task[ApiError | None]) -> None:
        for sequence in ids:
            self._mailboxes.pop(sequence, None)
        if not asking.done():
            await asyncio.wait({asking}, timeout=SUBMIT_TIMEOUT_S + 1)
        for sequence in ids:
            if not mailbox.has_ended(sequence):
                await self.cancel(sequence, "the request has ended")

    async def cancel(self, sequence: SequenceId, reason: str) -> None:
        """Tell the scheduler to forget a sequence, and take no more of its tokens."""
        mailbox = self._mailboxes.pop(sequence, None)
        if mailbox is not None:
            mailbox.end(sequence)
        try:
            await self._bus.send(subjects.CANCEL, CancelSequence(sequence=sequence, reason=reason))
        except BusUnavailable:
            if len(self._unsent_cancels) < _MOST_UNSENT_CANCELS:  # else the scheduler sees this gateway's silence
                self._unsent_cancels[sequence] = reason
