"""The life of sequences as the gateway sees it: submit, tokens, failure, cancel, and streams that are taken up again.

Every sequence that was submitted ends here in tokens, in an error or in a cancellation: `open` cancels on leaving
whatever has not ended, but for streams whose client knows how to come back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

from molink_common import messages, subjects
from molink_common.bus import Bus, Incoming
from molink_common.errors import BusUnavailable, ProtocolError
from molink_common.identity import SequenceId
from molink_common.logs import get_logger
from molink_common.messages import (
    CancelSequence,
    ClusterState,
    ResumeSequence,
    SequenceFailed,
    StepTokens,
    SubmitSequence,
)
from molink_gateway.api_errors import ApiError
from molink_gateway.epoch_fence import EpochFence
from molink_gateway.mailbox import Mailbox, Patience
from molink_gateway.mending import Mender
from molink_gateway.prompt_logprobs import PromptInbox
from molink_gateway.scheduler_link import ANSWER_TIMEOUT_S, Recovered, SchedulerLink

log = get_logger("gateway.sequences")

ALIVE_EVERY_S = 2.0
_GIVEN_UP = (
    "The pipeline gave this sequence up: its output was not finite, its grammar failed, or its steps were lost again "
    "and again. Try again."
)
_NO_STREAM = (
    "There is no such stream to take up: it is unknown, it ended more than a minute ago, or its request did not carry "
    "`X-MoLink-Resumable: 1`. Send the request again."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """The sequences of one request, in the order of its choices."""

    sequences: tuple[SubmitSequence, ...]
    prompts: Mapping[SequenceId, PromptInbox] = field(default_factory=dict)
    """Where log probabilities of prompts are collected."""

    @property
    def ids(self) -> tuple[SequenceId, ...]:
        """Their ids."""
        return tuple(one.sequence for one in self.sequences)

    @property
    def can_be_mended(self) -> bool:
        """Whether tokens that were lost can be had again: their log probabilities cannot."""
        return all(one.options.top_logprobs is None for one in self.sequences)


class Sequences:
    """All open sequences of this gateway. `serve` must run while `open` and `take_up` are used."""

    def __init__(self, bus: Bus, *, gateway: str, patience: Patience) -> None:
        self._bus = bus
        self._gateway = gateway
        self._patience = patience
        self._scheduler = SchedulerLink(bus, gateway)
        self._mender = Mender(self._scheduler)
        self._mailboxes: dict[SequenceId, Mailbox] = {}
        self._can_be_mended: set[SequenceId] = set()
        self._fence = EpochFence()
        self._has_missed = asyncio.Event()
        self.is_listening = asyncio.Event()

    @property
    def num_open(self) -> int:
        """Sequences whose tokens are awaited."""
        return len(self._mailboxes)

    def check(self, tenant: str) -> None:
        """See `SchedulerLink.check`."""
        self._scheduler.check(tenant)

    def hear_state(self, state: ClusterState) -> None:
        """The scheduler's word about the pipelines."""
        self._fence.hear(state.pipelines)

    def may_have_missed(self) -> None:
        """The connection was away, or messages were dropped: tokens may be lost that nobody else has lost."""
        self._has_missed.set()

    async def serve(self) -> None:
        """Listen for tokens and failures, and say that this gateway lives. Runs until cancelled."""
        async with contextlib.AsyncExitStack() as stack:
            for subject, handler in (
                (subjects.ALL_TOKENS, self._hear_tokens),
                (subjects.gateway_failures(self._gateway), self._hear_failure),
                (subjects.ALL_GATEWAY_STREAMS, self._hear_taken),
            ):
                subscription = await self._bus.subscribe(subject, handler)
                stack.push_async_callback(subscription.close)
            group = await stack.enter_async_context(asyncio.TaskGroup())
            group.create_task(self._mender.serve())
            group.create_task(self._mend_what_was_missed())
            self.is_listening.set()
            while True:
                await self._scheduler.say_alive()
                await asyncio.sleep(ALIVE_EVERY_S)  # a heart beats by the clock

    async def _mend_what_was_missed(self) -> None:
        while True:
            await self._has_missed.wait()
            self._has_missed.clear()
            for sequence in list(self._mailboxes):
                self._doubt(sequence)

    def _doubt(self, sequence: SequenceId) -> None:
        mailbox = self._mailboxes.get(sequence)
        if mailbox is not None and sequence in self._can_be_mended:
            self._mender.ask(sequence, mailbox)

    async def _hear_tokens(self, incoming: Incoming) -> None:
        try:
            step = messages.decode(incoming.data, StepTokens)
        except ProtocolError as error:
            log.warning("tokens dropped", problem=str(error))
            return
        if not self._fence.admits(step.pipeline, step.epoch):
            log.info(
                "tokens of an epoch that is over dropped",
                pipeline=step.pipeline,
                epoch=step.epoch,
                dropped=self._fence.num_dropped,
            )
            return
        for part in step.prompt_logprobs:
            if (of_prompt := self._mailboxes.get(part.sequence)) is not None:
                of_prompt.put_prompt(part)
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

    async def _hear_taken(self, incoming: Incoming) -> None:
        try:
            taken = messages.decode(incoming.data, ResumeSequence)
        except ProtocolError as error:
            log.warning("notice of a stream dropped", problem=str(error))
            return
        if taken.gateway != self._gateway:
            self._give_away(taken.sequence)

    def _fail(self, sequence: SequenceId, error: ApiError) -> None:
        mailbox = self._mailboxes.get(sequence)
        if mailbox is not None:
            mailbox.fail(sequence, error)

    def _give_away(self, sequence: SequenceId) -> None:
        """Another connection serves the stream: the newest one does."""
        mailbox = self._mailboxes.get(sequence)
        if mailbox is not None and mailbox.outlives_client:
            mailbox.interrupt(ApiError(409, "Another connection has taken this stream up.", code="taken_up"))

    def interrupt_all(self, error: ApiError) -> None:
        """End every open request with this error: the gateway stops."""
        for mailbox in set(self._mailboxes.values()):
            mailbox.interrupt(error)

    @contextlib.asynccontextmanager
    async def open(self, submission: Submission) -> AsyncIterator[Mailbox]:
        """Submit the sequences and give the mailbox that their tokens arrive in.

        Raises:
            ApiError: the scheduler refuses one of them or cannot be reached; none goes on then.
        """
        mailbox = Mailbox(submission.ids, self._patience, self._doubt, submission.prompts)
        self._mailboxes.update(dict.fromkeys(submission.ids, mailbox))
        if submission.can_be_mended:
            self._can_be_mended.update(submission.ids)
        # A client that hangs up while the scheduler decides must not cut the question off: its sequences would
        # then run for nobody. So the question goes on beside, and is awaited before the cancellation is sent.
        asking = asyncio.create_task(self._submit(submission.sequences))
        try:
            error = await asyncio.shield(asking)
            if error is not None:
                raise error
            yield mailbox
        finally:
            if not asking.done():
                await asyncio.wait({asking}, timeout=ANSWER_TIMEOUT_S + 1)
            await self._close(mailbox)

    @contextlib.asynccontextmanager
    async def take_up(self, sequence: SequenceId, *, tenant: str) -> AsyncIterator[tuple[Recovered, Mailbox]]:
        """Go on with a stream of `tenant` that another connection served, here or at another gateway; that one ends.

        Raises:
            ApiError: 404, there is no such stream; 503, the scheduler cannot be reached.
        """
        # its tokens are listened for before the scheduler is asked for the earlier ones: none falls in between
        mailbox = Mailbox((sequence,), self._patience, self._doubt)
        mailbox.outlives_client = True
        before = self._mailboxes.get(sequence)
        self._mailboxes[sequence] = mailbox
        try:
            recovered = await self._scheduler.resume(sequence, tenant=tenant)
        except BaseException:
            self._forget(mailbox, instead=before)
            raise
        if recovered is None or recovered.request.resume_state is None:
            self._forget(mailbox, instead=before)
            raise ApiError(404, _NO_STREAM, param="Last-Event-ID", code="stream_not_found")
        if before is not None:
            before.interrupt(ApiError(409, "Another connection has taken this stream up.", code="taken_up"))
        with contextlib.suppress(BusUnavailable):  # then the other one goes on as well, which nobody reads
            notice = ResumeSequence(sequence=sequence, gateway=self._gateway)
            await self._bus.send(subjects.gateway_streams(self._gateway), notice)
        self._can_be_mended.add(sequence)
        mailbox.fill(sequence, recovered.generated, recovered.finish)
        try:
            yield recovered, mailbox
        finally:
            await self._close(mailbox)

    async def _submit(self, sequences: Sequence[SubmitSequence]) -> ApiError | None:
        """Ask the scheduler for all of them; gives the first error."""
        errors = await asyncio.gather(*(self._submit_one(sequence) for sequence in sequences))
        return next((error for error in errors if error is not None), None)

    async def _submit_one(self, sequence: SubmitSequence) -> ApiError | None:
        try:
            await self._scheduler.submit(sequence)
        except ApiError as error:
            return error
        return None

    async def _close(self, mailbox: Mailbox) -> None:
        runs_on = mailbox.runs_on
        self._forget(mailbox)
        for sequence in mailbox.sequences:
            if not runs_on and not mailbox.has_ended(sequence):
                await self._scheduler.cancel(CancelSequence(sequence=sequence, reason="the request has ended"))

    def _forget(self, mailbox: Mailbox, *, instead: Mailbox | None = None) -> None:
        """Listen no more for a mailbox, unless a newer one has its place."""
        for sequence in mailbox.sequences:
            if self._mailboxes.get(sequence) is not mailbox:
                continue
            if instead is not None:
                self._mailboxes[sequence] = instead
                self._doubt(sequence)
            else:
                del self._mailboxes[sequence]
                self._can_be_mended.discard(sequence)

    async def cut(self, sequence: SequenceId, num_tokens: int) -> None:
        """A stop string ends the answer after so many tokens: have the sequence stopped, and take no more of it."""
        mailbox = self._mailboxes.pop(sequence, None)
        self._can_be_mended.discard(sequence)
        if mailbox is not None:
            mailbox.end(sequence)
        await self._scheduler.cancel(
            CancelSequence(sequence=sequence, reason="a stop string was met", after_tokens=num_tokens)
        )
