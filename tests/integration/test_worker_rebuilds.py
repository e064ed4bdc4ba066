"""A stage is lost while streams run: its successor gets its KV blocks back from the neighbour, others compute nothing.

With a real NATS. The test plays the scheduler, which is told of the loss at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
import torch

from molink.embedded import EmbeddedServer
from molink_common.bus import NatsBus
from molink_common.messages import Done, HeadReport, StagePhase
from molink_stage_worker import kept_stage
from molink_stage_worker.engine.interface import Engine, StageSpec
from molink_stage_worker.engine.loading import load_engine
from molink_stage_worker.journal import Journal
from tests.architectures.tiny_models import VOCABULARY_SIZE, make_tiny_model
from tests.integration.counting_engine import BLOCK, CountingEngine, CountingModel, expected_text
from tests.integration.test_worker_real_engine import TinyModel, card_of
from tests.integration.worker_pool import Load, Pool, open_pool

NUM_STAGES = 3
NUM_BLOCKS = 128


class Scene:
    """Three stages and a spare worker; stages can be killed."""

    def __init__(self, pool: Pool, names: list[str], spare: str, kill: Callable[[str], asyncio.Future[None]]) -> None:
        self.pool = pool
        self.names = names
        self._spare = spare
        self._kill = kill

    async def replace(self, index: int) -> None:
        """Kill a stage's worker, then let the spare one take its place in the next epoch."""
        lost, self.names[index] = self.names[index], self._spare
        await self._kill(lost)
        for at, name in enumerate(self.names):
            order = self.pool.assignment(at, NUM_STAGES, epoch=2, num_blocks=NUM_BLOCKS)
            order = order.model_copy(update={"rebuild": index, "continues_epoch": None if at == index else 1})
            assert await self.pool.order(name, order) == Done()

        def are_ready() -> bool:
            stages = [self.pool.beats[name].stage for name in self.names]
            return all(one is not None and one.phase is StagePhase.READY and one.epoch == 2 for one in stages)

        await self.pool.until(are_ready)

    async def until_tokens(self, sequences: Sequence[str], count: int) -> None:
        await self.pool.until(lambda: all(len(self.pool.tokens.get(one, ())) > count for one in sequences))
        assert not any(one in self.pool.finishes for one in sequences), "too late to interrupt anything"

    async def finish(self, sequences: Sequence[str]) -> HeadReport:
        await self.pool.until(lambda: all(one in self.pool.finishes for one in sequences), 20)
        return await self.pool.until_idle(self.names[0], NUM_BLOCKS)


@contextlib.asynccontextmanager
async def open_scene(pool: Pool) -> AsyncIterator[Scene]:
    async with contextlib.AsyncExitStack() as stack:
        stacks: dict[str, contextlib.AsyncExitStack] = {}
        for _ in range(NUM_STAGES + 1):
            own = await stack.enter_async_context(contextlib.AsyncExitStack())
            stacks[(await own.enter_async_context(pool.worker()))._worker] = own
        *names, spare = stacks
        await pool.form(names, num_blocks=NUM_BLOCKS)
        yield Scene(pool, names, spare, lambda name: asyncio.ensure_future(stacks[name].aclose()))


@pytest.fixture
async def pool(bus: NatsBus, nats_server: EmbeddedServer, request: pytest.FixtureRequest) -> AsyncIterator[Pool]:
    pipeline = abs(hash(request.node.name)) % 1_000_000
    model = CountingModel()
    async with open_pool(bus, nats_server.url, pipeline, model, lambda spec, _: CountingEngine(spec), BLOCK) as opened:
        yield opened


def engine_of(pool: Pool, worker: str) -> CountingEngine:
    engine = pool.engines[worker]
    assert isinstance(engine, CountingEngine)
    return engine


def computed(pool: Pool, worker: str) -> int:
    return engine_of(pool, worker).computed.total()


PROMPTS = [[number + 1] * (2 + 9 * number) for number in range(3)]
COUNT = 100


@pytest.mark.parametrize("index", [1, 2])
async def test_only_the_lost_stage_computes_again(pool: Pool, index: int) -> None:
    async with open_scene(pool) as scene:
        sequences = [await pool.start(scene.names[0], prompt, COUNT) for prompt in PROMPTS]
        await scene.until_tokens(sequences, 5)
        await scene.replace(index)
        report = await scene.finish(sequences)
        for sequence, prompt in zip(sequences, PROMPTS, strict=True):
            assert pool.tokens[sequence] == expected_text(prompt, COUNT)
        assert (report.rebuilt, report.recomputed) == (len(PROMPTS), 0)
        once = sum(len(prompt) + COUNT - 1 for prompt in PROMPTS)
        # steps that were under way are computed again: one token a sequence, or a chunk at the worst
        assert once <= computed(pool, scene.names[0]) <= once + 2 * len(PROMPTS)
        assert once <= computed(pool, scene.names[index]) <= once + 2 * len(PROMPTS)
        assert not any(engine_of(pool, name).known for name in scene.names)


async def test_what_no_journal_holds_is_computed_anew(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_stage, "Journal", lambda *_: Journal(0, BLOCK))
    async with open_scene(pool) as scene:
        sequences = [await pool.start(scene.names[0], prompt, COUNT) for prompt in PROMPTS]
        await scene.until_tokens(sequences, 5)
        await scene.replace(1)
        report = await scene.finish(sequences)
        for sequence, prompt in zip(sequences, PROMPTS, strict=True):
            assert pool.tokens[sequence] == expected_text(prompt, COUNT)
        assert (report.rebuilt, report.recomputed) == (0, len(PROMPTS))


async def test_where_engines_can_only_go_on_all_is_computed_anew(bus: NatsBus, nats_server: EmbeddedServer) -> None:
    def load(spec: StageSpec, _: object) -> Engine:
        return CountingEngine(spec, can_rewind=False)

    async with open_pool(bus, nats_server.url, 77, CountingModel(), load, BLOCK) as pool, open_scene(pool) as scene:
        sequences = [await pool.start(scene.names[0], prompt, COUNT) for prompt in PROMPTS]
        await scene.until_tokens(sequences, 5)
        await scene.replace(2)
        report = await scene.finish(sequences)
        for sequence, prompt in zip(sequences, PROMPTS, strict=True):
            assert pool.tokens[sequence] == expected_text(prompt, COUNT)
        assert (report.rebuilt, report.recomputed) == (0, 0)


@pytest.mark.parametrize(("family", "rebuilt"), [("llama", True), ("bloom", False)])
async def test_a_real_model_says_the_same_after_a_loss(
    bus: NatsBus, nats_server: EmbeddedServer, tmp_path: Path, family: str, rebuilt: bool
) -> None:
    torch.set_num_threads(1)
    reference = make_tiny_model(family, tmp_path)
    model = TinyModel(tmp_path, card_of(reference.config))
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, VOCABULARY_SIZE, (3 + 5 * n,), generator=generator).tolist() for n in range(3)]
    count = 45
    load: Load = load_engine
    async with open_pool(bus, nats_server.url, 78, model, load, BLOCK) as pool, open_scene(pool) as scene:
        sequences = [await pool.start(scene.names[0], prompt, count) for prompt in prompts]
        await scene.until_tokens(sequences, 3)
        await scene.replace(1)
        report = await scene.finish(sequences)
        for sequence, prompt in zip(sequences, prompts, strict=True):
            whole = reference.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
            assert pool.tokens[sequence] == whole[0, len(prompt) :].tolist()
        assert report.rebuilt == (len(prompts) if rebuilt else 0)
