"""Two schedulers, each a process, on one broker and one Redis: killed, stopped, frozen; and a Redis that forgets."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from redis.asyncio import Redis

from bench.fault_lab.links import open_link
from molink.embedded import EmbeddedServer, start_nats, start_redis
from molink_common import subjects
from molink_common.bus import BusSettings, NatsBus, open_bus, serve
from molink_common.errors import BusError
from molink_common.identity import new_sequence_id
from molink_common.messages import (
    Admitted,
    AskSequences,
    AskState,
    AssignStage,
    CancelSequence,
    ClusterState,
    Done,
    FinishReason,
    GatewayAlive,
    Message,
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
from molink_scheduler.lease import LEASE_EXPIRY_S
from tests.scheduler_builders import make_heartbeat


class OneWorker:
    """A pool's only worker: holds every layer, and is told what to do by whoever is active."""

    def __init__(self, bus: NatsBus) -> None:
        self._bus = bus
        self.stage: StageReport | None = None
        self.assignments: list[AssignStage] = []
        self.starts: list[StartSequence] = []
        self.stops: list[StopSequence] = []
        self._running: dict[str, StartSequence] = {}
        self._told = asyncio.Event()

    async def _control(self, message: Message) -> Message:
        if isinstance(message, AssignStage):
            self.assignments.append(message)
            self._running.clear()
            self.stage = StageReport(
                pipeline=message.pipeline,
                epoch=message.epoch,
                index=message.index,
                first_layer=message.first_layer,
                last_layer=message.last_layer,
                phase=StagePhase.READY,
            )
        self._told.set()
        return Done()

    async def _head(self, message: Message) -> Message:
        assert self.stage is not None
        if isinstance(message, AskSequences):
            return SequencesHeld(pipeline=1, epoch=self.stage.epoch, sequences=tuple(self._running))
        if isinstance(message, StartSequence):
            self.starts.append(message)
            self._running[message.sequence] = message
        elif isinstance(message, StopSequence):
            self.stops.append(message)
            self._running.pop(message.sequence, None)
        self._told.set()
        return Done()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self._told.clear()
                await self._told.wait()

    async def live(self) -> None:
        """Until cancelled."""
        control = (AssignStage, ReleaseStage, PreloadStages)
        await serve(self._bus, subjects.control("w1"), self._control, *control)
        await serve(self._bus, subjects.head("w1"), self._head, StartSequence, StopSequence, AskSequences)
        while True:
            await self._bus.send(subjects.heartbeat("w1"), make_heartbeat("w1", stage=self.stage))
            await self._bus.send(subjects.gateway_alive("g1"), GatewayAlive(gateway="g1"))
            await asyncio.sleep(0.2)

    async def speak(self, sequence: str, index: int, finish: FinishReason | None = None) -> None:
        """The sequence's next token, which is its index."""
        assert self.stage is not None
        event = TokenEvent(sequence=sequence, index=index, token=index, finish=finish)
        step = StepTokens(pipeline=1, epoch=self.stage.epoch, step=index, events=(event,))
        await self._bus.send(subjects.tokens(1), step)


class OneScheduler:
    """`molink scheduler` as a process, and what it logs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._log = bytearray()
        self._spoke = asyncio.Event()

    async def follow(self) -> None:
        assert self.process.stderr is not None
        while data := await self.process.stderr.read(4096):
            self._log += data
            self._spoke.set()

    async def until_logged(self, words: bytes) -> None:
        async with asyncio.timeout(15):
            while words not in self._log:
                self._spoke.clear()
                await self._spoke.wait()
            del self._log[: self._log.index(words) + len(words)]


class Stand:
    """One broker, one Redis, one worker, and schedulers."""

    def __init__(self, bus: NatsBus, redis: Redis, urls: tuple[str, str], tasks: asyncio.TaskGroup) -> None:
        self.bus, self.redis, self._urls, self._tasks = bus, redis, urls, tasks
        self.worker = OneWorker(bus)
        self.schedulers: list[OneScheduler] = []

    async def start_scheduler(self, is_told: bytes, *, redis_port: int | None = None) -> OneScheduler:
        """Started, and it has logged this."""
        nats_url, redis_url = self._urls
        if redis_port is not None:
            redis_url = f"redis://127.0.0.1:{redis_port}/0"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "molink_scheduler", "--nats-url", nats_url, "--redis-url", redis_url,
            "--settle-s", "0", "--stage-overhead-bytes", "0", stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        scheduler = OneScheduler(process)
        self.schedulers.append(scheduler)
        self._tasks.create_task(scheduler.follow())
        await scheduler.until_logged(is_told)
        return scheduler

    async def two_schedulers(self) -> tuple[OneScheduler, OneScheduler]:
        """The active one, with a ready pipeline, and the one that stands by."""
        active = await self.start_scheduler(b"scheduler active")
        standby = await self.start_scheduler(b"standing by")
        await self.until_state(lambda state: state.ready)
        return active, standby

    async def until_state(self, condition: Callable[[ClusterState], bool]) -> None:
        """Ask whoever is active."""
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(BusError):  # nobody is active now
                    state = await self.bus.ask(subjects.STATUS, AskState(), ClusterState, timeout_s=0.2)
                    if condition(state):
                        return
                await asyncio.sleep(0.01)

    async def submit(self) -> str:
        sequence = new_sequence_id()
        request = SubmitSequence(
            sequence=sequence,
            gateway="g1",
            request="r",
            model="demo",
            prompt=(1, 2, 3),
            options=SamplingOptions(max_tokens=50),
        )
        answer = await self.bus.ask(subjects.SUBMIT, request, Admitted, Refused, timeout_s=5)
        assert isinstance(answer, Admitted), answer
        await self.worker.until(lambda: any(start.sequence == sequence for start in self.worker.starts))
        return sequence

    async def until_tokens(self, sequence: str, num_tokens: int) -> None:
        async with asyncio.timeout(5):
            while await self.redis.strlen(f"molink:v1:tokens:{sequence}") != 4 * num_tokens:  # noqa: ASYNC110
                await asyncio.sleep(0.005)  # Redis tells nobody of a write

    async def until_gone(self, key: str) -> None:
        async with asyncio.timeout(5):
            while await self.redis.exists(key):  # noqa: ASYNC110  nor of an expiry
                await asyncio.sleep(0.01)

    async def term(self) -> str:
        value = await self.redis.get("molink:v1:term")
        assert isinstance(value, bytes)
        return value.decode()


@contextlib.asynccontextmanager
async def open_stand(folder: Path, redis_server: EmbeddedServer) -> AsyncIterator[Stand]:
    nats = start_nats(folder)
    try:
        async with (
            Redis.from_url(redis_server.url) as redis,
            open_bus(BusSettings(url=nats.url), name="w1") as bus,
            asyncio.TaskGroup() as tasks,
        ):
            await redis.flushdb()
            stand = Stand(bus, redis, (nats.url, redis_server.url), tasks)
            living = tasks.create_task(stand.worker.live())
            try:
                yield stand
            finally:
                for scheduler in stand.schedulers:
                    with contextlib.suppress(ProcessLookupError):
                        scheduler.process.kill()
                    await scheduler.process.wait()
                living.cancel()
    finally:
        nats.stop()


@pytest.fixture
async def stand(tmp_path: Path, redis_server: EmbeddedServer) -> AsyncIterator[Stand]:
    async with open_stand(tmp_path, redis_server) as opened:
        yield opened


async def test_a_killed_scheduler_is_replaced_in_two_seconds_and_sequences_go_on(stand: Stand) -> None:
    active, standby = await stand.two_schedulers()
    sequence = await stand.submit()
    await stand.worker.speak(sequence, 0)
    await stand.until_tokens(sequence, 1)
    active.process.kill()
    killed_s = time.perf_counter()
    await standby.until_logged(b"scheduler active")
    await stand.until_state(lambda state: state.ready and state.sequences == 1)
    assert time.perf_counter() - killed_s < LEASE_EXPIRY_S + 1.0, "a quiet machine takes 0.1 s beyond the lease"
    await stand.worker.speak(sequence, 1)
    await stand.until_tokens(sequence, 2)
    await stand.worker.speak(sequence, 2, FinishReason.STOP)
    await stand.until_gone(f"molink:v1:sequence:{sequence}")
    assert (await stand.term()).startswith("2 ")
    assert len(stand.worker.assignments) == 1, "the pipeline was not touched"
    assert len(stand.worker.starts) == 1


async def test_a_scheduler_that_is_stopped_hands_over_at_once(stand: Stand) -> None:
    active, standby = await stand.two_schedulers()
    sequence = await stand.submit()
    await stand.worker.speak(sequence, 0)
    await stand.until_tokens(sequence, 1)
    active.process.terminate()
    assert await asyncio.wait_for(active.process.wait(), 10) == 0
    ended_s = time.perf_counter()
    await standby.until_logged(b"scheduler active")
    assert time.perf_counter() - ended_s < 1.0, "well before the lease would have run out"
    await stand.worker.speak(sequence, 1, FinishReason.STOP)
    await stand.until_gone(f"molink:v1:sequence:{sequence}")


async def test_a_frozen_scheduler_that_was_replaced_wakes_and_does_nothing(stand: Stand) -> None:
    frozen, standby = await stand.two_schedulers()
    sequence = await stand.submit()
    old = await stand.term()
    frozen.process.send_signal(signal.SIGSTOP)
    await standby.until_logged(b"scheduler active")
    await stand.until_state(lambda state: state.ready and state.sequences == 1)
    assert (await stand.term()).startswith("2 ")
    # all of this waits in the frozen one's connection, and would be acted on
    later = await stand.submit()
    for index in range(10):
        await stand.worker.speak(sequence, index)
        await stand.worker.speak(later, index)
    await stand.until_tokens(later, 10)
    await stand.bus.send(subjects.CANCEL, CancelSequence(sequence=sequence, reason="the client went away"))
    await stand.worker.until(lambda: bool(stand.worker.stops))
    worker = stand.worker
    starts, stops, assignments = len(worker.starts), len(worker.stops), len(worker.assignments)
    async with watching(stand.redis) as scripts:
        frozen.process.send_signal(signal.SIGCONT)
        await frozen.until_logged(b"standing by")
        await stand.worker.speak(later, 10)
        await stand.until_tokens(later, 11)
    of_old = [commands for owner, commands in scripts if owner == old.split()[1]]
    # it may ask whether it is still the active one, or hear from the other one that it is not
    assert {command for commands in of_old for command in commands} <= {"GET"}, "it wrote nothing"
    assert len(stand.worker.starts) == starts, "and told the head nothing"
    assert len(stand.worker.stops) == stops
    assert len(stand.worker.assignments) == assignments
    # it serves again when it is needed
    standby.process.kill()
    await frozen.until_logged(b"scheduler active")
    await stand.until_state(lambda state: state.ready and state.sequences == 1)
    assert (await stand.term()).startswith("3 ")


async def test_a_scheduler_that_alone_is_cut_off_from_redis_stands_by_when_another_takes_over(
    stand: Stand, redis_server: EmbeddedServer
) -> None:
    async with open_link(redis_server.port) as link:
        alone = await stand.start_scheduler(b"scheduler active", redis_port=link.port)
        other = await stand.start_scheduler(b"standing by")
        await stand.until_state(lambda state: state.ready)
        link.close()
        await other.until_logged(b"scheduler active")
        await alone.until_logged(b"another scheduler has taken over")
        assignments = len(stand.worker.assignments)
        sequence = await stand.submit()
        await stand.worker.speak(sequence, 0, FinishReason.STOP)
        await stand.until_gone(f"molink:v1:sequence:{sequence}")
        assert len(stand.worker.assignments) == assignments
        assert [start.sequence for start in stand.worker.starts] == [sequence], "told once, by one of them"


@contextlib.asynccontextmanager
async def watching(redis: Redis) -> AsyncIterator[list[tuple[str, list[str]]]]:
    """Every script that schedulers run: whose it is, and the commands that it carried out."""
    scripts: list[tuple[str, list[str]]] = []
    heard = asyncio.Event()

    async def watch() -> None:
        async with redis.monitor() as monitor:
            heard.set()
            async for line in monitor.listen():
                words = line["command"].split()
                if line["client_type"] == "lua" and scripts:
                    scripts[-1][1].append(words[0].upper())
                elif words[0].upper() == "EVALSHA":
                    owner = re.search(r"\bscheduler-\S+", line["command"])
                    scripts.append((owner[0] if owner else "", []))

    watcher = asyncio.create_task(watch())
    await heard.wait()
    try:
        yield scripts
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher


async def test_a_frozen_scheduler_that_nobody_replaced_goes_on_in_its_term(stand: Stand) -> None:
    alone = await stand.start_scheduler(b"scheduler active")
    await stand.until_state(lambda state: state.ready)
    sequence = await stand.submit()
    term = await stand.term()
    alone.process.send_signal(signal.SIGSTOP)
    await stand.until_gone("molink:v1:lease")
    for index in range(10):
        await stand.worker.speak(sequence, index)
    alone.process.send_signal(signal.SIGCONT)
    await stand.until_tokens(sequence, 10)
    assert await stand.term() == term
    assert len(stand.worker.starts) == 1


async def test_a_redis_that_comes_back_empty_is_told_everything_by_the_active_one(tmp_path: Path) -> None:
    redis = start_redis(tmp_path)
    (tmp_path / "nats").mkdir()
    try:
        async with open_stand(tmp_path / "nats", redis) as stand:
            await stand.two_schedulers()
            sequence = await stand.submit()
            await stand.worker.speak(sequence, 0)
            await stand.until_tokens(sequence, 1)
            active = await stand.term()
            redis.process.kill()
            redis.process.wait()
            await stand.until_state(lambda state: not state.ready and "Redis" in state.reason)
            await stand.worker.speak(sequence, 1)
            redis = start_redis(tmp_path, redis.port)
            back_s = time.perf_counter()
            await stand.redis.connection_pool.disconnect()
            await stand.until_tokens(sequence, 2)
            assert time.perf_counter() - back_s < 1.0, "0.2 s at most between two tries"
            after = await stand.term()
            assert after.split()[1] == active.split()[1], "the standby has left it to the one who knows"
            assert int(after.split()[0]) > int(active.split()[0])
            await stand.until_state(lambda state: state.ready and state.sequences == 1)
            assert len(stand.worker.starts) == 1
    finally:
        redis.stop()
