"""Prompts that begin with the KV blocks of others, on three stages of a real engine: the text is the whole model's.

With a real NATS. The test plays the scheduler.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from molink.embedded import EmbeddedServer
from molink_common.bus import NatsBus
from molink_stage_worker.engine.loading import load_engine
from tests.architectures.tiny_models import VOCABULARY_SIZE, make_tiny_model
from tests.integration.counting_engine import BLOCK
from tests.integration.test_worker_real_engine import TinyModel, card_of
from tests.integration.test_worker_rebuilds import Scene, open_scene
from tests.integration.worker_pool import Load, open_pool


class Stage:
    """A pipeline of a tiny model, and the whole model beside it."""

    def __init__(self, scene: Scene, reference: torch.nn.Module) -> None:
        self.scene = scene
        self._reference = reference

    async def start(self, prompt: list[int], count: int, *, epoch: int = 1) -> str:
        return await self.scene.pool.start(self.scene.names[0], prompt, count, epoch=epoch)

    def expected(self, prompt: list[int], count: int) -> list[int]:
        whole = self._reference.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)  # type: ignore[operator]
        text: list[int] = whole[0, len(prompt) :].tolist()
        return text


@pytest.fixture
async def stage(bus: NatsBus, nats_server: EmbeddedServer, tmp_path: Path) -> AsyncIterator[Stage]:
    torch.set_num_threads(1)
    reference = make_tiny_model("llama", tmp_path)
    model = TinyModel(tmp_path, card_of(reference.config))
    load: Load = load_engine
    async with open_pool(bus, nats_server.url, 79, model, load, BLOCK) as pool, open_scene(pool) as scene:
        yield Stage(scene, reference)


def random_tokens(count: int, seed: int) -> list[int]:
    tokens: list[int] = torch.randint(
        3, VOCABULARY_SIZE, (count,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return tokens


async def test_a_chat_computes_only_what_is_new_and_says_the_same(stage: Stage) -> None:
    prompt, count, turns = random_tokens(21, 1), 10, 4
    before = asked = found = 0
    for turn in range(turns):
        sequence = await stage.start(prompt, count)
        report = await stage.scene.finish([sequence])
        answer = stage.scene.pool.tokens[sequence]
        assert answer == stage.expected(prompt, count)
        if turn:
            # all but the last token of the turn before, in whole blocks
            found += (before + count - 1) // BLOCK * BLOCK
        before = len(prompt)
        asked += before
        assert (report.prefix_queries_tokens, report.prefix_hits_tokens) == (asked, found)
        prompt = [*prompt, *answer, *random_tokens(5, turn + 2)]
    assert report.cached_blocks > 0
    assert report.free_blocks == report.num_blocks


async def test_those_who_share_say_the_same_after_a_stage_was_replaced(stage: Stage) -> None:
    system, count = random_tokens(19, 7), 45
    prompts = [[*system, *random_tokens(3 + number, number)] for number in range(3)]
    first = await stage.start(prompts[0], count)
    await stage.scene.until_tokens([first], 1)
    sequences = [first, *[await stage.start(prompt, count) for prompt in prompts[1:]]]
    await stage.scene.until_tokens(sequences, 3)
    await stage.scene.replace(1)
    report = await stage.scene.finish(sequences)
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert stage.scene.pool.tokens[sequence] == stage.expected(prompt, count)
    assert report.prefix_hits_tokens == 2 * (len(system) // BLOCK * BLOCK)
    assert (report.rebuilt, report.recomputed) == (3, 0)
    # and whoever comes then begins with what is there since
    later = await stage.start(prompts[1], count, epoch=2)
    report = await stage.scene.finish([later])
    assert stage.scene.pool.tokens[later] == stage.expected(prompts[1], count)
    assert report.prefix_hits_tokens > 2 * (len(system) // BLOCK * BLOCK)
