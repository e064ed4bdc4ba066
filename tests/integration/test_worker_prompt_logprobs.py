"""A tiny model, cut by layers, tells the same log probabilities of its prompts as transformers does with the whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from molink.embedded import EmbeddedServer
from molink_common import messages, subjects
from molink_common.bus import Incoming, NatsBus
from molink_common.identity import new_sequence_id
from molink_common.messages import Done, PromptLogprobs, StartSequence, StepTokens
from molink_common.sampling import SamplingOptions
from molink_stage_worker.engine.loading import load_engine
from tests.architectures.tiny_models import VOCABULARY_SIZE, make_tiny_model
from tests.integration.test_worker_real_engine import TinyModel, card_of
from tests.integration.worker_pool import Pool, open_pool

BLOCK = 4
LIKELIEST = 3
LENGTHS = (1, 2, 9, 17, 33, 50)


async def start(pool: Pool, head: str, prompt: Sequence[int], *, epoch: int = 1, generated: Sequence[int] = ()) -> str:
    sequence = new_sequence_id()
    order = StartSequence(
        pipeline=pool.pipeline,
        epoch=epoch,
        sequence=sequence,
        prompt=tuple(prompt),
        generated=tuple(generated),
        options=SamplingOptions(max_tokens=4, temperature=0.0, top_logprobs=1, prompt_logprobs=LIKELIEST),
    )
    assert await pool.to_head(head, order) == Done()
    return sequence


class Told:
    """What the tail has told, place by place."""

    def __init__(self) -> None:
        self.places: dict[str, dict[int, tuple[float, int, tuple[tuple[int, float], ...]]]] = {}
        self.most_rows = 0

    async def hear(self, incoming: Incoming) -> None:
        step = messages.decode(incoming.data, StepTokens)
        self.most_rows = max(self.most_rows, sum(len(part.logprobs) for part in step.prompt_logprobs))
        for part in step.prompt_logprobs:
            self.add(part)

    def add(self, part: PromptLogprobs) -> None:
        places = self.places.setdefault(part.sequence, {})
        for number, logprob in enumerate(part.logprobs):
            likeliest = tuple((one.token, one.logprob) for one in part.likeliest[number])
            places[part.start + number] = (logprob, part.ranks[number], likeliest)


def check(model: Any, prompt: list[int], told: dict[int, tuple[float, int, tuple[tuple[int, float], ...]]]) -> None:
    with torch.no_grad():
        wanted_TV = torch.log_softmax(model(torch.tensor([prompt])).logits[0].float(), dim=-1)
    assert sorted(told) == list(range(1, len(prompt)))
    for place, (logprob, rank, likeliest) in told.items():
        wanted_V = wanted_TV[place - 1]
        assert logprob == pytest.approx(float(wanted_V[prompt[place]]), abs=1e-4)
        assert [one[0] for one in likeliest] == wanted_V.topk(LIKELIEST).indices.tolist()
        assert [one[1] for one in likeliest] == pytest.approx(wanted_V.topk(LIKELIEST).values.tolist(), abs=1e-4)
        # what an evaluation harness asks: whether greedy decoding would have said the prompt's token
        is_greedy = int(wanted_V.argmax()) == prompt[place]
        assert (rank == 1) == is_greedy
        assert (logprob == max(one[1] for one in likeliest)) == is_greedy


@pytest.mark.parametrize(("family", "num_stages"), [("llama", 1), ("llama", 3), ("bloom", 3)])
async def test_a_cut_model_tells_of_prompts_what_the_whole_one_does(
    bus: NatsBus, nats_server: EmbeddedServer, tmp_path: Path, family: str, num_stages: int
) -> None:
    torch.set_num_threads(1)
    reference = make_tiny_model(family, tmp_path)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, VOCABULARY_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]
    # half of it is what the model says itself
    said = reference.generate(torch.tensor([prompts[2]]), max_new_tokens=12, do_sample=False)[0].tolist()
    prompts.append(said)
    told = Told()
    async with (
        open_pool(bus, nats_server.url, 9_100_000 + num_stages, TinyModel(tmp_path, card_of(reference.config)),
                  load_engine, BLOCK) as pool,
        pool.workers(num_stages) as names,
    ):  # fmt: skip
        subscription = await bus.subscribe(subjects.tokens(pool.pipeline), told.hear)
        await pool.form(names, num_blocks=32)  # too few for all at once: some have to wait, or to begin again
        sequences = [await start(pool, names[0], prompt) for prompt in prompts]
        # as after a recovery: what was generated before is no prompt
        length = len(prompts[2])
        sequences.append(await start(pool, names[0], prompts[2], generated=said[length : length + 3]))
        await pool.until(lambda: all(one in pool.finishes for one in sequences), 30)
        await pool.until_idle(names[0], 32)
        await subscription.close()
    for sequence, prompt in zip(sequences, [*prompts, prompts[2]], strict=True):
        check(reference, prompt, told.places.get(sequence, {}))
    assert 0 < told.most_rows <= 16  # of a step
    assert pool.tokens[sequences[2]][0] == said[len(prompts[2])]
