"""A pool for tests of the scheduler: real NATS and Redis, workers that speak the real messages and compute nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from redis.asyncio import Redis

from molink_common import subjects
from molink_common.bus import NatsBus, open_bus, serve
from molink_common.identity import new_sequence_id
from molink_common.messages import (
    Admitted,
    AskSequences,
    AssignStage,
    ClusterState,
    Done,
    Dtype,
    Failed,
    FinishReason,
    Heartbeat,
    LayerRange,
    Message,
    ModelCard,
    PreloadStages,
    Refused,
    ReleaseStage,
    SequencesHeld,
    StagePhase,
    StageReport,
    StartSequence,
    StepTokens,
    StopSequence,
    SubmitSequence,
    TokenEvent,
)
from molink_common.sampling import SamplingOptions
from molink_scheduler.settings import SchedulerSettings
from molink_scheduler.shell import serve_scheduler
from molink_scheduler.store import open_store

CARD = ModelCard(
    name="Tiny",
    aliases=("demo",),
    fingerprint="f" * 64,
    family="llama",
    packed=True,
    num_layers=4,
    hidden_size=8,
    vocabulary_size=100,
    context_length=512,
    checkpoint_dtype="float32",
    layer_parameters=(1000,) * 4,
    embedding_parameters=800,
    output_parameters=800,
    kv_scalars_per_token=(16,) * 4,
)


ORDERS = (AssignStage, PreloadStages, ReleaseStage)


class FakeWorker:
    """Takes any stage at once. As the head it keeps what it was told to start."""

    def __init__(self, bus: NatsBus, name: str) -> None:
        self.bus, self.name = bus, name
        self.stage: StageReport | None = None
        self.assignments: list[AssignStage] = []
        self.started: dict[str, StartSequence] = {}
        self.starts: list[StartSequence] = []
        self.preloaded: tuple[LayerRange, ...] = ()
        self.changed = asyncio.Event()
        self.is_alive = True

    async def _control(self, message: Message) -> Message:
        if isinstance(message, ReleaseStage):
            if self.stage is not None and self.stage.pipeline == message.pipeline:
                self.stage = None
        elif isinstance(message, PreloadStages):
            self.preloaded = message.layers
        else:
            assert isinstance(message, AssignStage)
            self.assignments.append(message)
            if message.continues_epoch is None:
                self.started.clear()
            self.stage = StageReport(
                pipeline=message.pipeline,
                epoch=message.epoch,
                index=message.index,
                first_layer=message.first_layer,
                last_layer=message.last_layer,
                phase=StagePhase.READY,
            )
        self.changed.set()
        return Done()

    async def _head(self, message: Message) -> Message:
        if isinstance(message, AskSequences):
            assert self.stage is not None
            return SequencesHeld(pipeline=1, epoch=self.stage.epoch, sequences=tuple(self.started))
        if isinstance(message, StopSequence):
            self.started.pop(message.sequence, None)
        else:
            assert isinstance(message, StartSequence)
            if self.stage is None or message.epoch != self.stage.epoch:
                return Failed(message="not the head of this epoch")
            self.started[message.sequence] = message
            self.starts.append(message)
        self.changed.set()
        return Done()

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def run(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for subscription in (
                await serve(self.bus, subjects.control(self.name), self._control, *ORDERS),
                await serve(self.bus, subjects.head(self.name), self._head, StartSequence, StopSequence, AskSequences),
            ):
                stack.push_async_callback(subscription.close)
            while self.is_alive:
                await self.bus.send(subjects.heartbeat(self.name), self.heartbeat())
                await asyncio.sleep(0.2)

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(
            worker=self.name,
            version="test",
            device="cpu",
            device_name="fake",
            native_dtypes=(Dtype.FLOAT32,),
            memory_bytes=10_000_000,
            card=CARD,
            stage=self.stage,
            preloaded=self.preloaded,
        )

    async def speak(self, sequence: str, index: int, token: int, finish: FinishReason | None = None) -> None:
        """As the tail would."""
        assert self.stage is not None
        event = TokenEvent(sequence=sequence, index=index, token=token, finish=finish)
        step = StepTokens(pipeline=1, epoch=self.stage.epoch, step=index, events=(event,))
        await self.bus.send(subjects.tokens(1), step)


class Stand:
    """A pool: one broker, one Redis, schedulers and workers that come and go."""

    def __init__(self, bus: NatsBus, redis: Redis, settings: SchedulerSettings, tasks: asyncio.TaskGroup) -> None:
        self.bus, self.redis, self.settings, self._tasks = bus, redis, settings, tasks
        self.states: list[ClusterState] = []
        self._heard = asyncio.Event()

    async def hear_state(self, state: ClusterState) -> None:
        self.states.append(state)
        self._heard.set()

    async def until_state(self, condition: Callable[[ClusterState], bool], timeout_s: float = 12) -> ClusterState:
        self.states.clear()
        async with asyncio.timeout(timeout_s):
            while True:
                for state in self.states:
                    if condition(state):
                        return state
                self._heard.clear()
                await self._heard.wait()

    def start_worker(self, name: str) -> FakeWorker:
        worker = FakeWorker(self.bus, name)
        self._tasks.create_task(worker.run())
        return worker

    def start_scheduler(self) -> tuple[asyncio.Event, asyncio.Task[None]]:
        stop = asyncio.Event()

        async def run() -> None:
            async with (
                open_bus(self.settings.bus_settings(), name="scheduler") as bus,
                open_store(self.settings.redis_url) as store,
            ):
                await serve_scheduler(self.settings, bus, store, stop)

        return stop, self._tasks.create_task(run())

    async def submit(self, *, model: str = "demo", max_tokens: int = 10) -> tuple[str, Admitted | Refused]:
        sequence = new_sequence_id()
        request = SubmitSequence(
            sequence=sequence,
            gateway="g1",
            request="r",
            model=model,
            prompt=(1, 2, 3),
            options=SamplingOptions(max_tokens=max_tokens),
        )
        return sequence, await self.bus.ask(subjects.SUBMIT, request, Admitted, Refused, timeout_s=5)

    async def sequence_keys(self) -> list[bytes]:
        keys = [key async for key in self.redis.scan_iter(match="molink:v1:*")]
        return [key for key in keys if b"sequence" in key or b"tokens" in key]

    async def until_no_sequence_keys(self, timeout_s: float = 5) -> None:
        async with asyncio.timeout(timeout_s):
            while await self.sequence_keys():  # noqa: ASYNC110  Redis tells nobody of a deletion
                await asyncio.sleep(0.01)

    async def until_tokens(self, sequence: str, size_bytes: int, timeout_s: float = 5) -> None:
        async with asyncio.timeout(timeout_s):
            while await self.redis.strlen(f"molink:v1:tokens:{sequence}") != size_bytes:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
