"""What survives on a worker when its pipeline is formed again: engines, blocks, sequences. With a real NATS."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from molink.embedded import EmbeddedServer, start_nats
from molink_common.bus import BusSettings, NatsBus, open_bus
from molink_common.errors import ModelError
from molink_common.messages import (
    AskSequences,
    AssignStage,
    Done,
    Failed,
    LayerRange,
    PreloadStages,
    ReleaseStage,
    SequencesHeld,
    StagePhase,
)
from molink_stage_worker.engine.interface import Engine, Progress, StageSpec
from tests.integration.counting_engine import BLOCK, LAYERS, CountingEngine, CountingModel, expected_text
from tests.integration.worker_pool import Pool, open_pool


@dataclass
class Loader:
    """Counts what is loaded; what is in `slow` takes until it is let go."""

    loaded: list[LayerRange] = field(default_factory=list)
    abandoned: list[LayerRange] = field(default_factory=list)
    slow: dict[LayerRange, threading.Event] = field(default_factory=dict)
    broken: set[LayerRange] = field(default_factory=set)

    def load(self, spec: StageSpec, progress: Progress) -> Engine:
        layers = (spec.first_layer, spec.last_layer)
        self.loaded.append(layers)
        if layers in self.broken:
            raise ModelError("the disk is broken")
        let_go = self.slow.get(layers)
        try:
            while let_go is not None and not let_go.wait(0.01):
                progress(0.5)
        except Exception:
            self.abandoned.append(layers)
            raise
        return CountingEngine(spec)


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
async def pool(
    bus: NatsBus, nats_server: EmbeddedServer, request: pytest.FixtureRequest, loader: Loader
) -> AsyncIterator[Pool]:
    pipeline = abs(hash(request.node.name)) % 1_000_000
    async with open_pool(bus, nats_server.url, pipeline, CountingModel(), loader.load, BLOCK) as opened:
        yield opened


def continued(pool: Pool, index: int, count: int, epoch: int, **changes: object) -> AssignStage:
    order = pool.assignment(index, count, epoch=epoch, num_blocks=400)
    return order.model_copy(update={"continues_epoch": epoch - 1, **changes})


def preload(pool: Pool, *layers: LayerRange) -> PreloadStages:
    stage = pool.assignment(0, 1)
    return PreloadStages(
        fingerprint=stage.fingerprint, layers=layers, dtype=stage.dtype, num_blocks=64, block_size=BLOCK
    )


def is_ready(pool: Pool, worker: str, epoch: int) -> bool:
    stage = pool.beats[worker].stage
    return stage is not None and stage.phase is StagePhase.READY and stage.epoch == epoch


async def until_preloaded(pool: Pool, worker: str, *layers: LayerRange) -> None:
    await pool.until(lambda: pool.beats[worker].preloaded == layers)


async def test_a_pipeline_that_is_formed_again_loads_nothing(pool: Pool, loader: Loader) -> None:
    async with pool.workers(2) as names:
        await pool.form(names)
        assert len(loader.loaded) == 2
        for epoch, blocks in ((2, 64), (3, 32)):  # also with another number of blocks
            left_over = await pool.start(names[0], [7, 7], 400, epoch=epoch - 1) if epoch == 2 else None
            await pool.form(names, epoch=epoch, num_blocks=blocks)
            held = await pool.to_head(names[0], AskSequences(pipeline=pool.pipeline))
            assert isinstance(held, SequencesHeld)
            assert left_over not in held.sequences
            sequence = await pool.start(names[0], [1, 2, epoch], 20, epoch=epoch)
            await pool.until(lambda sequence=sequence: sequence in pool.finishes)  # type: ignore[misc]
            assert pool.tokens[sequence] == expected_text([1, 2, epoch], 20)
            await pool.until_idle(names[0], blocks)
        assert await pool.order(names[0], ReleaseStage(pipeline=pool.pipeline)) == Done()
        await pool.until(lambda: pool.beats[names[0]].stage is None)
        await pool.form(names, epoch=4)
        assert len(loader.loaded) == 2


async def test_what_is_preloaded_is_taken_on_without_loading(pool: Pool, loader: Loader) -> None:
    async with pool.workers(1) as (name,):
        assert await pool.order(name, preload(pool, (0, 3), (3, 6), (0, LAYERS))) == Done()
        await until_preloaded(pool, name, (0, 3), (3, 6), (0, LAYERS))
        assert loader.loaded == [(0, 3), (3, 6), (0, 6)]
        await pool.form([name])
        await until_preloaded(pool, name, (0, 3), (3, 6))
        sequence = await pool.start(name, [1, 2], 9)
        await pool.until(lambda: sequence in pool.finishes)
        assert pool.tokens[sequence] == expected_text([1, 2], 9)
        assert await pool.order(name, ReleaseStage(pipeline=pool.pipeline)) == Done()
        await until_preloaded(pool, name, (0, 3), (3, 6), (0, LAYERS))
        assert await pool.order(name, preload(pool, (3, 6))) == Done()
        await until_preloaded(pool, name, (3, 6))
        assert len(loader.loaded) == 3


async def test_a_stage_of_its_own_comes_before_what_is_preloaded(pool: Pool, loader: Loader) -> None:
    loader.slow[0, 3] = threading.Event()
    async with pool.workers(1) as (name,):
        assert await pool.order(name, preload(pool, (0, 3), (3, 6))) == Done()
        await pool.until(lambda: loader.loaded == [(0, 3)])
        await pool.form([name])
        await pool.until(lambda: loader.abandoned == [(0, 3)])
        loader.slow[0, 3].set()
        await until_preloaded(pool, name, (0, 3), (3, 6))
        assert loader.loaded == [(0, 3), (0, 6), (0, 3), (3, 6)]


async def test_a_stage_waits_for_its_own_layers_that_are_being_preloaded(pool: Pool, loader: Loader) -> None:
    loader.slow[0, LAYERS] = threading.Event()
    async with pool.workers(1) as (name,):
        assert await pool.order(name, preload(pool, (0, LAYERS))) == Done()
        await pool.until(lambda: loader.loaded == [(0, LAYERS)])
        assert await pool.order(name, pool.assignment(0, 1)) == Done()
        await pool.until(lambda: (stage := pool.beats[name].stage) is not None and stage.phase is StagePhase.LOADING)
        loader.slow[0, LAYERS].set()
        await pool.until(lambda: is_ready(pool, name, 1))
        assert loader.loaded == [(0, LAYERS)]


async def test_what_cannot_be_preloaded_is_left_out_and_a_new_order_replaces_the_old(
    pool: Pool, loader: Loader
) -> None:
    loader.broken.add((0, 3))
    loader.slow[3, 6] = threading.Event()
    async with pool.workers(1) as (name,):
        assert isinstance(await pool.order(name, preload(pool, (5, LAYERS + 1))), Failed)
        assert await pool.order(name, preload(pool, (0, 3), (3, 6))) == Done()
        await pool.until(lambda: loader.loaded == [(0, 3), (3, 6)])
        assert await pool.order(name, preload(pool, (1, 2))) == Done()
        await until_preloaded(pool, name, (1, 2))
        assert loader.abandoned == [(3, 6)]
        assert loader.loaded == [(0, 3), (3, 6), (1, 2)]


async def test_sequences_go_on_in_a_new_epoch_with_what_the_stages_hold(pool: Pool, loader: Loader) -> None:
    async with pool.workers(3) as names:
        await pool.form(names, num_blocks=400)
        sequences = [await pool.start(names[0], [number, 5], 300) for number in range(1, 4)]
        for epoch in (2, 3, 4):
            counts = [len(pool.tokens.get(one, ())) for one in sequences]
            await pool.until(lambda: all(len(pool.tokens.get(one, ())) > 5 + 20 * epoch for one in sequences))  # noqa: B023  awaited here
            assert all(count < 300 for count in counts), "the epochs came too late to test anything"
            for index, name in enumerate(names):
                assert await pool.order(name, continued(pool, index, 3, epoch)) == Done()
            await pool.until(lambda: all(is_ready(pool, name, epoch) for name in names))  # noqa: B023  awaited here
        late = await pool.start(names[0], [9], 10, epoch=4)
        await pool.until(lambda: all(one in pool.finishes for one in (*sequences, late)), 20)
        for number, one in enumerate(sequences, start=1):
            assert pool.tokens[one] == expected_text([number, 5], 300)
        assert pool.tokens[late] == expected_text([9], 10)
        await pool.until_idle(names[0], 400)
        assert len(loader.loaded) == 3
        assert not pool.failed


async def test_a_replaced_stage_takes_part_where_the_others_go_on(pool: Pool, loader: Loader) -> None:
    async with pool.workers(4) as (*names, spare):
        await pool.form(names, num_blocks=400)
        assert await pool.order(spare, preload(pool, (2, 4))) == Done()
        await until_preloaded(pool, spare, (2, 4))
        sequences = [await pool.start(names[0], [number, 5], 120) for number in range(1, 4)]
        await pool.until(lambda: all(len(pool.tokens.get(one, ())) > 5 for one in sequences))
        lost, names[1] = names[1], spare
        for index, name in enumerate(names):
            order = continued(pool, index, 3, 2, rebuild=1)
            if index == 1:
                order = order.model_copy(update={"continues_epoch": None})
            assert await pool.order(name, order) == Done()
        await pool.until(lambda: all(is_ready(pool, name, 2) for name in names))
        await pool.until(lambda: all(one in pool.finishes for one in sequences), 20)
        for number, one in enumerate(sequences, start=1):
            assert pool.tokens[one] == expected_text([number, 5], 120)
        assert len(loader.loaded) == 4
        # the one that was lost still holds the stage of the old epoch, and says so
        assert is_ready(pool, lost, 1)
        assert await pool.order(lost, ReleaseStage(pipeline=pool.pipeline)) == Done()
        await pool.until(lambda: pool.beats[lost].stage is None)


async def test_what_cannot_be_continued_is_refused_and_goes_on_as_it_was(pool: Pool, loader: Loader) -> None:
    async with pool.workers(1) as (name,):
        answer = await pool.order(name, continued(pool, 0, 1, 2))
        assert isinstance(answer, Failed)
        assert "holds no stage" in answer.message
        await pool.form([name], num_blocks=400)
        sequence = await pool.start(name, [1, 5], 200)
        for epoch, changes in ((3, {}), (2, {"num_blocks": 401})):
            assert isinstance(await pool.order(name, continued(pool, 0, 1, epoch, **changes)), Failed)
        await pool.until(lambda: sequence in pool.finishes)
        assert pool.tokens[sequence] == expected_text([1, 5], 200)
        assert is_ready(pool, name, 1)

        loader.slow[0, 3] = threading.Event()
        assert await pool.order(name, pool.assignment(0, 2, epoch=2, num_blocks=400)) == Done()
        answer = await pool.order(name, continued(pool, 0, 2, 3))
        assert isinstance(answer, Failed)
        assert "is loading here" in answer.message
        loader.slow[0, 3].set()


async def test_a_leaving_worker_goes_on_with_its_stage_but_begins_nothing(pool: Pool) -> None:
    async with pool.workers(1) as (partner,), pool.worker(drain_timeout_s=5.0) as leaving:
        names = [partner, leaving._worker]
        await pool.form(names, num_blocks=400)
        leaving._leaving = True
        for index, name in enumerate(names):
            assert await pool.order(name, continued(pool, index, 2, 2)) == Done()
        await pool.until(lambda: all(is_ready(pool, name, 2) for name in names))
        assert isinstance(await pool.order(names[1], pool.assignment(0, 1, epoch=3)), Failed)
        assert isinstance(await pool.order(names[1], preload(pool, (0, 3))), Failed)


async def test_a_stage_that_goes_on_while_the_broker_is_away_is_ready_once_it_is_back(tmp_path: Path) -> None:
    server = start_nats(tmp_path)
    try:
        async with (
            open_bus(BusSettings(url=server.url), name="test") as bus,
            open_pool(bus, server.url, 11, CountingModel(), lambda spec, _: CountingEngine(spec), BLOCK) as pool,
            pool.worker() as worker,
        ):
            name = worker._worker
            await pool.form([name], num_blocks=400)
            sequence = await pool.start(name, [3, 5], 300)
            await pool.until(lambda: len(pool.tokens.get(sequence, ())) > 5)
            server.stop()
            assert worker._slot is not None
            assert worker._slot.continue_in(continued(pool, 0, 1, 2)) is None
            server = start_nats(tmp_path, server.port)
            await pool.until(lambda: is_ready(pool, name, 2))
            await pool.until(lambda: sequence in pool.finishes)
            assert pool.ended_at[sequence] == 299
    finally:
        server.stop()


async def test_heartbeats_come_twice_a_second_and_at_once_when_something_changes(pool: Pool) -> None:
    loop = asyncio.get_running_loop()
    async with pool.workers(1) as (name,):
        beats_at_s: list[float] = []
        while len(beats_at_s) < 4:
            del pool.beats[name]
            await pool.until(lambda: name in pool.beats)
            beats_at_s.append(loop.time())
        gaps_s = [after - before for before, after in pairwise(beats_at_s)]
        assert max(gaps_s) < 0.8
        began_s = loop.time()
        await pool.form([name])
        assert loop.time() - began_s < 0.4
