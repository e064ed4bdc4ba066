"""What the gateway says to the scheduler, and what the answers mean for a client."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from molink_common import subjects
from molink_common.bus import Bus
from molink_common.errors import BusError, BusUnavailable, NobodyListens, ProtocolError, RequestTimeout
from molink_common.identity import SequenceId
from molink_common.logs import get_logger
from molink_common.messages import (
    Admitted,
    CancelSequence,
    Failed,
    FinishReason,
    GatewayAlive,
    Message,
    RefusalCode,
    Refused,
    Resumed,
    ResumeSequence,
    SubmitSequence,
)
from molink_common.messages.codec import M
from molink_gateway.api_errors import ApiError, bad_request, busy, invalid_key, unavailable
from molink_gateway.recent_refusals import RecentRefusals

log = get_logger("gateway.scheduler")

ANSWER_TIMEOUT_S = 5.0
_MOST_UNSENT_CANCELS = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """A sequence as the scheduler has it."""

    request: SubmitSequence
    generated: tuple[int, ...]
    finish: FinishReason | None


def error_of_refusal(refused: Refused) -> ApiError:
    """What the client reads when the scheduler does not take a sequence."""
    retry_after_s = refused.retry_after_s if refused.retry_after_s is not None else 1.0
    match refused.code:
        case RefusalCode.UNKNOWN_MODEL:
            return ApiError(404, refused.message, param="model", code="model_not_found")
        case RefusalCode.TOO_LONG:
            return bad_request(refused.message, code="context_length_exceeded")
        case RefusalCode.QUEUE_FULL | RefusalCode.OVERLOADED | RefusalCode.RATE_LIMITED | RefusalCode.QUOTA:
            return busy(refused.message, code=refused.code.value, retry_after_s=retry_after_s)
        case RefusalCode.REVOKED:
            return invalid_key(refused.message)
        case RefusalCode.NO_PIPELINE:
            return unavailable(refused.message, retry_after_s=retry_after_s)


class SchedulerLink:
    """Questions and notices to the scheduler. A cancellation that cannot be sent is sent with a later sign of life."""

    def __init__(self, bus: Bus, gateway: str) -> None:
        self._bus = bus
        self._gateway = gateway
        self._unsent_cancels: dict[SequenceId, CancelSequence] = {}
        self._refusals = RecentRefusals()

    def check(self, tenant: str) -> None:
        """To be called before anything is done for a request of this tenant.

        Raises:
            ApiError: the scheduler has said a moment ago that it takes none.
        """
        self._refusals.check(tenant, asyncio.get_running_loop().time())

    async def submit(self, sequence: SubmitSequence) -> None:
        """Hand a sequence over.

        Raises:
            ApiError: the scheduler refuses it or cannot be reached.
        """
        answer = await self._ask(subjects.SUBMIT, sequence, Admitted, Refused)
        if isinstance(answer, Refused):
            self._refusals.remember(sequence.tenant, answer, asyncio.get_running_loop().time())
            raise error_of_refusal(answer)

    async def resume(self, sequence: SequenceId, *, tenant: str | None = None) -> Recovered | None:
        """All that there is of a sequence, which is this gateway's from now on; None: there is nothing to go on with.

        What is not this gateway's already must belong to `tenant`.

        Raises:
            ApiError: 503, the scheduler cannot be reached.
        """
        question = ResumeSequence(sequence=sequence, gateway=self._gateway, tenant=tenant)
        answer = await self._ask(subjects.RESUME, question, Resumed, Failed)
        if not isinstance(answer, Resumed):
            return None
        try:
            finish = None if answer.finish is None else FinishReason(answer.finish)
        except ValueError:
            log.error("the scheduler tells an unknown end", sequence=sequence, finish=answer.finish)
            return None
        return Recovered(request=answer.request, generated=answer.generated, finish=finish)

    async def cancel(self, cancel: CancelSequence) -> None:
        """Have a sequence forgotten, now or as soon as the scheduler can be told."""
        try:
            await self._bus.send(subjects.CANCEL, cancel)
        except BusUnavailable:
            if len(self._unsent_cancels) < _MOST_UNSENT_CANCELS:  # else the scheduler sees this gateway's silence
                self._unsent_cancels[cancel.sequence] = cancel

    async def say_alive(self) -> None:
        """A sign of life, and what could not be said before."""
        with contextlib.suppress(BusUnavailable):
            await self._bus.send(subjects.gateway_alive(self._gateway), GatewayAlive(gateway=self._gateway))
            while self._unsent_cancels:
                sequence, cancel = next(iter(self._unsent_cancels.items()))
                await self._bus.send(subjects.CANCEL, cancel)
                del self._unsent_cancels[sequence]

    async def _ask(self, subject: str, question: Message, *expected: type[M]) -> M:
        try:
            return await self._bus.ask(subject, question, *expected, timeout_s=ANSWER_TIMEOUT_S)
        except NobodyListens as error:
            raise unavailable("No scheduler is running. Try again soon.") from error
        except RequestTimeout as error:
            raise unavailable(f"The scheduler did not answer within {ANSWER_TIMEOUT_S:g} s. Try again soon.") from error
        except ProtocolError as error:
            log.error("the scheduler's answer does not parse", subject=subject, problem=str(error))
            raise ApiError(
                500, "The scheduler answered in a way that this gateway cannot read.", code="protocol"
            ) from error
        except BusError as error:
            # that the connection is down was said once, by the bus
            tell = log.warning if self._bus.is_connected else log.debug
            tell("the scheduler cannot be asked", subject=subject, problem=str(error))
            raise unavailable("The gateway cannot reach the scheduler. Try again soon.") from error
