"""The scheduler's and a gateway's side of a conversation with stage workers that run in the test's process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from molink_common import messages, subjects
from molink_common.bus import BusSettings, Incoming, NatsBus, open_bus, serve
from molink_common.identity import new_peer_id, new_sequence_id
from molink_common.messages import (
    AssignStage,
    Done,
    Dtype,
    Failed,
    FinishReason,
    HeadReport,
    Heartbeat,
    JoinPool,
    Message,
    PipelinePolicy,
    SequencesHeld,
    StagePhase,
    StartSequence,
    StepTokens,
    Welcome,
)
from molink_common.sampling import SamplingOptions
from molink_common.telemetry import Telemetry
from molink_stage_worker.engine.interface import Engine, Progress, StageSpec
from molink_stage_worker.hardware import Hardware
from molink_stage_worker.stage_slot import SlotSettings
from molink_stage_worker.worker import Prepared, Worker

Load = Callable[[StageSpec, Progress], Engine]


@dataclass
class Pool:
    """Gives orders, hears heartbeats and tokens."""

    bus: NatsBus
    url: str
    pipeline: int
    model: Prepared
    load: Load
    block_size: int
    telemetry: Telemetry = field(default_factory=lambda: Telemetry(None))
    engines: dict[str, Engine] = field(default_factory=dict)
    beats: dict[str, Heartbeat] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    finishes: dict[str, FinishReason] = field(default_factory=dict)
    early: dict[str, dict[int, int]] = field(default_factory=dict)
    """By index: tokens that came before those in front of them."""
    ended_at: dict[str, int] = field(default_factory=dict)
    """Index of the last token."""
    failed: set[str] = field(default_factory=set)
    heard: asyncio.Condition = field(default_factory=asyncio.Condition)
    load_problem: Exception | None = None
    policy: PipelinePolicy = field(default_factory=PipelinePolicy)

    async def on_beat(self, message: Message) -> None:
        assert isinstance(message, Heartbeat)
        async with self.heard:
            self.beats[message.worker] = message
            self.heard.notify_all()

    async def on_tokens(self, incoming: Incoming) -> None:
        step = messages.decode(incoming.data, StepTokens)
        async with self.heard:
            for event in step.events:
                got = self.tokens.setdefault(event.sequence, [])
                self.early.setdefault(event.sequence, {})[event.index] = event.token
                while (token := self.early[event.sequence].pop(len(got), None)) is not None:
                    got.append(token)
                if event.finish is not None:
                    self.finishes[event.sequence] = event.finish
                    self.ended_at[event.sequence] = event.index
            self.failed.update(step.failed)
            self.heard.notify_all()

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s), self.heard:
            await self.heard.wait_for(condition)

    def load_engine(self, worker: str) -> Load:
        def load(spec: StageSpec, progress: Progress) -> Engine:
            if self.load_problem is not None:
                raise self.load_problem
            progress(0.5)
            self.engines[worker] = self.load(spec, progress)
            return self.engines[worker]

        return load

    @contextlib.asynccontextmanager
    async def worker(self, *, step_tokens: int = 16, drain_timeout_s: float = 0.0) -> AsyncIterator[Worker]:
        name = new_peer_id("w")
        workers: list[Worker] = []

        def on_reconnect() -> None:
            for one in workers:
                one.on_reconnect()

        async with (
            open_bus(BusSettings(url=self.url), name=name, on_reconnect=on_reconnect) as bus,
            open_bus(BusSettings(url=self.url), name=f"{name}-bulk", on_reconnect=on_reconnect) as bulk_bus,
        ):
            worker = Worker(
                bus=bus,
                bulk_bus=bulk_bus,
                settings=SlotSettings(worker=name, device="cpu", threads=1, step_tokens=step_tokens, max_running=64),
                site="here",
                hardware=Hardware(
                    device="cpu", device_name="test", native_dtypes=(Dtype.FLOAT32,), memory_bytes=1 << 30
                ),
                model=None,
                drain_timeout_s=drain_timeout_s,
                prepare=lambda _reference, _told: self.model,
                load_engine=self.load_engine(name),
                telemetry=self.telemetry,
            )
            workers.append(worker)
            stop = asyncio.Event()
            running = asyncio.create_task(worker.run(stop))
            try:
                await self.until(lambda: name in self.beats and self.beats[name].card is not None)
                yield worker
            finally:
                stop.set()
                await asyncio.wait_for(running, timeout=10)

    async def order(self, worker: str, message: Message) -> Message:
        return await self.bus.ask(subjects.control(worker), message, Done, Failed, timeout_s=5)

    async def to_head(self, worker: str, message: Message) -> Message:
        return await self.bus.ask(subjects.head(worker), message, Done, Failed, SequencesHeld, timeout_s=5)

    def assignment(self, index: int, num_stages: int, *, epoch: int = 1, num_blocks: int = 64) -> AssignStage:
        cuts = [self.model.card.num_layers * stage // num_stages for stage in range(num_stages + 1)]
        return AssignStage(
            pipeline=self.pipeline,
            epoch=epoch,
            fingerprint=self.model.card.fingerprint,
            index=index,
            num_stages=num_stages,
            first_layer=cuts[index],
            last_layer=cuts[index + 1],
            dtype=Dtype.FLOAT32,
            num_blocks=num_blocks,
            block_size=self.block_size,
            policy=self.policy,
        )

    async def form(self, workers: Sequence[str], *, epoch: int = 1, num_blocks: int = 64) -> None:
        for index, worker in enumerate(workers):
            order = self.assignment(index, len(workers), epoch=epoch, num_blocks=num_blocks)
            assert await self.order(worker, order) == Done()
        await self.until(
            lambda: all(
                (stage := self.beats[worker].stage) is not None
                and stage.phase is StagePhase.READY
                and stage.epoch == epoch
                for worker in workers
            )
        )

    async def start(
        self, head: str, prompt: Sequence[int], count: int, *, epoch: int = 1, trace: str | None = None
    ) -> str:
        sequence = new_sequence_id()
        start = StartSequence(
            pipeline=self.pipeline,
            epoch=epoch,
            sequence=sequence,
            prompt=tuple(prompt),
            options=SamplingOptions(max_tokens=count, temperature=0.0),
            trace=trace,
        )
        assert await self.to_head(head, start) == Done()
        return sequence

    async def until_idle(self, head: str, num_blocks: int = 64) -> HeadReport:
        """Wait for a heartbeat sent from now on in which the head holds nothing and no step is under way."""
        del self.beats[head]

        def found() -> HeadReport | None:
            stage = self.beats[head].stage if head in self.beats else None
            return None if stage is None else stage.head

        def is_idle() -> bool:
            report = found()
            return (
                report is not None
                and (report.running, report.waiting, report.steps_under_way) == (0, 0, 0)
                and report.free_blocks == num_blocks
            )

        await self.until(is_idle)
        report = found()
        assert report is not None
        return report

    @contextlib.asynccontextmanager
    async def workers(self, count: int) -> AsyncIterator[list[str]]:
        async with contextlib.AsyncExitStack() as stack:
            yield [(await stack.enter_async_context(self.worker()))._worker for _ in range(count)]


@contextlib.asynccontextmanager
async def open_pool(
    bus: NatsBus, url: str, pipeline: int, model: Prepared, load: Load, block_size: int
) -> AsyncIterator[Pool]:
    pool = Pool(bus=bus, url=url, pipeline=pipeline, model=model, load=load, block_size=block_size)

    async def welcome(_: Message) -> Message:
        return Welcome(model="whatever")

    subscriptions = [
        await serve(bus, subjects.JOIN, welcome, JoinPool),
        await serve(bus, subjects.ALL_HEARTBEATS, pool.on_beat, Heartbeat),
        await bus.subscribe(subjects.tokens(pipeline), pool.on_tokens),
    ]
    yield pool
    for subscription in subscriptions:
        await subscription.close()
