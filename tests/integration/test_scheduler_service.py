"""The scheduler with real NATS and Redis; the workers here speak the real messages and compute nothing."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from molink.embedded import EmbeddedServer, free_port, start_nats, start_redis
from molink_common import subjects
from molink_common.bus import BusSettings, open_bus, serve
from molink_common.messages import (
    Admitted,
    AskState,
    CancelSequence,
    ClusterState,
    FinishReason,
    GatewayAlive,
    JoinPool,
    RefusalCode,
    Refused,
    Welcome,
)
from molink_scheduler.settings import SchedulerSettings
from tests.integration.scheduler_stand import Stand


@pytest.fixture
async def stand(tmp_path_factory: pytest.TempPathFactory, redis_server: EmbeddedServer) -> AsyncIterator[Stand]:
    nats = start_nats(tmp_path_factory.mktemp("nats-scheduler"), free_port())
    redis = Redis.from_url(redis_server.url)
    await redis.flushdb()
    settings = SchedulerSettings(
        nats_url=nats.url, redis_url=redis_server.url, stages=2, settle_s=0.2, stage_overhead_bytes=0
    )
    try:
        async with open_bus(BusSettings(url=nats.url), name="test") as bus, asyncio.TaskGroup() as tasks:
            stand = Stand(bus, redis, settings, tasks)
            subscription = await serve(bus, subjects.STATE, stand.hear_state, ClusterState)

            async def alive() -> None:
                while True:
                    await bus.send(subjects.gateway_alive("g1"), GatewayAlive(gateway="g1"))
                    await asyncio.sleep(2)

            beating = tasks.create_task(alive())
            yield stand
            beating.cancel()
            await subscription.close()
            for task in tasks._tasks:
                task.cancel()
    finally:
        await redis.aclose()
        nats.stop()


async def test_ready_submit_tokens_finish_and_nothing_stays_in_redis(stand: Stand) -> None:
    head, tail = stand.start_worker("w1"), stand.start_worker("w2")
    stand.start_scheduler()
    state = await stand.until_state(lambda state: state.ready)
    assert state.pipelines[0].stages == ("w1", "w2")
    assert [(a.first_layer, a.last_layer) for a in (head.assignments[-1], tail.assignments[-1])] == [(0, 2), (2, 4)]
    assert await stand.bus.ask(subjects.JOIN, JoinPool(worker="w3"), Welcome, timeout_s=2) == Welcome(model="demo")
    sequence, answer = await stand.submit()
    assert answer == Admitted(sequence=sequence)
    await head.until(lambda: sequence in head.started)
    await tail.speak(sequence, 0, 11)
    await tail.speak(sequence, 1, 12)
    await stand.until_tokens(sequence, 8)
    await tail.speak(sequence, 2, 13, FinishReason.STOP)
    await stand.until_no_sequence_keys()
    asked = await stand.bus.ask(subjects.STATUS, AskState(), ClusterState, timeout_s=2)
    assert (asked.ready, asked.sequences) == (True, 0)
    head.is_alive = tail.is_alive = False


async def test_refusals_and_cancel(stand: Stand) -> None:
    stand.start_scheduler()
    await stand.until_state(lambda state: not state.ready)
    _, refused = await stand.submit()
    assert isinstance(refused, Refused) and refused.code is RefusalCode.NO_PIPELINE
    assert refused.retry_after_s is not None
    head, tail = stand.start_worker("w1"), stand.start_worker("w2")
    await stand.until_state(lambda state: state.ready)
    _, refused = await stand.submit(model="gpt-9")
    assert isinstance(refused, Refused) and refused.code is RefusalCode.UNKNOWN_MODEL
    _, refused = await stand.submit(max_tokens=600)
    assert isinstance(refused, Refused) and refused.code is RefusalCode.TOO_LONG
    sequence, answer = await stand.submit()
    assert isinstance(answer, Admitted)
    await head.until(lambda: sequence in head.started)
    await stand.bus.send(subjects.CANCEL, CancelSequence(sequence=sequence, reason="the client went away"))
    await head.until(lambda: sequence not in head.started)
    await stand.until_no_sequence_keys()
    head.is_alive = tail.is_alive = False


async def test_a_dead_head_is_replaced_and_the_sequence_starts_again_with_its_tokens(stand: Stand) -> None:
    head, tail = stand.start_worker("w1"), stand.start_worker("w2")
    stand.start_scheduler()
    await stand.until_state(lambda state: state.ready)
    third = stand.start_worker("w3")
    await stand.until_state(lambda state: any("to take over at once" in worker.reason for worker in state.workers))
    assert third.preloaded == ((0, 2), (2, 4))
    sequence, _ = await stand.submit()
    await head.until(lambda: sequence in head.started)
    await tail.speak(sequence, 0, 11)
    await stand.until_tokens(sequence, 4)
    head.is_alive = False
    state = await stand.until_state(lambda state: state.ready and "w1" not in state.pipelines[0].stages)
    assert state.pipelines[0].stages == ("w3", "w2")
    assert state.pipelines[0].epoch == 2
    await third.until(lambda: sequence in third.started)
    assert third.started[sequence].generated == (11,)
    await tail.speak(sequence, 1, 12, FinishReason.LENGTH)
    await stand.until_no_sequence_keys()
    tail.is_alive = third.is_alive = False


async def test_a_dead_tail_is_replaced_and_the_head_goes_on(stand: Stand) -> None:
    head, tail = stand.start_worker("w1"), stand.start_worker("w2")
    stand.start_scheduler()
    await stand.until_state(lambda state: state.ready)
    third = stand.start_worker("w3")
    await stand.until_state(lambda state: any(worker.role == "standby" for worker in state.workers))
    sequence, _ = await stand.submit()
    await head.until(lambda: sequence in head.started)
    await tail.speak(sequence, 0, 11)
    await stand.until_tokens(sequence, 4)
    tail.is_alive = False
    state = await stand.until_state(lambda state: state.ready and "w2" not in state.pipelines[0].stages)
    assert state.pipelines[0].stages == ("w1", "w3")
    assert [(a.continues_epoch, a.rebuild) for a in (head.assignments[-1], third.assignments[-1])] == [
        (1, 1),
        (None, 1),
    ]
    await third.speak(sequence, 1, 12)
    await stand.until_tokens(sequence, 8)
    assert len(head.starts) == 1
    await third.speak(sequence, 2, 13, FinishReason.LENGTH)
    await stand.until_no_sequence_keys()
    head.is_alive = third.is_alive = False


async def test_a_restarted_scheduler_keeps_pipeline_sequences_and_tokens(stand: Stand) -> None:
    head, tail = stand.start_worker("w1"), stand.start_worker("w2")
    _, task = stand.start_scheduler()
    await stand.until_state(lambda state: state.ready)
    sequence, _ = await stand.submit()
    ended, _ = await stand.submit()
    await head.until(lambda: {sequence, ended} <= head.started.keys())
    await tail.speak(sequence, 0, 11)
    await stand.until_tokens(sequence, 4)
    task.cancel()
    await asyncio.wait([task])
    await tail.speak(ended, 0, 5, FinishReason.STOP)  # the scheduler does not hear it
    del head.started[ended]
    stop, task = stand.start_scheduler()
    state = await stand.until_state(lambda state: state.ready)
    assert state.pipelines[0].epoch == 1
    await stand.until_state(lambda state: state.sequences == 1)
    assert len(head.assignments) == 1
    assert len(head.starts) == 2
    await tail.speak(sequence, 1, 12)
    await stand.until_tokens(sequence, 8)
    # and once more, in good order
    stop.set()
    await asyncio.wait_for(task, 5)
    stop, task = stand.start_scheduler()
    await stand.until_state(lambda state: state.ready and state.sequences == 1)
    await tail.speak(sequence, 2, 13, FinishReason.STOP)
    await stand.until_no_sequence_keys()
    head.is_alive = tail.is_alive = False


async def test_a_second_scheduler_stands_by_and_takes_over(stand: Stand) -> None:
    head, tail = stand.start_worker("w1"), stand.start_worker("w2")
    first_stop, first = stand.start_scheduler()
    await stand.until_state(lambda state: state.ready)
    stand.start_scheduler()
    sequence, answer = await stand.submit()
    assert isinstance(answer, Admitted)
    await head.until(lambda: sequence in head.started)
    first_stop.set()
    await asyncio.wait_for(first, 5)
    await stand.until_state(lambda state: state.ready and state.sequences == 1)
    await tail.speak(sequence, 0, 1, FinishReason.STOP)
    await stand.until_no_sequence_keys()
    # started once more at most, if the first had no time to hear the head's answer: to the head that is harmless
    assert {(start.sequence, start.epoch) for start in head.starts} == {(sequence, head.starts[0].epoch)}
    head.is_alive = tail.is_alive = False


async def test_redis_may_fail_and_come_back_empty(stand: Stand, tmp_path: Path) -> None:
    redis = start_redis(tmp_path)
    try:
        stand.settings = stand.settings.model_copy(update={"redis_url": redis.url})
        head, tail = stand.start_worker("w1"), stand.start_worker("w2")
        stand.start_scheduler()
        await stand.until_state(lambda state: state.ready)
        sequence, _ = await stand.submit()
        await head.until(lambda: sequence in head.started)
        await tail.speak(sequence, 0, 11)
        redis.stop()
        await stand.until_state(lambda state: not state.ready and "Redis" in state.reason)
        _, refused = await stand.submit()
        assert isinstance(refused, Refused) and refused.code is RefusalCode.NO_PIPELINE
        await tail.speak(sequence, 1, 12)
        redis = start_redis(tmp_path, redis.port)
        await stand.until_state(lambda state: state.ready and state.sequences == 1)
        async with Redis.from_url(redis.url) as stand.redis:
            await stand.until_tokens(sequence, 8)
            assert len(head.starts) == 1
            await tail.speak(sequence, 2, 13, FinishReason.STOP)
            await stand.until_no_sequence_keys()
        _, answer = await stand.submit()
        assert isinstance(answer, Admitted)
        head.is_alive = tail.is_alive = False
    finally:
        redis.stop()


async def test_the_service_starts_and_stops_as_a_process(stand: Stand) -> None:
    flags = ["--nats-url", stand.settings.nats_url, "--redis-url", stand.settings.redis_url]
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "molink_scheduler", *flags)
    await stand.until_state(lambda state: state.reason == "no worker is there")
    process.terminate()
    assert await asyncio.wait_for(process.wait(), 10) == 0
    assert await stand.redis.exists("molink:v1:lease") == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stages", "none"], b"--stages / MOLINK_STAGES"),
        (["--redis-url", "nonsense"], b"--redis-url"),
        (["--redis-url", "redis://127.0.0.1:9/0", "--redis-connect-timeout-s", "0.3"], b"--redis-url"),
        (["--max-sequence", "3"], b"--max-sequences"),
    ],
)
async def test_wrong_settings_end_with_a_sentence(stand: Stand, flags: list[str], words: bytes) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "molink_scheduler", "--nats-url", stand.settings.nats_url, *flags, stderr=subprocess.PIPE
    )
    _, complaint = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode in (1, 2)
    assert words in complaint and b"Traceback" not in complaint
