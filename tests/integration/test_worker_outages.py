"""The broker goes away and comes back: sequences that run through it go on where they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from molink.embedded import EmbeddedServer, start_nats
from molink_common.bus import BusSettings, NatsBus, open_bus
from molink_common.wire import Traffic
from tests.integration.counting_engine import BLOCK, CountingEngine, CountingModel, expected_text
from tests.integration.worker_pool import open_pool


@pytest.mark.parametrize("num_stages", [1, 2])
async def test_sequences_go_on_after_the_broker_was_restarted(tmp_path: Path, num_stages: int) -> None:
    server = start_nats(tmp_path)
    try:
        async with (
            open_bus(BusSettings(url=server.url), name="test") as bus,
            open_pool(bus, server.url, 7, CountingModel(), lambda spec, _: CountingEngine(spec), BLOCK) as pool,
            pool.workers(num_stages) as names,
        ):
            await pool.form(names, num_blocks=400)
            sequences = [await pool.start(names[0], [number, 5], 600) for number in range(1, 4)]
            await pool.until(lambda: all(len(pool.tokens.get(one, ())) > 5 for one in sequences))
            server.stop()
            counts = [len(pool.tokens[one]) for one in sequences]
            assert all(count < 600 for count in counts), "the outage came too late to test anything"
            server = start_nats(tmp_path, server.port)
            await pool.until(lambda: all(len(pool.tokens[one]) == 600 for one in sequences), 30)
            for number, one in enumerate(sequences, start=1):
                assert pool.tokens[one] == expected_text([number, 5], 600)
            await pool.until_idle(names[0], 400)
            assert not pool.failed
    finally:
        server.stop()


async def test_a_stage_that_was_cut_off_alone_tells_the_head(bus: NatsBus, nats_server: EmbeddedServer) -> None:
    async with (
        open_pool(bus, nats_server.url, 8, CountingModel(), lambda spec, _: CountingEngine(spec), BLOCK) as pool,
        pool.worker() as head,
        pool.worker() as tail,
    ):
        names = [head._worker, tail._worker]
        await pool.form(names, num_blocks=400)
        one = await pool.start(names[0], [1, 5], 300)
        await pool.until(lambda: len(pool.tokens.get(one, ())) > 5)
        assert tail._slot is not None
        assert tail._slot.runner is not None
        tail._slot.runner._fence._last_steps[Traffic.DECODE] = 10**9  # it is deaf: every frame counts as seen
        await pool.until(lambda: (stage := pool.beats[names[1]].stage) is not None and stage.frames_dropped > 0)
        tail._slot.runner._fence._last_steps[Traffic.DECODE] = 0
        tail.on_reconnect()
        await pool.until(lambda: one in pool.finishes)
        assert pool.tokens[one] == expected_text([1, 5], 300)
