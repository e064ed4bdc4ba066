"""One loaded stage at work: frames in, one call into the compute thread a step, frames or tokens out.

    NATS ─▶ on frame: decode, fence ─▶ compute thread ─▶ outbox ─▶ publish ─▶ NATS
                                             ▲
    head: tokens, new sequences ─▶ batcher ──┘

The thread has its own queue, so the next step starts without waiting for the event loop, which meanwhile receives
and sends. The head plans a step only when its thread is free: who arrives in between still gets in.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from molink_common import messages, subjects
from molink_common.bus import Bus, Incoming
from molink_common.errors import BusUnavailable, ProtocolError
from molink_common.identity import sequence_number
from molink_common.logs import get_logger
from molink_common.messages import AssignStage, HeadReport, StartSequence, StepTokens
from molink_common.telemetry import Telemetry
from molink_common.wire import StepFrame, decode_extra, decode_frame
from molink_stage_worker.batch_plan import StepPlan
from molink_stage_worker.batching import Batcher
from molink_stage_worker.compute import StageCompute, StageResult, StageStep
from molink_stage_worker.fence import Drop, Fence

log = get_logger("stage")

_OUTBOX_STEPS = 1024
_NO_STEP = 0
"""Step number of a `StepTokens` that no step led to. With `failed`, the head gave these sequences up; without, a
stage was cut off for a while and the head is to take everything under way for lost. Real steps begin at 1."""
_STEPS_REPEATED = 256
_ALL_BACK_S = 0.5
"""After an outage of the broker, clients connect again within about a tenth of a second of each other."""
_SURELY_BACK_S = 3.0


class StageRunner:
    """Serves one stage of one epoch until `serve` is cancelled. With a `batcher` it is the head."""

    def __init__(
        self,
        *,
        bus: Bus,
        assignment: AssignStage,
        compute: StageCompute,
        executor: ThreadPoolExecutor,
        batcher: Batcher | None,
        telemetry: Telemetry,
        worker: str,
    ) -> None:
        self.steps_done = 0
        self.tokens_done = 0
        self.compute_s = 0.0
        self._bus = bus
        self._assignment = assignment
        self._compute = compute
        self._executor = executor
        self._batcher = batcher
        self._telemetry = telemetry
        self._worker = worker
        self._fence = Fence(pipeline=assignment.pipeline, epoch=assignment.epoch)
        self._outbox: asyncio.Queue[asyncio.Future[StageResult]] = asyncio.Queue(_OUTBOX_STEPS)
        self._recent_tokens: deque[bytes | bytearray] = deque(maxlen=_STEPS_REPEATED)
        self._computing = 0
        self._planned_at_s: dict[int, float] = {}
        self._loop = asyncio.get_running_loop()
        self._is_serving = False
        self._is_pausing = False

    @property
    def frames_dropped(self) -> int:
        """Since the stage was loaded, for whatever reason."""
        return self._fence.dropped.total()

    @property
    def batcher(self) -> Batcher | None:
        """The head's batcher. Call `pump` after changing it."""
        return self._batcher

    async def serve(self, on_ready: Callable[[], None]) -> None:
        """Work until cancelled; `on_ready` is called once frames sent from then on will arrive.

        Raises:
            Exception: whatever the engine raised; the stage is of no use then.
            BusUnavailable: the connection was down when the stage was to begin.
        """
        place = self._assignment
        subscriptions = []
        try:
            if self._batcher is None:
                subject = subjects.stage(place.pipeline, place.index)
                subscriptions.append(await self._bus.subscribe(subject, self._on_frame))
            elif place.num_stages > 1:
                subject = subjects.tokens(place.pipeline)
                subscriptions.append(await self._bus.subscribe(subject, self._on_tokens))
            await self._bus.flush()
            self._is_serving = True
            on_ready()
            self.pump()
            while True:
                await self._send(await (await self._outbox.get()))
        finally:
            self._is_serving = False
            for subscription in subscriptions:
                await subscription.close()
            while not self._outbox.empty():
                self._outbox.get_nowait().cancel()

    # --- in --------------------------------------------------------------------------------------------------

    async def _on_frame(self, incoming: Incoming) -> None:
        try:
            frame = decode_frame(incoming.data)
            extra = decode_extra(frame.extra)
        except ProtocolError as error:
            self._fence.dropped[Drop.GARBAGE] += 1
            log.warning("frame dropped", reason=Drop.GARBAGE, problem=str(error))
            return
        reason = self._fence.check(frame)
        if reason is None and (frame.hidden_size, frame.dtype) != (
            self._compute.engine.hidden_size,
            self._assignment.dtype,
        ):
            reason = Drop.WRONG_SHAPE
            self._fence.dropped[reason] += 1
        if reason is not None:
            log.warning("frame dropped", reason=reason, step=frame.step, epoch=frame.epoch)
            return
        if self._fence.enter(frame.entries, map(sequence_number, extra.closes)) is not None:
            # the step goes on without its entries: the head sees at once that their tokens are missing
            log.warning("step emptied", reason=Drop.HOLE, step=frame.step)
            frame = replace(frame, entries=(), hidden=memoryview(b""))
        await self._outbox.put(self._submit(StageStep(frame=frame, extra=extra)))

    async def _on_tokens(self, incoming: Incoming) -> None:
        try:
            tokens = messages.decode(incoming.data, StepTokens)
        except ProtocolError as error:
            self._fence.dropped[Drop.GARBAGE] += 1
            log.warning("tokens dropped", reason=Drop.GARBAGE, problem=str(error))
            return
        if (tokens.pipeline, tokens.epoch) != (self._assignment.pipeline, self._assignment.epoch):
            self._fence.dropped[Drop.OTHER_EPOCH] += 1
        elif tokens.step != _NO_STEP:
            self._take_tokens(tokens)
        elif not tokens.failed and self._batcher is not None:
            log.warning("a stage was cut off: its steps are computed again")
            self._batcher.on_all_lost()
            self.pump()

    def on_cut_off(self) -> None:
        """The connection was down, or the broker dropped something: act on what may be lost.

        The head takes what is under way for lost and pauses until the others will be connected too; another stage
        tells the head. The tail repeats its last tokens: whoever has seen them drops them.
        """
        if not self._is_serving:
            return
        if self._batcher is None:
            self._outbox_notice(())
        elif self._assignment.num_stages > 1:
            self._batcher.on_all_lost()
        self._is_pausing = True
        self._loop.call_later(_ALL_BACK_S, self._go_on)
        self._loop.call_later(_SURELY_BACK_S, self._repeat_tokens)

    def _go_on(self) -> None:
        self._is_pausing = False
        self._repeat_tokens()
        self.pump()

    def _repeat_tokens(self) -> None:
        if self._is_serving and self._outbox.qsize() + len(self._recent_tokens) < _OUTBOX_STEPS:
            for payload in self._recent_tokens:
                self._outbox_payload(payload)

    # --- the head --------------------------------------------------------------------------------------------

    def start(self, start: StartSequence) -> None:
        """Run a sequence. Raises what `Batcher.add` raises, and `RuntimeError` on a stage that is no head."""
        if self._batcher is None:
            raise RuntimeError("this stage is not the head of its pipeline")
        self._batcher.add(start)
        self.pump()

    def stop(self, sequence: str) -> None:
        """Forget a sequence, if it is here."""
        if self._batcher is not None and self._batcher.stop(sequence):
            self.pump()

    def report(self) -> HeadReport | None:
        """The head's numbers."""
        if self._batcher is None:
            return None
        oldest = self._batcher.oldest_step
        age_s = 0.0 if oldest is None else self._loop.time() - self._planned_at_s.get(oldest, self._loop.time())
        return self._batcher.report().model_copy(update={"oldest_step_age_s": age_s})

    def pump(self) -> None:
        """Plan and start a step, if there is one and the thread is free."""
        try:
            self._plan_and_start()
        except Exception as error:  # called from callbacks, where nobody would hear of it: let `serve` raise it
            broken: asyncio.Future[StageResult] = self._loop.create_future()
            broken.set_exception(error)
            self._outbox.put_nowait(broken)

    def _plan_and_start(self) -> None:
        if self._batcher is None or self._computing or self._is_pausing:
            return
        if not self._is_serving or not self._bus.is_connected:
            return
        plan = self._batcher.next_step()
        failed = self._batcher.take_failed()
        if failed:
            log.warning("sequences given up", sequences=failed)
            self._outbox_notice(failed)
        if plan is not None:
            self._planned_at_s = {step: at_s for step, at_s in self._planned_at_s.items() if step >= plan.step - 64}
            self._planned_at_s[plan.step] = self._loop.time()
            future = self._submit(self._step_of(plan))
            self._outbox.put_nowait(future)

    def _take_tokens(self, tokens: StepTokens) -> None:
        if self._batcher is not None:
            self._batcher.on_tokens(tokens)
            self.pump()

    def _step_of(self, plan: StepPlan) -> StageStep:
        extra = plan.extra()
        frame = StepFrame(
            pipeline=self._assignment.pipeline,
            epoch=self._assignment.epoch,
            step=plan.step,
            entries=plan.entries,
            extra=extra.encode(),
            hidden_size=self._compute.engine.hidden_size,
            dtype=self._assignment.dtype,
            hidden=memoryview(b""),
        )
        return StageStep(frame=frame, extra=extra, token_ids=plan.token_ids)

    def _outbox_notice(self, failed: tuple[str, ...]) -> None:
        place = self._assignment
        notice = StepTokens(pipeline=place.pipeline, epoch=place.epoch, step=_NO_STEP, failed=failed)
        self._outbox_payload(messages.encode(notice))

    def _outbox_payload(self, payload: bytes | bytearray) -> None:
        future: asyncio.Future[StageResult] = self._loop.create_future()
        future.set_result(StageResult(subject=subjects.tokens(self._assignment.pipeline), payload=payload))
        self._outbox.put_nowait(future)

    # --- out -------------------------------------------------------------------------------------------------

    def _submit(self, step: StageStep) -> asyncio.Future[StageResult]:
        self._computing += 1
        future = self._loop.run_in_executor(self._executor, self._compute.run, step)
        future.add_done_callback(self._computed)
        return future

    def _computed(self, future: asyncio.Future[StageResult]) -> None:
        """Start the next step before this one's result is sent."""
        self._computing -= 1
        if future.cancelled() or future.exception() is not None:
            return
        tokens = future.result().tokens
        if tokens is not None and self._batcher is not None:
            self._take_tokens(tokens)  # head and tail in one: no way round through the broker
        else:
            self.pump()

    async def _send(self, result: StageResult) -> None:
        if result.tokens is not None and result.tokens.events:
            self._recent_tokens.append(result.payload)
        try:
            await self._bus.publish(result.subject, result.payload)
        except BusUnavailable as error:
            log.warning("step not sent", step=result.step, problem=str(error))
            if self._batcher is not None and result.tokens is None:
                self._batcher.on_lost(result.step)
                self.pump()
        if result.refused:
            self._fence.refuse(result.refused, Drop.REFUSED)
            log.warning("step emptied", reason=Drop.REFUSED, step=result.step, problem=result.problem)
        if result.step == _NO_STEP:
            return
        self.steps_done += 1
        self.tokens_done += result.num_tokens
        self.compute_s += (result.ended_ns - result.started_ns) / 1e9
        for parent in result.traces:
            self._telemetry.record(
                "stage step",
                parent=parent,
                start_ns=result.started_ns,
                end_ns=result.ended_ns,
                attributes={
                    "molink.worker": self._worker,
                    "molink.stage": self._assignment.index,
                    "molink.step": result.step,
                    "molink.tokens": result.num_tokens,
                },
            )
