"""The scheduler's hands and ears: NATS and the store on one side, the machine on the other.

Whatever arrives becomes an event at once; no handler waits, so nothing delays the next message. Instructions
go out in their order: what needs no answer through one sender, questions as tasks of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from itertools import count

from molink_common import messages, subjects
from molink_common.bus import Bus, Incoming, Payload, serve
from molink_common.errors import BusUnavailable, ProtocolError
from molink_common.identity import new_peer_id
from molink_common.logs import get_logger
from molink_common.messages import (
    AddKey,
    AskKeys,
    AskState,
    CancelSequence,
    ClusterState,
    Failed,
    GatewayAlive,
    Heartbeat,
    JoinPool,
    M,
    Message,
    ResumeSequence,
    RevokeKey,
    StepTokens,
    SubmitSequence,
    Welcome,
)
from molink_scheduler.disconnects import worker_gone
from molink_scheduler.events import (
    CancelAsked,
    Event,
    GatewayAliveArrived,
    HeartbeatArrived,
    KeyAddAsked,
    KeyRevokeAsked,
    KeysAsked,
    Restored,
    ResumeAsked,
    SequenceSubmitted,
    StoreEmptied,
    Tick,
    TokensArrived,
    WorkerDisconnected,
)
from molink_scheduler.instructions import (
    AppendTokens,
    BroadcastState,
    DeleteKey,
    DeleteSequence,
    FailSequence,
    Instruction,
    NoteLoss,
    Question,
    ReplyTo,
    SaveKey,
    SavePipeline,
    SaveSequence,
    SaveUsage,
    SaveWorker,
)
from molink_scheduler.lease import Tenure, wait_for_term
from molink_scheduler.machine import Machine
from molink_scheduler.questions import Questions
from molink_scheduler.settings import SchedulerSettings
from molink_scheduler.store import LeaseLost, Store, StoreUnavailable
from molink_scheduler.writer import WriteBehind

log = get_logger("scheduler")

TICK_S = 0.25
_OUTBOX_MESSAGES = 16384

Respond = Callable[[Payload], "asyncio.Future[None]"]


class _Stopped(Exception):
    """Ends the group, with every question that is still open."""


async def serve_scheduler(settings: SchedulerSettings, bus: Bus, store: Store, stop: asyncio.Event) -> None:
    """Be the active scheduler whenever no other is, until `stop`.

    Raises:
        StoreUnavailable: the store does not answer within ``redis_connect_timeout_s`` of the start.
    """
    owner = new_peer_id("scheduler")
    timeout_s = settings.redis_connect_timeout_s
    newest = 0
    while (term := await wait_for_term(store, owner, stop, connect_timeout_s=timeout_s, above=newest)) is not None:
        newest, timeout_s = term.number, math.inf  # who has been active waits for as long as it takes
        try:
            await Scheduler(settings, bus, Tenure(store, term)).run(stop)
        except* LeaseLost:
            log.warning("another scheduler has taken over; standing by")
        except* StoreUnavailable as failed:
            log.warning("the state could not be loaded; trying again", problem=str(failed.exceptions[0]))


async def _wait(stop: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await stop.wait()


class Scheduler:
    """The active scheduler. Holds the lease while it runs."""

    def __init__(self, settings: SchedulerSettings, bus: Bus, tenure: Tenure) -> None:
        self._settings = settings
        self._bus = bus
        self._tenure = tenure
        self._machine = Machine(settings)
        self._writer = WriteBehind(tenure, self._post)
        self._questions = Questions(bus, tenure, self._post)
        self._held: deque[Event] = deque()
        self._outbox: asyncio.Queue[tuple[Respond | str, Message]] = asyncio.Queue(_OUTBOX_MESSAGES)
        self._replies: dict[int, Respond] = {}
        self._reply_numbers = count()
        self._newest_term = tenure.term.number
        self._tasks: asyncio.TaskGroup

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`.

        Raises:
            LeaseLost: in a group; another scheduler serves now.
            StoreUnavailable: in a group; the state could not be loaded.
        """
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._tasks.create_task(self._tenure.keep(lambda: self._post(StoreEmptied())))
                snapshot = await self._tenure.load()
                self._tasks.create_task(self._writer.run())
                self._tasks.create_task(self._send_outbox())
                self._post(Restored(snapshot, time.time()))
                async with self._listening():
                    self._tasks.create_task(self._say_active(len(snapshot.sequences)))
                    while not stop.is_set():
                        if self._newest_term > self._tenure.term.number:
                            raise LeaseLost("another scheduler says so")
                        self._post(Tick(self._bus.is_connected, time.time()))
                        await _wait(stop, TICK_S)
                raise _Stopped  # noqa: TRY301  the group has no other way to end its tasks
        except* _Stopped:
            pass
        await self._writer.drain(timeout_s=2.0)
        await self._tenure.release()

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        bus = self._bus
        async with contextlib.AsyncExitStack() as subscriptions:
            for subscription in (
                await bus.subscribe(subjects.SUBMIT, self._hear_submit),
                await bus.subscribe(subjects.RESUME, self._hear_resume),
                await bus.subscribe(subjects.KEYS, self._hear_keys),
                await bus.subscribe(subjects.CHANGE_KEYS, self._hear_change_of_keys),
                await serve(bus, subjects.ALL_TOKENS, self._hear_tokens, StepTokens),
                await serve(bus, subjects.ALL_HEARTBEATS, self._hear_heartbeat, Heartbeat),
                await bus.subscribe(subjects.BROKER_DISCONNECTS, self._hear_disconnect),
                await serve(bus, subjects.CANCEL, self._hear_cancel, CancelSequence),
                await serve(bus, subjects.ALL_GATEWAYS_ALIVE, self._hear_gateway, GatewayAlive),
                await serve(bus, subjects.JOIN, self._hear_join, JoinPool),
                await serve(bus, subjects.STATUS, self._hear_status, AskState),
                await serve(bus, subjects.STATE, self._hear_state, ClusterState),
            ):
                subscriptions.push_async_callback(subscription.close)
            yield

    async def _say_active(self, num_sequences: int) -> None:
        with contextlib.suppress(BusUnavailable):  # then it hears, and says so, late
            await self._bus.flush()
        log.info("scheduler active", model=self._settings.model, sequences=num_sequences)

    def _post(self, event: Event) -> None:
        """Let the machine decide about an event, and begin what it wants; later, if this may not be our term any more.

        A frozen process that wakes finds much to hear at once, and first has to know whether that is still for it.
        """
        self._held.append(event)
        while self._held and self._tenure.is_sure:
            self._decide(self._held.popleft())

    def _decide(self, event: Event) -> None:
        try:
            instructions = self._machine.handle(event, now_s=self._now_s())
        except Exception:  # one event that we cannot handle must not end the service
            log.exception("an event could not be handled", event_kind=type(event).__name__)
            return
        for instruction in instructions:
            self._carry_out(instruction)

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case SaveSequence() | AppendTokens() | DeleteSequence() | SavePipeline() | SaveWorker():
                self._writer.put(instruction)
            case SaveKey() | DeleteKey() | SaveUsage():
                self._writer.put(instruction)
            case ReplyTo(reply, message):
                self._send(self._replies.pop(reply), message)
            case FailSequence(gateway, failed):
                log.warning("sequence failed", sequence=failed.sequence, problem=failed.message)
                self._send(subjects.gateway_failures(gateway), failed)
            case BroadcastState():
                self._send(subjects.STATE, self._state())
            case NoteLoss(worker, reason, silent_s):
                log.warning("worker lost", worker=worker, reason=reason, silent_s=round(silent_s, 3))
            case _:
                self._tasks.create_task(self._ask(instruction))

    def _send(self, where: Respond | str, message: Message) -> None:
        try:
            self._outbox.put_nowait((where, message))
        except asyncio.QueueFull:
            log.error("outbox full, a message is lost", kind=message.TYPE)

    async def _send_outbox(self) -> None:
        while True:
            where, message = await self._outbox.get()
            await self._tenure.sure()
            try:
                if isinstance(where, str):
                    await self._bus.send(where, message)
                else:
                    await where(messages.encode(message))
            except BusUnavailable as error:
                log.warning("message not sent", kind=message.TYPE, problem=str(error))

    async def _ask(self, question: Question) -> None:
        await self._tenure.sure()
        await self._questions.ask(question)

    # --- ears ---

    async def _hear_submit(self, incoming: Incoming) -> None:
        request, reply = self._question(incoming, SubmitSequence)
        if request is not None:
            self._post(SequenceSubmitted(request, reply))

    async def _hear_resume(self, incoming: Incoming) -> None:
        request, reply = self._question(incoming, ResumeSequence)
        if request is not None:
            self._post(ResumeAsked(request, reply))

    async def _hear_keys(self, incoming: Incoming) -> None:
        asked, reply = self._question(incoming, AskKeys)
        if asked is not None:
            self._post(KeysAsked(reply))

    async def _hear_change_of_keys(self, incoming: Incoming) -> None:
        order, reply = self._question(incoming, AddKey, RevokeKey)
        if isinstance(order, AddKey):
            log.info("a key is to be added", key=order.key.id, name=order.key.name)
            self._post(KeyAddAsked(order.key, reply))
        elif isinstance(order, RevokeKey):
            log.info("a key is to be revoked", key=order.key)
            self._post(KeyRevokeAsked(order.key, reply))

    def _question(self, incoming: Incoming, *kinds: type[M]) -> tuple[M | None, int]:
        """A question and the number of its answer, which the machine gives later. None: it is answered already."""
        reply = next(self._reply_numbers)
        if incoming.respond is None:
            log.warning("asked without waiting for the answer", subject=incoming.subject)
            return None, reply
        respond: Respond = incoming.respond  # type: ignore[assignment]
        try:
            request = messages.decode(incoming.data, *kinds)
        except ProtocolError as error:
            self._send(respond, Failed(message=str(error)))
            return None, reply
        self._replies[reply] = respond
        return request, reply

    async def _hear_tokens(self, step: StepTokens) -> None:
        self._post(TokensArrived(step))

    async def _hear_heartbeat(self, heartbeat: Heartbeat) -> None:
        self._post(HeartbeatArrived(heartbeat))

    async def _hear_disconnect(self, incoming: Incoming) -> None:
        worker = worker_gone(incoming.data)
        if worker is not None:
            self._post(WorkerDisconnected(worker))

    async def _hear_cancel(self, cancel: CancelSequence) -> None:
        self._post(CancelAsked(cancel.sequence, cancel.reason, cancel.after_tokens))

    async def _hear_gateway(self, alive: GatewayAlive) -> None:
        self._post(GatewayAliveArrived(alive.gateway))

    async def _hear_join(self, join: JoinPool) -> Message:
        log.info("a worker asks to join", worker=join.worker)
        return Welcome(model=self._settings.model)

    async def _hear_status(self, _: AskState) -> Message:
        return self._state()

    async def _hear_state(self, state: ClusterState) -> None:
        """Of the active scheduler. If that is another one, this one is cut off from the store alone."""
        self._newest_term = max(self._newest_term, state.term)

    def _state(self) -> ClusterState:
        return self._machine.state(now_s=self._now_s()).model_copy(update={"term": self._tenure.term.number})
