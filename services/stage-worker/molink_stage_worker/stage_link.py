"""The link to the next stage: publishes what the transmission scheduler says, when it says so.

Decode frames go over the worker's main connection, pieces of bulk frames over a second one, so that neither waits in
the other's socket. Acknowledgements come back over the main one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from molink_common import subjects
from molink_common.bus import Bus, Incoming, Subscription
from molink_common.errors import BusUnavailable, ProtocolError
from molink_common.logs import get_logger
from molink_common.messages import AssignStage, LinkCodec, LinkReport, Scheduling
from molink_common.pieces import PIECE_HEADER_BYTES, Piece, decode_ack
from molink_common.wire import Traffic
from molink_stage_worker.activation_codec import EXACTNESS
from molink_stage_worker.codec_choice import CodecChoice
from molink_stage_worker.transmission.sender import LinkSender
from molink_stage_worker.transmission.values import Parcel, Send

log = get_logger("link")

Payload = bytes | bytearray


class StageLink:
    """Sends frames to the next stage. `on_lost` hears of a step whose frame could not be sent."""

    def __init__(
        self, *, bus: Bus, bulk_bus: Bus, place: AssignStage, codecs: CodecChoice, on_lost: Callable[[int], None]
    ) -> None:
        self._bus = bus
        # the baselines have one connection for everything
        self._bulk_bus = bulk_bus if place.policy.scheduling is Scheduling.ADAPTIVE else bus
        self._place = place
        self._codecs = codecs
        self._on_lost = on_lost
        self._sender = LinkSender(
            place.policy.scheduling, assumed_link_bytes_per_s=place.policy.assumed_link_bytes_per_s
        )
        self._payloads: dict[int, Payload] = {}
        self._unsent: Send | None = None
        """What is to go before anything else, and has to wait for the socket."""
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._decode_subject = subjects.stage(place.pipeline, place.index + 1)
        self._bulk_subject = subjects.stage_bulk(place.pipeline, place.index + 1)

    async def subscribe(self) -> Subscription:
        """Listen to the next stage's acknowledgements."""
        return await self._bus.subscribe(subjects.stage_acks(self._place.pipeline, self._place.index + 1), self._on_ack)

    def offer(self, step: int, traffic: Traffic, payload: Payload) -> None:
        """Queue a frame. How many there can be is bounded by the steps that the head has under way."""
        self._payloads[step] = payload
        now_s = self._loop.time()
        self._sender.offer(Parcel(step=step, traffic=traffic, size_bytes=len(payload)), now_s)
        # the task would send it two turns of the loop later
        if traffic is Traffic.DECODE and self._unsent is None and (send := self._sender.next(now_s)) is not None:
            self._send_at_once(send)
        self._codecs.on_rate(self._wire_rate_bytes_per_s)
        self._changed.set()

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            self._changed.clear()
            while (send := self._unsent or self._sender.next(self._loop.time())) is not None:
                self._unsent = send
                await self._carry_out(send)
                self._unsent = None
            wake_at_s = self._sender.wake_at_s()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(wake_at_s):
                    await self._changed.wait()

    def on_cut_off(self) -> None:
        """A connection was down: whatever is queued or under way is lost, and the head will hear of it."""
        self._sender.on_cut_off()
        self._payloads.clear()

    @property
    def rate_bytes_per_s(self) -> float | None:
        """Of hidden states before their codec. None: the link was not busy lately, so it may carry more than it did."""
        rate = self._wire_rate_bytes_per_s
        return None if rate is None else rate / self._codecs.share_left

    @property
    def _wire_rate_bytes_per_s(self) -> float | None:
        estimator = self._sender.estimator
        if not estimator.is_rate_certain or estimator.rate_bytes_per_s is None:
            return None
        return estimator.rate_bytes_per_s

    @property
    def round_trip_s(self) -> float | None:
        """As measured; None: not known yet."""
        return self._sender.report().round_trip_s

    def report(self) -> LinkReport:
        """For the heartbeat."""
        sender = self._sender.report()
        since_s = sender.unacknowledged_since_s
        present = self._codecs.latest
        return LinkReport(
            codec=self._place.codec,
            present_codec=LinkCodec[present.name],
            exactness=EXACTNESS[present],
            share_left=self._codecs.share_left,
            round_trip_s=sender.round_trip_s,
            rate_bytes_per_s=sender.rate_bytes_per_s,
            window_bytes=sender.window_bytes,
            queued_bytes=sender.queued_bytes,
            sent_bytes=sender.sent_bytes,
            unacknowledged_s=0.0 if since_s is None else max(self._loop.time() - since_s, 0.0),
        )

    def _send_at_once(self, send: Send) -> None:
        payload = self._payloads.get(send.step)
        if not send.whole or payload is None or len(payload) > self._bus.max_payload_bytes:
            self._unsent = send
            return
        try:
            if self._bus.publish_at_once(self._decode_subject, payload):
                del self._payloads[send.step]
            else:
                self._unsent = send
        except BusUnavailable as error:
            self._give_up(send.step, error)

    async def _carry_out(self, send: Send) -> None:
        payload = self._payloads.pop(send.step, None) if send.is_last else self._payloads.get(send.step)
        if payload is None:
            return  # a piece before this one could not be sent
        try:
            if send.whole and len(payload) <= self._bus.max_payload_bytes:
                await self._bus.publish(self._decode_subject, payload)
            else:
                # a baseline's whole tensor may be larger than a message can be
                bus = self._bus if send.whole else self._bulk_bus
                most = self._bus.max_payload_bytes - PIECE_HEADER_BYTES
                for offset in range(send.offset, send.offset + send.size_bytes, most):
                    end = min(offset + most, send.offset + send.size_bytes)
                    await bus.publish(self._bulk_subject, self._piece(send.step, payload, offset, end))
        except BusUnavailable as error:
            self._give_up(send.step, error)

    def _give_up(self, step: int, error: BusUnavailable) -> None:
        log.warning("step not sent", step=step, problem=str(error))
        self._payloads.pop(step, None)
        self._on_lost(step)

    def _piece(self, step: int, payload: Payload, offset: int, end: int) -> bytearray:
        return Piece(
            pipeline=self._place.pipeline,
            epoch=self._place.epoch,
            step=step,
            offset=offset,
            total=len(payload),
            data=memoryview(payload)[offset:end],
        ).encode()

    async def _on_ack(self, incoming: Incoming) -> None:
        try:
            ack = decode_ack(incoming.data)
        except ProtocolError as error:
            log.warning("acknowledgement dropped", problem=str(error))
            return
        if (ack.pipeline, ack.epoch) == (self._place.pipeline, self._place.epoch):
            self._sender.on_ack(ack.traffic, ack.step, ack.end, ack.received_us, self._loop.time())
            self._changed.set()
