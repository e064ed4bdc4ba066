"""One loaded stage at work: frames in, one call into the compute thread a step, frames or tokens out.

    NATS ─▶ inlet ─▶ ready queue ─▶ compute thread ─▶ link to the next stage ─▶ NATS
                         ▲                   └─▶ tail: outbox of tokens ──────▶ NATS
    head: tokens, new sequences ─▶ desk ──┘

The next step starts without waiting for the event loop, which meanwhile receives and sends; a decode step starts
before bulk steps that wait. The head plans a step when its thread is free, so that who arrives in between still gets
in; or, if it would be a full one anyway, just before: the thread would else wait until the last step has been sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from molink_common import messages, subjects
from molink_common.bus import Bus, Incoming
from molink_common.errors import ProtocolError
from molink_common.logs import get_logger
from molink_common.messages import AssignStage, HeadReport, LinkReport, StartSequence, StepTokens
from molink_common.telemetry import Telemetry
from molink_common.wire import Traffic
from molink_stage_worker.company import DecodeRhythm
from molink_stage_worker.compute import StageCompute
from molink_stage_worker.fence import Drop, Fence
from molink_stage_worker.head_desk import HeadDesk
from molink_stage_worker.journal import Journal
from molink_stage_worker.planning import StepObservation
from molink_stage_worker.ready_queue import ReadyQueue
from molink_stage_worker.stage_inlet import StageInlet
from molink_stage_worker.stage_link import StageLink
from molink_stage_worker.stage_step import StageResult, StageStep, planned
from molink_stage_worker.step_traces import trace_step
from molink_stage_worker.token_outbox import NO_STEP, TokenOutbox

log = get_logger("stage")

_STEPS_WAITING = 1024
_STEPS_UNLEARNT = 4
_TOO_EARLY_S = 0.002
_AHEAD_S = 0.003
"""So long before a pass ends the next one may be planned: what that takes with many sequences, and then some."""
_ALL_BACK_S = 0.5
"""After an outage of the broker, clients connect again within about a tenth of a second of each other."""
_SURELY_BACK_S = 3.0
_ASK_AGAIN_S = 0.05
_ASK_SLOWER = 1.5
_ASK_AGAIN_MOST_S = 0.5


class StageRunner:
    """Serves one stage of one epoch until `serve` is cancelled. With a `desk` it is the head."""

    def __init__(
        self,
        *,
        bus: Bus,
        bulk_bus: Bus,
        assignment: AssignStage,
        compute: StageCompute,
        executor: ThreadPoolExecutor,
        desk: HeadDesk | None,
        telemetry: Telemetry,
        worker: str,
        journal: Journal | None = None,
    ) -> None:
        """`compute`, `executor`, `desk` and `journal` may have served an earlier epoch at the same place."""
        self.steps_done = 0
        self.tokens_done = 0
        self.compute_s = 0.0
        self._bus = bus
        self._assignment = assignment
        self._compute = compute
        compute.take_place(assignment.index, journal)
        self._executor = executor
        self._desk = desk
        self._telemetry = telemetry
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._fence = Fence(pipeline=assignment.pipeline, epoch=assignment.epoch, block_size=assignment.block_size)
        self._ready: ReadyQueue[StageStep] = ReadyQueue()
        self._rhythm = DecodeRhythm()
        self._last_decode: StageStep | None = None
        self._inlet: StageInlet | None = None
        if desk is None:
            self._inlet = StageInlet(
                bus=bus,
                bulk_bus=bulk_bus,
                place=assignment,
                hidden_size=compute.engine.hidden_size,
                fence=self._fence,
                on_step=self._submit,
            )
        self._link: StageLink | None = None
        if assignment.index < assignment.num_stages - 1:
            self._link = StageLink(
                bus=bus, bulk_bus=bulk_bus, place=assignment, codecs=compute.codecs, on_lost=self._on_lost
            )
        if desk is not None:
            desk.use(can_rewind=compute.engine.can_rewind)
        self._outbox = TokenOutbox(bus, assignment)
        self._broken: asyncio.Future[None] = self._loop.create_future()
        self._computing = 0
        self._look_ahead: asyncio.TimerHandle | None = None
        self._unlearnt: list[tuple[StepObservation, float]] = []
        self._is_serving = False
        self._is_pausing = False

    @property
    def frames_dropped(self) -> int:
        """Since the stage was loaded, for whatever reason."""
        return self._fence.dropped.total()

    @property
    def pass_age_s(self) -> float:
        """How long the present pass has been computing; 0 between passes."""
        return self._compute.pass_age_s(time.monotonic())

    @property
    def longest_pass_s(self) -> float:
        """Of the passes that ended since the stage was loaded."""
        return self._compute.longest_pass_s

    @property
    def is_head(self) -> bool:
        """Whether sequences are started here."""
        return self._desk is not None

    @property
    def sequences(self) -> tuple[str, ...]:
        """Ids of all that wait or run; none where this is no head."""
        return self._desk.sequences if self._desk is not None else ()

    async def serve(self, on_ready: Callable[[], None]) -> None:
        """Work until cancelled; `on_ready` is called once frames sent from then on will arrive.

        Raises:
            Exception: whatever the engine raised; the stage is of no use then.
            BusUnavailable: the connection was down when the stage was to begin.
        """
        place = self._assignment
        subscriptions = []
        sending: list[asyncio.Task[None]] = []
        try:
            if self._inlet is not None:
                subscriptions.extend(await self._inlet.subscribe())
            elif place.num_stages > 1:
                subject = subjects.tokens(place.pipeline)
                subscriptions.append(await self._bus.subscribe(subject, self._on_tokens))
            if self._link is not None:
                subscriptions.append(await self._link.subscribe())
                sending.append(asyncio.create_task(self._link.run()))
            sending.append(asyncio.create_task(self._outbox.run()))
            await self._bus.flush()
            self._is_serving = True
            on_ready()
            self.pump()
            self._ask_again(_ASK_AGAIN_S)
            done, _ = await asyncio.wait([self._broken, *sending], return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                ended.result()  # raises
        finally:
            self._is_serving = False
            for task in sending:
                task.cancel()
            for subscription in subscriptions:
                await subscription.close()

    # --- in --------------------------------------------------------------------------------------------------

    async def _on_tokens(self, incoming: Incoming) -> None:
        try:
            tokens = messages.decode(incoming.data, StepTokens)
        except ProtocolError as error:
            self._fence.dropped[Drop.GARBAGE] += 1
            log.warning("tokens dropped", reason=Drop.GARBAGE, problem=str(error))
            return
        if (tokens.pipeline, tokens.epoch) != (self._assignment.pipeline, self._assignment.epoch):
            self._fence.dropped[Drop.OTHER_EPOCH] += 1
        elif tokens.step != NO_STEP:
            self._take_tokens(tokens)
        elif not tokens.failed and self._desk is not None:
            log.warning("a stage was cut off: its steps are computed again")
            self._desk.on_all_lost()
            self.pump()

    def on_cut_off(self) -> None:
        """A connection was down, or the broker dropped something: act on what may be lost.

        The head takes what is under way for lost and pauses until the others will be connected too; another stage
        tells the head. The tail repeats its last tokens: whoever has seen them drops them.
        """
        if not self._is_serving:
            return
        if self._link is not None:
            self._link.on_cut_off()
        if self._desk is None:
            self._outbox.notify()
        elif self._assignment.num_stages > 1:
            self._desk.on_all_lost()
        self._is_pausing = True
        self._loop.call_later(_ALL_BACK_S, self._go_on)
        self._loop.call_later(_SURELY_BACK_S, self._repeat_tokens)

    def _go_on(self) -> None:
        self._is_pausing = False
        self._repeat_tokens()
        self.pump()

    def _repeat_tokens(self) -> None:
        if self._is_serving:
            self._outbox.repeat()

    # --- the head --------------------------------------------------------------------------------------------

    def start(self, start: StartSequence) -> None:
        """Run a sequence. Raises what `Batcher.add` raises, and `RuntimeError` on a stage that is no head."""
        if self._desk is None:
            raise RuntimeError("this stage is not the head of its pipeline")
        self._desk.start(start)
        self.pump()

    def stop(self, sequence: str) -> None:
        """Forget a sequence, if it is here."""
        if self._desk is not None and self._desk.stop(sequence):
            self.pump()

    def report(self) -> HeadReport | None:
        """The head's numbers."""
        return None if self._desk is None else self._desk.report(self._loop.time())

    def link_report(self) -> LinkReport | None:
        """The link's numbers; None at the tail."""
        return None if self._link is None else self._link.report()

    def pump(self) -> None:
        """Plan and start a step, if there is one and the thread is free."""
        try:
            self._plan_and_start()
        except Exception as error:  # called from callbacks, where nobody would hear of it: let `serve` raise it
            self._break(error)

    def _ask_again(self, pause_s: float) -> None:
        """The head of a new epoch asks whether all stages listen: until a step comes back, it sends another."""
        if self._desk is None or not self._desk.asks or not self._is_serving:
            return

        def ask() -> None:
            if self._desk is not None and self._desk.asks and self._is_serving:
                self._desk.on_all_lost()
                self.pump()
                self._ask_again(min(pause_s * _ASK_SLOWER, _ASK_AGAIN_MOST_S))

        self._loop.call_later(pause_s, ask)

    def _plan_and_start(self) -> None:
        if self._desk is None or self._is_pausing or not self._is_serving or not self._bus.is_connected:
            return
        if self._computing and not self._may_plan_ahead(self._desk):
            return
        if self._link is not None:
            self._desk.on_link(self._link.rate_bytes_per_s, self._link.round_trip_s)
        plans = self._desk.next_steps(self._loop.time())
        failed = self._desk.take_failed()
        if failed:
            log.warning("sequences given up", sequences=failed)
            self._outbox.notify(failed)
        for plan in plans:
            step = planned(plan, self._assignment, self._compute.engine.hidden_size, along=plan is not plans[0])
            self._ready.put(step, plan.traffic)
        for _ in plans:
            self._start_computing()
        if plans:
            self._look_ahead_in(_AHEAD_S)

    def _may_plan_ahead(self, desk: HeadDesk) -> bool:
        """Whether the present pass is about to end, and hardly anybody more would get into the next step then."""
        left_s = self._compute.pass_left_s(time.monotonic())
        if left_s is None or len(self._ready):
            return False  # it has not begun, or the next one is planned already
        if left_s > _AHEAD_S:
            self._look_ahead_in(left_s - _AHEAD_S)
            return False
        return desk.has_full_step

    def _look_ahead_in(self, pause_s: float) -> None:
        if self._look_ahead is not None:
            self._look_ahead.cancel()
        self._look_ahead = self._loop.call_later(pause_s, self.pump)

    def _take_tokens(self, tokens: StepTokens) -> None:
        if self._desk is not None and self._is_serving:
            now_s = self._loop.time()
            observation = self._desk.on_tokens(tokens, now_s)
            self.pump()
            if observation is not None:
                self._unlearnt.append((observation, now_s))
                if not self._computing or len(self._unlearnt) >= _STEPS_UNLEARNT:
                    self._learn()

    def _learn(self) -> None:
        """What steps have cost; best while nothing computes, since the compute thread waits for the interpreter."""
        assert self._desk is not None, "only a head observes"
        for observation, at_s in self._unlearnt:
            self._desk.learn(observation, at_s)
        self._unlearnt.clear()

    def _on_lost(self, step: int) -> None:
        if self._desk is not None and self._is_serving:
            self._desk.on_lost(step)
            self.pump()

    # --- compute ---------------------------------------------------------------------------------------------

    async def _submit(self, step: StageStep) -> None:
        if len(self._ready) < _STEPS_WAITING:
            self._queue(step)
        else:  # what the head has under way bounds it: somebody sends what nobody planned
            self._fence.refuse(step.frame.entries, Drop.TOO_MANY)

    def _queue(self, step: StageStep) -> None:
        """Decode goes as soon as the thread is free; a chunk that pays to go along with decode waits for some."""
        now_s = self._loop.time()
        patience_s = 0.0
        if step.frame.traffic is Traffic.DECODE:
            if step.frame.entries:
                self._rhythm.on_decode(now_s)
                self._last_decode = step
        elif self._last_decode is not None and self._compute.pays_together([self._last_decode], step):
            patience_s = self._rhythm.patience_s(now_s)
        self._ready.put(step, step.frame.traffic, alone_from_s=now_s + patience_s)
        if patience_s:
            self._loop.call_later(patience_s, self._start_computing)
        else:
            self._start_computing()

    def _start_computing(self) -> None:
        if not self._is_serving:
            return
        self._computing += 1
        future = self._loop.run_in_executor(self._executor, self._compute_next)
        future.add_done_callback(self._computed)

    def _compute_next(self) -> list[StageResult]:
        """In the compute thread: the step whose turn it is by now, and those that pay to be computed along."""
        steps = self._ready.take(time.monotonic(), self._compute.pays_together)
        return self._compute.run(steps) if steps else []

    def _computed(self, future: asyncio.Future[list[StageResult]]) -> None:
        """Send what came out; then, once it is in the socket, plan the next step."""
        self._computing -= 1
        if future.cancelled() or not self._is_serving:
            return
        error = future.exception()
        if error is not None:
            self._break(error)
            return
        results = future.result()
        if not results and len(self._ready):
            # a loop's clock is coarse: this was a moment before the step that waits may go alone
            self._loop.call_later(_TOO_EARLY_S, self._start_computing)
        if results:
            self.compute_s += (results[0].ended_ns - results[0].started_ns) / 1e9
        for result in results:
            if result.tokens is None:
                assert self._link is not None, "a stage that is not the tail has a link"
                self._link.offer(result.step, result.traffic, result.payload)
            else:
                self._outbox.put(result)
                if self._desk is not None:
                    self._take_tokens(result.tokens)  # head and tail in one: no way round through the broker
            self._account_for(result)
        if self._desk is not None:
            # the link's task runs in the next turn of the loop, and its socket is written to at the end of that
            self._loop.call_soon(self._loop.call_soon, self._go_on_computing)

    def _go_on_computing(self) -> None:
        self.pump()
        if not self._computing:
            self._learn()

    def _break(self, error: BaseException) -> None:
        if not self._broken.done():
            self._broken.set_exception(error)

    # --- out -------------------------------------------------------------------------------------------------

    def _account_for(self, result: StageResult) -> None:
        if result.refused:
            self._fence.refuse(result.refused, Drop.REFUSED)
        if result.problem:
            log.warning("entries refused", step=result.step, problem=result.problem)
        self.steps_done += 1
        self.tokens_done += result.num_tokens
        trace_step(self._telemetry, result, worker=self._worker, stage=self._assignment.index)
