"""The scheduler's hands and ears: NATS and the store on one side, the machine on the other.

Whatever arrives becomes an event at once; no handler waits, so nothing delays the next message. Instructions
go out in their order: what needs no answer through one sender, questions as tasks of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import assert_never

from molink_common import messages, subjects
from molink_common.bus import Bus, Incoming, Payload, serve
from molink_common.errors import BusError, BusUnavailable, MolinkError, ProtocolError
from molink_common.identity import new_peer_id
from molink_common.logs import get_logger
from molink_common.messages import (
    AskSequences,
    AskState,
    CancelSequence,
    Done,
    Failed,
    GatewayAlive,
    Heartbeat,
    JoinPool,
    Message,
    ReleaseStage,
    SequencesHeld,
    StepTokens,
    SubmitSequence,
    Welcome,
)
from molink_scheduler.events import (
    AssignAnswered,
    CancelAsked,
    EpochTaken,
    Event,
    GatewayAliveArrived,
    HeartbeatArrived,
    Restored,
    SequencesHeldArrived,
    SequenceSubmitted,
    StartAnswered,
    StoreEmptied,
    Tick,
    TokensArrived,
)
from molink_scheduler.instructions import (
    AppendTokens,
    AskSequencesOf,
    AssignStageTo,
    BroadcastState,
    DeleteSequence,
    FailSequence,
    Instruction,
    ReleaseStageOf,
    ReplyTo,
    SavePipeline,
    SaveSequence,
    SaveWorker,
    StartSequenceAt,
    StopSequenceAt,
    TakeEpoch,
)
from molink_scheduler.machine import Machine
from molink_scheduler.settings import SchedulerSettings
from molink_scheduler.store import Lease, Store, StoreUnavailable
from molink_scheduler.writer import WriteBehind

log = get_logger("scheduler")

TICK_S = 0.25
LEASE_EXPIRY_S = 4.0
LEASE_RENEWAL_S = 1.0
_ASSIGN_TIMEOUT_S = 5.0
_HEAD_TIMEOUT_S = 2.0
_OUTBOX_MESSAGES = 16384

Respond = Callable[[Payload], "asyncio.Future[None]"]


class LeaseLost(MolinkError):
    """Another scheduler has become the active one."""


class _Stopped(Exception):
    """Ends the group, with every question that is still open."""


async def serve_scheduler(settings: SchedulerSettings, bus: Bus, store: Store, stop: asyncio.Event) -> None:
    """Be the active scheduler whenever no other is, until `stop`.

    Raises:
        StoreUnavailable: the store does not answer within ``redis_connect_timeout_s`` of the start.
    """
    owner = new_peer_id("scheduler")
    while await _wait_for_lease(settings, store, owner, stop):
        try:
            await Scheduler(settings, bus, store, owner).run(stop)
        except* LeaseLost:
            log.warning("another scheduler has taken over; standing by")


async def _wait_for_lease(settings: SchedulerSettings, store: Store, owner: str, stop: asyncio.Event) -> bool:
    """True as soon as this scheduler is the active one, False when it is stopped before."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + settings.redis_connect_timeout_s
    is_told = False
    while not stop.is_set():
        try:
            if await store.take_lease(owner, expiry_s=LEASE_EXPIRY_S) is not Lease.ANOTHERS:
                return True
        except StoreUnavailable as error:
            if loop.time() >= deadline_s:
                raise StoreUnavailable(
                    f"no Redis answers within {settings.redis_connect_timeout_s:g} s ({error}). "
                    "Start one, or set --redis-url."
                ) from error
        else:
            deadline_s = loop.time() + settings.redis_connect_timeout_s
            if not is_told:
                is_told = True
                log.info("another scheduler is active; standing by")
        await _wait(stop, LEASE_RENEWAL_S / 2)
    return False


async def _wait(stop: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), timeout_s)


class Scheduler:
    """The active scheduler. Holds the lease while it runs."""

    def __init__(self, settings: SchedulerSettings, bus: Bus, store: Store, owner: str) -> None:
        self._settings = settings
        self._bus = bus
        self._store = store
        self._owner = owner
        self._machine = Machine(settings)
        self._writer = WriteBehind(store, self._post)
        self._outbox: asyncio.Queue[tuple[Respond | str, Message]] = asyncio.Queue(_OUTBOX_MESSAGES)
        self._replies: dict[int, Respond] = {}
        self._reply_numbers = count()
        self._tasks: asyncio.TaskGroup

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`.

        Raises:
            LeaseLost: in a group; another scheduler serves now.
            StoreUnavailable: in a group; the state could not be loaded.
        """
        snapshot = await self._store.load()
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._tasks.create_task(self._writer.run())
                self._tasks.create_task(self._send_outbox())
                self._tasks.create_task(self._keep_lease())
                self._post(Restored(snapshot))
                log.info("scheduler active", model=self._settings.model, sequences=len(snapshot.sequences))
                async with self._listening():
                    while not stop.is_set():
                        self._post(Tick(self._bus.is_connected))
                        await _wait(stop, TICK_S)
                raise _Stopped  # noqa: TRY301  the group has no other way to end its tasks
        except* _Stopped:
            pass
        await self._writer.drain(timeout_s=2.0)
        with contextlib.suppress(StoreUnavailable):
            await self._store.release_lease(self._owner)

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        bus = self._bus
        async with contextlib.AsyncExitStack() as subscriptions:
            for subscription in (
                await bus.subscribe(subjects.SUBMIT, self._hear_submit),
                await serve(bus, subjects.ALL_TOKENS, self._hear_tokens, StepTokens),
                await serve(bus, subjects.ALL_HEARTBEATS, self._hear_heartbeat, Heartbeat),
                await serve(bus, subjects.CANCEL, self._hear_cancel, CancelSequence),
                await serve(bus, subjects.ALL_GATEWAYS_ALIVE, self._hear_gateway, GatewayAlive),
                await serve(bus, subjects.JOIN, self._hear_join, JoinPool),
                await serve(bus, subjects.STATUS, self._hear_status, AskState),
            ):
                subscriptions.push_async_callback(subscription.close)
            yield

    def _post(self, event: Event) -> None:
        """Let the machine decide about an event, and begin what it wants."""
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
            case ReplyTo(reply, message):
                self._send(self._replies.pop(reply), message)
            case FailSequence(gateway, failed):
                log.warning("sequence failed", sequence=failed.sequence, problem=failed.message)
                self._send(subjects.gateway_failures(gateway), failed)
            case BroadcastState():
                self._send(subjects.STATE, self._machine.state(now_s=self._now_s()))
            case TakeEpoch(above):
                self._tasks.create_task(self._take_epoch(above))
            case AssignStageTo():
                self._tasks.create_task(self._assign(instruction))
            case ReleaseStageOf(worker, pipeline):
                self._tasks.create_task(self._tell(subjects.control(worker), ReleaseStage(pipeline=pipeline)))
            case StartSequenceAt():
                self._tasks.create_task(self._start(instruction))
            case StopSequenceAt(worker, stop):
                self._tasks.create_task(self._tell(subjects.head(worker), stop))
            case AskSequencesOf(worker, pipeline):
                self._tasks.create_task(self._ask_sequences(worker, pipeline))
            case _:
                assert_never(instruction)

    def _send(self, where: Respond | str, message: Message) -> None:
        try:
            self._outbox.put_nowait((where, message))
        except asyncio.QueueFull:
            log.error("outbox full, a message is lost", kind=message.TYPE)

    async def _send_outbox(self) -> None:
        while True:
            where, message = await self._outbox.get()
            try:
                if isinstance(where, str):
                    await self._bus.send(where, message)
                else:
                    await where(messages.encode(message))
            except BusUnavailable as error:
                log.warning("message not sent", kind=message.TYPE, problem=str(error))

    # --- questions: each ends in an event ---

    async def _ask(self, subject: str, message: Message, timeout_s: float) -> str | None:
        """None when the other side said `Done`, else the problem."""
        try:
            answer = await self._bus.ask(subject, message, Done, Failed, timeout_s=timeout_s)
        except (BusError, ProtocolError) as error:
            return str(error)
        return answer.message if isinstance(answer, Failed) else None

    async def _tell(self, subject: str, message: Message) -> None:
        problem = await self._ask(subject, message, _HEAD_TIMEOUT_S)
        if problem is not None:
            log.debug("not done", kind=message.TYPE, problem=problem)

    async def _take_epoch(self, above: int) -> None:
        try:
            epoch = await self._store.next_epoch(above)
        except StoreUnavailable as error:
            # the workers refuse what is older than they have seen, so serving on is safe while the lease is ours
            log.warning("an epoch drawn without the store", problem=str(error))
            epoch = above + 1
        self._post(EpochTaken(epoch))

    async def _assign(self, instruction: AssignStageTo) -> None:
        worker, stage = instruction.worker, instruction.stage
        problem = await self._ask(subjects.control(worker), stage, _ASSIGN_TIMEOUT_S)
        log.info(
            "stage assigned" if problem is None else "stage not taken",
            worker=worker,
            epoch=stage.epoch,
            layers=f"{stage.first_layer}-{stage.last_layer}",
            num_blocks=stage.num_blocks,
            problem=problem,
        )
        self._post(AssignAnswered(worker, stage.epoch, problem))

    async def _start(self, instruction: StartSequenceAt) -> None:
        start = instruction.start
        problem = await self._ask(subjects.head(instruction.worker), start, _HEAD_TIMEOUT_S)
        if problem is not None:
            log.warning("sequence not started", sequence=start.sequence, problem=problem)
        self._post(StartAnswered(start.sequence, start.epoch, problem))

    async def _ask_sequences(self, worker: str, pipeline: int) -> None:
        asked_at_s = self._now_s()
        question = AskSequences(pipeline=pipeline)
        try:
            held = await self._bus.ask(subjects.head(worker), question, SequencesHeld, timeout_s=_HEAD_TIMEOUT_S)
        except (BusError, ProtocolError) as error:
            log.warning("the head does not say what it holds", worker=worker, problem=str(error))
            return
        self._post(SequencesHeldArrived(held, asked_at_s))

    async def _keep_lease(self) -> None:
        while True:
            await asyncio.sleep(LEASE_RENEWAL_S)
            with contextlib.suppress(StoreUnavailable):  # the writer says so; nobody else can take it meanwhile
                match await self._store.take_lease(self._owner, expiry_s=LEASE_EXPIRY_S):
                    case Lease.ANOTHERS:
                        raise LeaseLost("another scheduler holds the lease")
                    case Lease.TAKEN:
                        log.warning("the lease had gone from the store; writing everything again")
                        self._post(StoreEmptied())
                    case Lease.RENEWED:
                        pass

    # --- ears ---

    async def _hear_submit(self, incoming: Incoming) -> None:
        if incoming.respond is None:
            log.warning("a sequence was submitted without waiting for the answer")
            return
        respond: Respond = incoming.respond  # type: ignore[assignment]
        try:
            request = messages.decode(incoming.data, SubmitSequence)
        except ProtocolError as error:
            self._send(respond, Failed(message=str(error)))
            return
        reply = next(self._reply_numbers)
        self._replies[reply] = respond
        self._post(SequenceSubmitted(request, reply))

    async def _hear_tokens(self, step: StepTokens) -> None:
        self._post(TokensArrived(step))

    async def _hear_heartbeat(self, heartbeat: Heartbeat) -> None:
        self._post(HeartbeatArrived(heartbeat))

    async def _hear_cancel(self, cancel: CancelSequence) -> None:
        self._post(CancelAsked(cancel.sequence, cancel.reason))

    async def _hear_gateway(self, alive: GatewayAlive) -> None:
        self._post(GatewayAliveArrived(alive.gateway))

    async def _hear_join(self, join: JoinPool) -> Message:
        log.info("a worker asks to join", worker=join.worker)
        return Welcome(model=self._settings.model)

    async def _hear_status(self, _: AskState) -> Message:
        return self._machine.state(now_s=self._now_s())
