"""A tiny random llama, cut by layers over workers that talk through a real NATS, gives the whole model's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from molink.embedded import EmbeddedServer
from molink_common.bus import NatsBus
from molink_common.messages import Done, ModelCard
from molink_stage_worker.batch_plan import BatchPlan
from molink_stage_worker.engine.interface import Engine, Progress, StageSpec
from molink_stage_worker.engine.loading import load_engine
from molink_stage_worker.planning.planner import Planner
from molink_stage_worker.stage_loading import Told
from tests.architectures.tiny_models import NUM_LAYERS, VOCABULARY_SIZE, make_tiny_model
from tests.integration.worker_pool import open_pool

BLOCK = 4
NEW_TOKENS = 12


@dataclass
class TinyModel:
    folder: Path
    card: ModelCard

    def checkpoint_for(self, _first: int, _last: int, _progress: Told) -> Path:
        return self.folder

    def read_file(self, name: str, _offset: int, _size: int) -> bytes:
        raise NotImplementedError(name)


def card_of(config: Any) -> ModelCard:
    return ModelCard(
        name="tiny",
        fingerprint="e" * 16,
        family=config.model_type,
        packed=True,
        num_layers=NUM_LAYERS,
        hidden_size=config.hidden_size,
        vocabulary_size=VOCABULARY_SIZE,
        context_length=64,
        checkpoint_dtype="float32",
        layer_parameters=(1,) * NUM_LAYERS,
        embedding_parameters=1,
        output_parameters=1,
        kv_scalars_per_token=(1,) * NUM_LAYERS,
    )


def whole(model: Any, prompt: list[int]) -> list[int]:
    output = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


@pytest.fixture
def everything_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = BatchPlan(micro_batches=2, chunk_tokens=16, chunks_under_way=1, separate_prefill=False, draft_price=0.0)
    monkeypatch.setattr(Planner, "plan", lambda *_: plan)


@pytest.mark.usefixtures("everything_is_guessed")
@pytest.mark.parametrize("num_stages", [1, 2, 3])
async def test_guesses_change_no_text(
    bus: NatsBus, nats_server: EmbeddedServer, tmp_path: Path, num_stages: int
) -> None:
    torch.set_num_threads(1)
    reference = make_tiny_model("llama", tmp_path)
    model = TinyModel(tmp_path, card_of(reference.config))
    prompts = [[5, 9, 17 + number, 40] * (2 + number) for number in range(5)]
    async with (
        open_pool(bus, nats_server.url, 9_000_020 + num_stages, model, load_engine, BLOCK) as pool,
        pool.workers(num_stages) as names,
    ):
        await pool.form(names, num_blocks=32)
        sequences = [await pool.start(names[0], prompt, NEW_TOKENS) for prompt in prompts]
        await pool.until(lambda: all(sequence in pool.finishes for sequence in sequences), 30)
        assert [pool.tokens[one] for one in sequences] == [whole(reference, prompt) for prompt in prompts]
        report = await pool.until_idle(names[0], 32)
        assert report.drafted_tokens > report.accepted_tokens >= 0


@pytest.mark.parametrize(("family", "num_stages"), [("llama", 1), ("llama", 2), ("llama", 3), ("bloom", 2)])
async def test_a_cut_model_says_what_the_whole_one_says(
    bus: NatsBus, nats_server: EmbeddedServer, tmp_path: Path, family: str, num_stages: int
) -> None:
    torch.set_num_threads(1)
    reference = make_tiny_model(family, tmp_path)
    model = TinyModel(tmp_path, card_of(reference.config))
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, VOCABULARY_SIZE, (3 + 7 * n,), generator=generator).tolist() for n in range(6)]
    pipeline = 9_000_000 + num_stages
    async with (
        open_pool(bus, nats_server.url, pipeline, model, load_engine, BLOCK) as pool,
        pool.workers(num_stages) as names,
    ):
        await pool.form(names, num_blocks=32)  # too few for all at once: some are preempted or have to wait
        sequences = [await pool.start(names[0], prompt, NEW_TOKENS) for prompt in prompts]
        await pool.until(lambda: all(sequence in pool.finishes for sequence in sequences), 30)
        assert [pool.tokens[one] for one in sequences] == [whole(reference, prompt) for prompt in prompts]
        await pool.until_idle(names[0], 32)


@pytest.mark.parametrize("family", ["llama", "bloom"])
async def test_engines_that_go_on_or_are_taken_up_again_say_the_same(
    bus: NatsBus, nats_server: EmbeddedServer, tmp_path: Path, family: str
) -> None:
    torch.set_num_threads(1)
    reference = make_tiny_model(family, tmp_path)
    model = TinyModel(tmp_path, card_of(reference.config))
    prompts = [[5, 9, 17 + number, 40] for number in range(3)]
    wanted = [whole(reference, prompt) for prompt in prompts]
    loads: list[StageSpec] = []

    def load(spec: StageSpec, progress: Progress) -> Engine:
        loads.append(spec)
        return load_engine(spec, progress)

    async with open_pool(bus, nats_server.url, 9_000_010, model, load, BLOCK) as pool, pool.workers(2) as names:
        await pool.form(names, num_blocks=64)
        sequences = [await pool.start(names[0], prompt, NEW_TOKENS) for prompt in prompts]
        await pool.until(lambda: all(pool.tokens.get(one) for one in sequences))
        for index, name in enumerate(names):
            order = pool.assignment(index, 2, epoch=2, num_blocks=64)
            assert await pool.order(name, order.model_copy(update={"continues_epoch": 1})) == Done()
        await pool.until(lambda: all(one in pool.finishes for one in sequences), 30)
        assert [pool.tokens[one] for one in sequences] == wanted

        await pool.form(names, epoch=3, num_blocks=32)
        sequences = [await pool.start(names[0], prompt, NEW_TOKENS, epoch=3) for prompt in prompts]
        await pool.until(lambda: all(one in pool.finishes for one in sequences), 30)
        assert [pool.tokens[one] for one in sequences] == wanted
        await pool.until_idle(names[0], 32)
    assert len(loads) == 2
