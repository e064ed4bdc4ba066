"""A worker whose process is stopped and wakes up again, with a broker that has gone on or was restarted meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from pathlib import Path

from molink.embedded import EmbeddedServer, start_nats
from molink_common import messages, subjects
from molink_common.bus import BusSettings, Incoming, NatsBus, open_bus
from molink_common.messages import Done, ReleaseStage, StagePhase, StepTokens
from tests.integration.counting_engine import BLOCK, CountingEngine, CountingModel, expected_text
from tests.integration.worker_pool import Pool, open_pool

FROZEN_S = 6.0
"""Longer than a client waits for the answers to its pings."""


@contextlib.asynccontextmanager
async def process(pool: Pool, name: str) -> AsyncIterator[Process]:
    flags = ["--nats-url", pool.url, "--worker-id", name, "--device", "cpu", "--memory", "1GiB"]
    made = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.integration.counting_worker", *flags, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        await pool.until(lambda: name in pool.beats and pool.beats[name].card is not None, 60)
        yield made
    finally:
        made.kill()
        await made.wait()


def is_ready(pool: Pool, worker: str, epoch: int) -> bool:
    stage = pool.beats[worker].stage if worker in pool.beats else None
    return stage is not None and stage.phase is StagePhase.READY and stage.epoch == epoch


async def test_a_worker_that_wakes_up_comes_back_by_itself_and_lets_go_of_its_old_epoch(
    bus: NatsBus, nats_server: EmbeddedServer
) -> None:
    async with (
        open_pool(bus, nats_server.url, 21, CountingModel(), lambda spec, _: CountingEngine(spec), BLOCK) as pool,
        pool.worker() as head,
        pool.worker() as spare,
        process(pool, "frozen") as frozen,
    ):
        names = [head._worker, "frozen"]
        await pool.form(names, num_blocks=400)
        sequence = await pool.start(names[0], [1, 5], 400)
        await pool.until(lambda: len(pool.tokens.get(sequence, ())) > 5)
        frozen.send_signal(signal.SIGSTOP)
        woken_at_s = asyncio.get_running_loop().time() + FROZEN_S
        assert len(pool.tokens[sequence]) < 400, "it was stopped too late to test anything"

        names[1] = spare._worker
        tail, front = (pool.assignment(index, 2, epoch=2, num_blocks=400) for index in (1, 0))
        assert await pool.order(names[1], tail.model_copy(update={"rebuild": 1})) == Done()
        await pool.until(lambda: is_ready(pool, names[1], 2))
        going_on = front.model_copy(update={"continues_epoch": 1, "rebuild": 1})
        assert await pool.order(names[0], going_on) == Done()
        await pool.until(lambda: sequence in pool.finishes)
        assert pool.tokens[sequence] == expected_text([1, 5], 400)

        del pool.beats["frozen"]
        await asyncio.sleep(woken_at_s - asyncio.get_running_loop().time())  # that long it is stopped
        assert "frozen" not in pool.beats
        frozen.send_signal(signal.SIGCONT)
        await pool.until(lambda: is_ready(pool, "frozen", 1), 5)
        assert await pool.order("frozen", ReleaseStage(pipeline=pool.pipeline)) == Done()
        await pool.until(lambda: pool.beats["frozen"].stage is None)

        names[1] = "frozen"  # and it is as good as any other
        await pool.form(names, epoch=3, num_blocks=400)
        again = await pool.start(names[0], [3, 5], 50, epoch=3)
        await pool.until(lambda: again in pool.finishes)
        assert pool.tokens[again] == expected_text([3, 5], 50)


async def test_a_worker_whose_broker_was_restarted_while_it_was_stopped_connects_again(tmp_path: Path) -> None:
    server = start_nats(tmp_path)
    try:
        async with (
            open_bus(BusSettings(url=server.url), name="test") as bus,
            open_pool(bus, server.url, 22, CountingModel(), lambda spec, _: CountingEngine(spec), BLOCK) as pool,
            process(pool, "frozen") as frozen,
        ):
            await pool.form(["frozen"], num_blocks=400)
            sequence = await pool.start("frozen", [1, 5], 400)
            await pool.until(lambda: len(pool.tokens.get(sequence, ())) > 5)
            frozen.send_signal(signal.SIGSTOP)
            server.stop()
            server = start_nats(tmp_path, server.port)
            await pool.until(lambda: bus.is_connected)
            del pool.beats["frozen"]
            frozen.send_signal(signal.SIGCONT)
            await pool.until(lambda: is_ready(pool, "frozen", 1), 5)
            held = await pool.start("frozen", [2, 5], 20)
            await pool.until(lambda: held in pool.finishes)
            assert pool.tokens[held] == expected_text([2, 5], 20)

            busy = await pool.start("frozen", [3, 5], 1500)
            await pool.until(lambda: len(pool.tokens.get(busy, ())) > 5)
            frozen.send_signal(signal.SIGSTOP)
            frozen.send_signal(signal.SIGCONT)
            assert await pool.order("frozen", pool.assignment(0, 1, epoch=2, num_blocks=400)) == Done()
            await pool.until(lambda: is_ready(pool, "frozen", 2))
            late: list[StepTokens] = []

            async def listen(incoming: Incoming) -> None:
                late.append(messages.decode(incoming.data, StepTokens))

            listening = await bus.subscribe(subjects.tokens(pool.pipeline), listen)
            await bus.flush()
            late.clear()
            newer = await pool.start("frozen", [4, 5], 50, epoch=2)
            await pool.until(lambda: newer in pool.finishes)
            assert pool.tokens[newer] == expected_text([4, 5], 50)
            assert {step.epoch for step in late} == {2}
            assert busy not in pool.finishes
            await listening.close()
    finally:
        server.stop()
