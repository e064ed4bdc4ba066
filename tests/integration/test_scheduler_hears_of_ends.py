"""A worker's process is killed: the broker tells the scheduler, which asks whether anybody is left."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import pytest

from molink.embedded import EmbeddedServer, start_nats
from molink_common import messages, subjects
from molink_common.bus import BusSettings, open_bus, serve
from molink_common.messages import ClusterState
from molink_scheduler.settings import SchedulerSettings
from molink_scheduler.shell import serve_scheduler
from molink_scheduler.store import open_store
from tests.scheduler_builders import make_heartbeat

# A worker as far as its connections go: two of them, heartbeats, and somebody who listens to orders.
WORKER = """
import asyncio, sys
from molink_common import subjects
from molink_common.bus import BusSettings, open_bus

async def main(url, name, heartbeat):
    settings = BusSettings(url=url)
    async with open_bus(settings, name=name) as bus, open_bus(settings, name=name + "-bulk"):
        async def order(incoming):
            await incoming.respond(b"{}")
        await bus.subscribe(subjects.control(name), order)
        while True:
            await bus.publish(subjects.heartbeat(name), bytes.fromhex(heartbeat))
            await asyncio.sleep(0.5)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("kill_after_s", [0.0, 0.2])
async def test_a_killed_worker_is_known_long_before_its_heartbeat_is_missed(
    tmp_path: Path, redis_server: EmbeddedServer, kill_after_s: float
) -> None:
    nats = start_nats(tmp_path)
    stop, heard, states = asyncio.Event(), asyncio.Event(), list[ClusterState]()

    async def hear(state: ClusterState) -> None:
        states.append(state)
        heard.set()

    async def until_workers(*expected: str) -> None:
        async with asyncio.timeout(10):
            while not states or tuple(worker.worker for worker in states[-1].workers) != expected:
                heard.clear()
                await heard.wait()

    settings = SchedulerSettings(nats_url=nats.url, redis_url=redis_server.url)
    heartbeat = messages.encode(make_heartbeat("w9")).hex()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", WORKER, nats.url, "w9", heartbeat)
    try:
        async with (
            open_bus(BusSettings(url=nats.url), name="test") as bus,
            open_bus(settings.bus_settings(), name="scheduler") as schedulers_bus,
            open_store(settings.redis_url, key_root=f"test-{kill_after_s}:") as store,
            asyncio.TaskGroup() as tasks,
        ):
            await serve(bus, subjects.STATE, hear, ClusterState)
            tasks.create_task(serve_scheduler(settings, schedulers_bus, store, stop))
            await until_workers("w9")
            await asyncio.sleep(kill_after_s)  # at another moment between two heartbeats
            killed_s = time.perf_counter()
            process.kill()
            await until_workers()
            known_after_s = time.perf_counter() - killed_s
            assert known_after_s < 0.5, "a few milliseconds, on a quiet machine; a heartbeat is overdue after 0.8 s"
            stop.set()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        nats.stop()
