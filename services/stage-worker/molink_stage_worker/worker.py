"""The life of a worker: join the pool, prepare the model, hold a stage, leave.

It only ever connects outwards, to NATS: one connection for orders, sequences, files and decode frames, and one for
bulk frames, so that a prompt's activations never stand in front of a token's.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from molink_common import __version__, subjects
from molink_common.bus import Bus, serve
from molink_common.errors import BusError, MolinkError, NobodyListens
from molink_common.logs import get_logger
from molink_common.messages import (
    AskState,
    AssignStage,
    ClusterState,
    Done,
    Failed,
    FetchFile,
    FileChunk,
    Heartbeat,
    JoinPool,
    LayerRange,
    Message,
    PreloadStages,
    ReleaseStage,
    Welcome,
)
from molink_common.telemetry import Telemetry
from molink_stage_worker.hardware import Hardware, rss_bytes
from molink_stage_worker.head import serve_head
from molink_stage_worker.stage_loading import Checkpoints, EngineLoader, Told
from molink_stage_worker.stage_runner import StageRunner
from molink_stage_worker.stage_slot import SlotSettings, StageSlot

log = get_logger("worker")

_HEARTBEAT_S = 0.5
_LONGEST_PAUSE_S = 2.0
_PREPARE_AGAIN_S = 30.0
_ASK_TIMEOUT_S = 5.0
_ORDERS = (AssignStage, PreloadStages, ReleaseStage)


class Prepared(Checkpoints, Protocol):
    """A model that is ready to be cut into stages."""

    def read_file(self, name: str, offset: int, size: int) -> bytes:
        """A piece of one of the card's tokenizer files; raises `ModelError` for any other name."""


Prepare = Callable[[str, Told], Prepared]
"""Blocks until the model of a reference is at hand; says what it is doing. Runs in a thread."""


class Worker:
    """One worker process. Everything it waits for has an end or is said in its heartbeat."""

    def __init__(
        self,
        *,
        bus: Bus,
        bulk_bus: Bus,
        settings: SlotSettings,
        site: str,
        hardware: Hardware,
        model: str | None,
        drain_timeout_s: float,
        prepare: Prepare,
        load_engine: EngineLoader,
        telemetry: Telemetry,
    ) -> None:
        self._bus = bus
        self._bulk_bus = bulk_bus
        self._settings = settings
        self._worker = settings.worker
        self._site = site
        self._hardware = hardware
        self._model = model
        self._drain_timeout_s = drain_timeout_s
        self._prepare = prepare
        self._load_engine = load_engine
        self._telemetry = telemetry
        self._prepared: Prepared | None = None
        self._preparing: str | None = "waiting for the scheduler"
        self._problem: str | None = None
        self._leaving = False
        self._changed = asyncio.Event()
        self._slot: StageSlot | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`, then leave in order."""
        async with asyncio.TaskGroup() as tasks:
            slot = self._slot = StageSlot(
                bus=self._bus,
                bulk_bus=self._bulk_bus,
                tasks=tasks,
                settings=self._settings,
                memory_bytes=self._hardware.memory_bytes,
                load_engine=self._load_engine,
                telemetry=self._telemetry,
                on_change=self._changed.set,
            )
            subscriptions = [
                await serve(self._bus, subjects.control(self._worker), self._obey, *_ORDERS),
                await serve_head(self._bus, self._worker, self._at_work),
                await serve(self._bus, subjects.files(self._worker), self._hand_out, FetchFile),
            ]
            beats = tasks.create_task(self._beat())
            joining = tasks.create_task(self._join())
            await stop.wait()
            await self._leave()
            joining.cancel()
            slot.close()
            for subscription in subscriptions:
                await subscription.close()
            beats.cancel()
            await self._tell()

    def on_bus_fault(self, _problem: str) -> None:
        """The broker dropped or refused something: act as after an outage."""
        self.on_reconnect()

    def on_reconnect(self) -> None:
        """The connection is back."""
        if self._slot is not None:
            self._slot.on_reconnect()
        self._changed.set()

    # --- joining and leaving ---------------------------------------------------------------------------------

    async def _join(self) -> None:
        while self._prepared is None:
            reference = self._model or await self._ask_what_is_served()
            try:
                self._say("preparing the model")
                self._prepared = await self._prepare_in_thread(reference)
            except (MolinkError, OSError) as error:
                log.error("model not prepared", model=reference, problem=str(error))
                self._preparing, self._problem = None, str(error)
                self._changed.set()
                await asyncio.sleep(_PREPARE_AGAIN_S)
            else:
                self._preparing = self._problem = None
                self._changed.set()
                log.info("model prepared", model=self._prepared.card.name)

    async def _ask_what_is_served(self) -> str:
        """Ask the scheduler, as long as it takes: it may start later than this worker."""
        pause_s = 0.1
        last_problem = ""
        while True:
            try:
                join = JoinPool(worker=self._worker)
                answer: Message = await self._bus.ask(subjects.JOIN, join, Welcome, Failed, timeout_s=_ASK_TIMEOUT_S)
            except MolinkError as error:
                problem = "no scheduler listens" if isinstance(error, NobodyListens) else str(error)
            else:
                if isinstance(answer, Welcome):
                    return answer.model
                problem = answer.message if isinstance(answer, Failed) else "unexpected answer"
            if problem != last_problem:
                last_problem = problem
                log.info("waiting for the scheduler", problem=problem)
                self._say(f"waiting for the scheduler: {problem}")
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)

    async def _prepare_in_thread(self, reference: str) -> Prepared:
        loop = asyncio.get_running_loop()

        def progress(doing: str, share: float | None) -> None:
            loop.call_soon_threadsafe(self._say, doing if share is None else f"{doing} {share:.0%}")

        return await asyncio.to_thread(self._prepare, reference, progress)

    def _say(self, doing: str) -> None:
        if self._prepared is None:
            self._preparing = doing

    async def _leave(self) -> None:
        """Ask for the stage to be placed elsewhere; wait for that no longer than the setting says."""
        self._leaving = True
        await self._tell()
        slot = self._slot
        if slot is None or slot.assignment is None:
            return
        log.info("leaving", waits_s=self._drain_timeout_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_timeout_s):
                while slot.assignment is not None and await self._scheduler_is_there():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(1.0):
                            await slot.released.wait()

    async def _scheduler_is_there(self) -> bool:
        """Without a scheduler nobody will take the stage over, and waiting for it is in vain."""
        try:
            await self._bus.ask(subjects.STATUS, AskState(), ClusterState, timeout_s=_ASK_TIMEOUT_S)
        except NobodyListens:
            return False
        except MolinkError:
            return self._bus.is_connected
        return True

    # --- heartbeats ------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        while True:
            self._changed.clear()
            await self._tell()
            # not wait_for: in Python 3.11 it swallows a cancellation that meets the event being set
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HEARTBEAT_S):
                    await self._changed.wait()

    async def _tell(self) -> None:
        with contextlib.suppress(BusError):  # the next one says it; reconnecting sends one at once
            await self._bus.send(subjects.heartbeat(self._worker), self._heartbeat())

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(
            worker=self._worker,
            sent_s=time.monotonic(),
            site=self._site,
            version=__version__,
            device=self._hardware.device,
            device_name=self._hardware.device_name,
            native_dtypes=self._hardware.native_dtypes,
            memory_bytes=self._hardware.memory_bytes,
            rss_bytes=rss_bytes(),
            card=None if self._prepared is None else self._prepared.card,
            preparing=self._preparing,
            problem=self._problem,
            leaving=self._leaving,
            stage=None if self._slot is None else self._slot.report(),
            preloaded=() if self._slot is None else self._slot.preloaded,
            parameters_per_s=self._hardware.parameters_per_s,
        )

    # --- orders ----------------------------------------------------------------------------------------------

    def _at_work(self) -> tuple[AssignStage, StageRunner] | None:
        slot = self._slot
        if slot is None or slot.assignment is None or slot.runner is None:
            return None
        return slot.assignment, slot.runner

    async def _obey(self, order: Message) -> Message:
        slot = self._slot
        assert slot is not None, "orders are taken only while the worker runs"
        assert isinstance(order, _ORDERS)
        match order:
            case ReleaseStage():
                if slot.assignment is not None and slot.assignment.pipeline == order.pipeline:
                    slot.release()
                return Done()
            case AssignStage():
                return self._take_on(slot, order)
            case PreloadStages():
                return self._preload(slot, order)

    def _take_on(self, slot: StageSlot, order: AssignStage) -> Message:
        held = slot.assignment
        if held == order:  # said twice means once
            return Done()
        problem = self._why_not(order.fingerprint, ((order.first_layer, order.last_layer),))
        if held is not None and held.pipeline == order.pipeline and order.epoch < held.epoch:
            problem = f"epoch {order.epoch} is older than the present one, {held.epoch}"
        # a leaving worker goes on with what it holds until that is placed elsewhere, but begins nothing
        if self._leaving and order.continues_epoch is None:
            problem = "this worker is leaving"
        if problem is None:
            log.info("stage assigned", **order.model_dump(mode="json", exclude={"fingerprint"}))
            assert self._prepared is not None, "without a model there is a problem"
            if order.continues_epoch is None:
                slot.assign(order, self._prepared)
            else:
                problem = slot.continue_in(order)
        if problem is not None:
            log.warning("stage refused", epoch=order.epoch, problem=problem)
            return Failed(message=problem)
        return Done()

    def _preload(self, slot: StageSlot, order: PreloadStages) -> Message:
        problem = "this worker is leaving" if self._leaving else self._why_not(order.fingerprint, order.layers)
        if problem is not None:
            return Failed(message=problem)
        assert self._prepared is not None, "without a model there is a problem"
        slot.preload(order, self._prepared)
        return Done()

    def _why_not(self, fingerprint: str, ranges: Sequence[LayerRange]) -> str | None:
        """Why these layers of this model cannot be held here."""
        if self._prepared is None:
            return "the model is not prepared yet"
        card = self._prepared.card
        if card.fingerprint != fingerprint:
            return f"this worker has prepared {card.fingerprint}, not {fingerprint}"
        for first, last in ranges:
            if not first < last <= card.num_layers:
                return f"layers [{first}, {last}) are no stage of this model"
        return None

    async def _hand_out(self, wanted: FetchFile) -> Message:
        if self._prepared is None:
            return Failed(message="the model is not prepared yet")
        try:
            data = await asyncio.to_thread(
                self._prepared.read_file, wanted.name, wanted.offset_bytes, wanted.size_bytes
            )
        except (MolinkError, OSError) as error:
            return Failed(message=str(error))
        return FileChunk(data=base64.b64encode(data))
