"""What a stage tells everybody about the tokens of its pipeline: the tail each step's, others what was lost."""

from __future__ import annotations

import asyncio
from collections import deque

from molink_common import messages, subjects
from molink_common.bus import Bus
from molink_common.errors import BusUnavailable
from molink_common.logs import get_logger
from molink_common.messages import AssignStage, StepTokens
from molink_stage_worker.stage_step import StageResult

log = get_logger("outbox")

NO_STEP = 0
"""Step number of a `StepTokens` that no step led to. With `failed`, the head gave these sequences up; without, a
stage was cut off for a while and the head is to take everything under way for lost. Real steps begin at 1."""
_MESSAGES = 1024
_STEPS_REPEATED = 256


class TokenOutbox:
    """A bounded queue to the pipeline's subject of tokens."""

    def __init__(self, bus: Bus, place: AssignStage) -> None:
        self._bus = bus
        self._place = place
        self._queue: asyncio.Queue[bytes | bytearray] = asyncio.Queue(_MESSAGES)
        self._recent: deque[bytes | bytearray] = deque(maxlen=_STEPS_REPEATED)
        self._subject = subjects.tokens(place.pipeline)
        self._is_sending = False
        self._num_unsent = 0
        """Since the broker could be reached last."""

    def put(self, result: StageResult) -> None:
        """A step's tokens, to be sent once, and to be repeated after an outage."""
        if result.tokens is not None and (result.tokens.events or result.tokens.prompt_logprobs):
            self._recent.append(result.payload)
        if not self._num_unsent and self._queue.empty() and not self._is_sending and self._send_at_once(result.payload):
            return
        self._put(result.payload)

    def notify(self, failed: tuple[str, ...] = ()) -> None:
        """See `NO_STEP`."""
        notice = StepTokens(pipeline=self._place.pipeline, epoch=self._place.epoch, step=NO_STEP, failed=failed)
        self._put(messages.encode(notice))

    def repeat(self) -> None:
        """Send the last tokens again: whoever has seen them drops them."""
        if self._queue.qsize() + len(self._recent) < _MESSAGES:
            for payload in self._recent:
                self._queue.put_nowait(payload)

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            self._is_sending = False
            payload = await self._queue.get()
            self._is_sending = True
            try:
                await self._bus.publish(self._subject, payload)
            except BusUnavailable as error:
                if not self._num_unsent:  # once an outage: what was said is repeated after it
                    log.warning("tokens not sent", problem=str(error))
                self._num_unsent += 1
            else:
                if self._num_unsent:
                    log.info("tokens are sent again", messages_not_sent=self._num_unsent)
                self._num_unsent = 0

    def _send_at_once(self, payload: bytes | bytearray) -> bool:
        """Whether that was possible; the task would send two turns of the loop later."""
        try:
            return self._bus.publish_at_once(self._subject, payload)
        except BusUnavailable:
            return False  # the task tries again, and says so

    def _put(self, payload: bytes | bytearray) -> None:
        try:
            self._queue.put_nowait(payload)
        except asyncio.QueueFull:  # what the head has under way bounds it: somebody sends what nobody planned
            log.warning("tokens dropped", problem=f"{_MESSAGES} messages wait to be sent")
