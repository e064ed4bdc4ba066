"""What comes in from the stage before: frames, pieces put together, each acknowledged, stale and broken ones dropped.

decode frames ─▶ main connection ───────────────┐
pieces ────────▶ bulk connection ─▶ assembler ──┴▶ fence ─▶ `on_step`
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable

from molink_common import subjects
from molink_common.bus import Bus, Incoming, Subscription
from molink_common.errors import BusUnavailable, ProtocolError
from molink_common.logs import get_logger
from molink_common.messages import AssignStage
from molink_common.pieces import Ack, Assembler, decode_piece
from molink_common.wire import Traffic, decode_extra, decode_frame
from molink_stage_worker.fence import Drop, Fence
from molink_stage_worker.stage_step import StageStep, emptied

log = get_logger("inlet")


class StageInlet:
    """Gives each step that may be computed to `on_step`, in the order of arrival."""

    def __init__(
        self,
        *,
        bus: Bus,
        bulk_bus: Bus,
        place: AssignStage,
        hidden_size: int,
        fence: Fence,
        on_step: Callable[[StageStep], Awaitable[None]],
    ) -> None:
        self._bus = bus
        self._bulk_bus = bulk_bus
        self._place = place
        self._hidden_size = hidden_size
        self._fence = fence
        self._on_step = on_step
        self._assembler = Assembler()

    async def subscribe(self) -> list[Subscription]:
        """Listen to both classes."""
        place = self._place
        return [
            await self._bus.subscribe(subjects.stage(place.pipeline, place.index), self._on_frame),
            await self._bulk_bus.subscribe(subjects.stage_bulk(place.pipeline, place.index), self._on_piece),
        ]

    async def _on_frame(self, incoming: Incoming) -> None:
        await self._take(incoming.data, acknowledge=True)

    async def _on_piece(self, incoming: Incoming) -> None:
        try:
            piece = decode_piece(incoming.data)
        except ProtocolError as error:
            self._drop_garbage(error)
            return
        place = self._place
        if (piece.pipeline, piece.epoch) != (place.pipeline, place.epoch):
            self._fence.dropped[Drop.OTHER_EPOCH] += 1
            return
        await self._acknowledge(piece.step, piece.offset + len(piece.data), Traffic.BULK, _now_us())
        whole = self._assembler.add(piece)
        if whole is not None:
            await self._take(whole, acknowledge=False)

    async def _acknowledge(self, step: int, end: int, traffic: Traffic, received_us: int) -> None:
        place = self._place
        ack = Ack(
            pipeline=place.pipeline,
            epoch=place.epoch,
            step=step,
            end=end,
            traffic=traffic,
            received_us=received_us,
        )
        with contextlib.suppress(BusUnavailable):  # the sender waits for it no longer than it must
            await self._bus.publish(subjects.stage_acks(place.pipeline, place.index), ack.encode())

    async def _take(self, data: bytes | bytearray, *, acknowledge: bool) -> None:
        ready_ns, received_us = time.perf_counter_ns(), _now_us()
        try:
            frame = decode_frame(data)
            extra = decode_extra(frame.extra)
        except ProtocolError as error:
            self._drop_garbage(error)
            return
        reason = self._fence.check(frame)
        if reason is None and (frame.hidden_size, frame.dtype) != (self._hidden_size, self._place.dtype):
            reason = Drop.WRONG_SHAPE
            self._fence.dropped[reason] += 1
        if reason is not None:
            log.warning("frame dropped", reason=reason, step=frame.step, epoch=frame.epoch)
            return
        step = StageStep(frame=frame, extra=extra, ready_ns=ready_ns)
        if self._fence.enter(frame.step, frame.entries, extra.closes) is not None:
            log.warning("step emptied", reason=Drop.HOLE, step=frame.step)
            step = emptied(step)
        await self._on_step(step)
        if acknowledge:  # while the compute thread wakes up
            await self._acknowledge(frame.step, len(data), frame.traffic, received_us)

    def _drop_garbage(self, error: ProtocolError) -> None:
        self._fence.dropped[Drop.GARBAGE] += 1
        log.warning("frame dropped", reason=Drop.GARBAGE, problem=str(error))


def _now_us() -> int:
    return time.monotonic_ns() // 1000
