"""Prompts whose log probabilities are told: echoed in a completion, and as vLLM does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from molink.embedded import EmbeddedServer
from molink_common import subjects
from molink_common.bus import NatsBus
from molink_common.messages import PromptLogprobs, StepTokens, SubmitSequence, TokenLogprob
from tests.integration.test_gateway_pool import FakePool, fake_pool, ready_gateway

TEXT = "Hello wörld 日本語 😀 <|im_start|> it."
CHUNK = 7


def logprob_of(place: int, token: int) -> float:
    return -place - token / 1024


@dataclass
class Teller:
    """Tells of prompts in chunks, then answers; may lose a chunk on its way to the gateway."""

    pool: FakePool
    loses: list[int] = field(default_factory=list)
    """Of the sequences that tell of prompts, by their order: those whose first chunk is lost."""
    told: int = 0
    later: asyncio.Event | None = None
    """Until then nothing is told of prompts, and only those that do not tell of prompts are answered."""
    has_answered: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, submit: SubmitSequence) -> None:
        likeliest = submit.options.prompt_logprobs
        if likeliest is not None:
            if self.later is not None:
                await self.later.wait()
            self.told += 1
            for first in range(1, len(submit.prompt), CHUNK):
                if first == 1 and self.told - 1 in self.loses:
                    continue
                places = range(first, min(first + CHUNK, len(submit.prompt)))
                part = PromptLogprobs(
                    sequence=submit.sequence,
                    start=first,
                    logprobs=tuple(logprob_of(place, submit.prompt[place]) for place in places),
                    ranks=tuple(10 + place for place in places),
                    likeliest=tuple(
                        tuple(TokenLogprob(token=70 + n, logprob=-0.125 - n) for n in range(likeliest)) for _ in places
                    ),
                )
                step = StepTokens(pipeline=0, epoch=self.pool.epoch, step=1, prompt_logprobs=(part,))
                await self.pool.bus.send(subjects.tokens(0), step)
        await self.pool.say_text(submit)
        self.has_answered.set()


@pytest.fixture
async def teller(bus: NatsBus, tmp_path: Path) -> AsyncIterator[Teller]:
    async with fake_pool(bus, tmp_path) as pool:
        teller = Teller(pool)
        pool.answer = teller.answer
        yield teller


@pytest.fixture
async def http(teller: Teller, nats_server: EmbeddedServer) -> AsyncIterator[httpx.AsyncClient]:
    async with ready_gateway(nats_server) as client:
        yield client


async def completed(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    body = {"model": "demo", "temperature": 0, **fields}
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    return whole


async def streamed(http: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    """The choices as their chunks add up to."""
    choices: dict[int, dict[str, Any]] = {}
    body = {"model": "demo", "temperature": 0, "stream": True, **fields}
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            for part in json.loads(line.removeprefix("data: "))["choices"]:
                choice = choices.setdefault(part["index"], {"index": part["index"], "text": "", "logprobs": None})
                choice["text"] += part["text"]
                choice["finish_reason"] = part["finish_reason"]
                told = choice["logprobs"] or {}
                for name, values in (part["logprobs"] or {}).items():
                    told[name] = told.get(name, []) + values
                choice["logprobs"] = told or None
    return [choices[index] for index in sorted(choices)]


def check_prompt(choice: dict[str, Any], prompt: list[int], text: str, *, likeliest: int) -> None:
    told = choice["logprobs"]
    assert choice["text"].startswith(text)
    num_tokens = len(prompt)
    wanted = [None, *(logprob_of(place, prompt[place]) for place in range(1, num_tokens))]
    assert told["token_logprobs"][:num_tokens] == wanted
    assert told["top_logprobs"][0] is None
    for place in range(1, num_tokens):
        best = [-0.125 - n for n in range(likeliest)]
        assert sorted(told["top_logprobs"][place].values(), reverse=True) == [*best, wanted[place]]
    assert len({len(values) for values in told.values()}) == 1
    for place, offset in enumerate(told["text_offset"][:-1]):
        if "\ufffd" not in told["tokens"][place] and "<|" not in told["tokens"][place]:
            assert choice["text"][offset : told["text_offset"][place + 1]] == told["tokens"][place]


async def test_what_an_evaluation_harness_asks(http: httpx.AsyncClient, teller: Teller) -> None:
    prompts = [teller.pool.tokenizer.encode(text).ids for text in (TEXT, "The capital of France is")]
    fields = {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "seed": 1234}
    whole = await completed(http, **fields)
    assert whole["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert whole["usage"]["completion_tokens"] == 2
    for choice, prompt in zip(whole["choices"], prompts, strict=True):
        check_prompt(choice, prompt, teller.pool.tokenizer.decode(prompt), likeliest=1)
        assert len(choice["logprobs"]["tokens"]) == len(prompt) + 1
        assert choice["logprobs"]["token_logprobs"][-1] == -0.5
        assert choice["finish_reason"] == "length"
    assert await streamed(http, **fields) == whole["choices"]


async def test_an_answer_that_ends_at_once_has_its_token_told(http: httpx.AsyncClient, teller: Teller) -> None:
    # who counts from the end must not take the prompt's last token for the answer's
    teller.pool.text = ""
    whole = await completed(http, prompt="The capital", echo=True, logprobs=0, max_tokens=1)
    told = whole["choices"][0]["logprobs"]
    assert told["tokens"][-1] == "<|im_end|>"
    assert len(told["tokens"]) == whole["usage"]["total_tokens"]
    assert whole["choices"][0]["finish_reason"] == "stop"


async def test_several_answers_to_a_text_share_its_log_probabilities(http: httpx.AsyncClient, teller: Teller) -> None:
    fields = {"prompt": [TEXT, "Hello"], "echo": True, "logprobs": 2, "max_tokens": 3, "n": 2}
    whole = await completed(http, **fields)
    assert teller.told == 2
    for number, choice in enumerate(whole["choices"]):
        text = TEXT if number < 2 else "Hello"
        prompt = teller.pool.tokenizer.encode(text).ids
        check_prompt(choice, prompt, text, likeliest=2)
        assert len(choice["logprobs"]["tokens"]) == len(prompt) + 3
        assert choice["logprobs"]["text_offset"][len(prompt)] == len(text)
    assert await streamed(http, **fields) == whole["choices"]


async def test_no_choice_says_anything_before_its_prompt_is_told(http: httpx.AsyncClient, teller: Teller) -> None:
    teller.later = asyncio.Event()
    asking = asyncio.create_task(streamed(http, prompt=TEXT, echo=True, logprobs=0, max_tokens=3, n=2))
    await asyncio.wait_for(teller.has_answered.wait(), 5)
    teller.later.set()
    choices = await asyncio.wait_for(asking, 5)
    prompt = teller.pool.tokenizer.encode(TEXT).ids
    for choice in choices:
        check_prompt(choice, prompt, TEXT, likeliest=0)
        assert len(choice["logprobs"]["tokens"]) == len(prompt) + 3


@pytest.mark.parametrize("logprobs", [None, 1])
async def test_the_prompt_alone(http: httpx.AsyncClient, teller: Teller, logprobs: int | None) -> None:
    fields = {"prompt": "The capital", "echo": True, "logprobs": logprobs, "max_tokens": 0}
    whole = await completed(http, **fields)
    (choice,) = whole["choices"]
    prompt = teller.pool.tokenizer.encode("The capital").ids
    assert choice["text"] == "The capital"
    assert choice["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 0
    if logprobs is None:
        assert choice["logprobs"] is None
    else:
        check_prompt(choice, prompt, "The capital", likeliest=1)
        assert len(choice["logprobs"]["tokens"]) == len(prompt)
    assert await streamed(http, **fields) == whole["choices"]


async def test_the_shape_of_vllm(http: httpx.AsyncClient, teller: Teller) -> None:
    whole = await completed(http, prompt=["The capital", "Hello"], prompt_logprobs=1, max_tokens=1)
    for choice, text in zip(whole["choices"], ("The capital", "Hello"), strict=True):
        prompt = teller.pool.tokenizer.encode(text).ids
        assert choice["logprobs"] is None
        assert choice["prompt_logprobs"][0] is None
        assert len(choice["prompt_logprobs"]) == len(prompt)
        for place in range(1, len(prompt)):
            told = choice["prompt_logprobs"][place]
            assert list(told) == [str(prompt[place]), "70"]
            assert told[str(prompt[place])]["logprob"] == logprob_of(place, prompt[place])
            assert told[str(prompt[place])]["rank"] == 10 + place
            assert told["70"]["rank"] == 1
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": "demo", "messages": messages, "prompt_logprobs": 0, "n": 2, "return_token_ids": True}
    chat = (await http.post("/v1/chat/completions", json=body)).json()
    assert [list(one or ()) for one in chat["prompt_logprobs"]] == [
        [],
        *([str(token)] for token in chat["prompt_token_ids"][1:]),
    ]
    assert teller.told == 3


async def test_what_is_lost_on_the_way_is_computed_again(http: httpx.AsyncClient, teller: Teller) -> None:
    teller.loses = [0]
    whole = await completed(http, prompt=TEXT, echo=True, logprobs=1, max_tokens=2)
    check_prompt(whole["choices"][0], teller.pool.tokenizer.encode(TEXT).ids, TEXT, likeliest=1)
    first, again = (teller.pool.submitted.get_nowait() for _ in range(2))
    assert again.sequence != first.sequence
    assert (again.prompt, again.options.max_tokens) == (first.prompt, 1)
    assert whole["usage"]["completion_tokens"] == 2

    teller.loses = [2, 3]
    answer = await http.post(
        "/v1/completions", json={"model": "demo", "prompt": TEXT, "echo": True, "logprobs": 1, "max_tokens": 1}
    )
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "stalled"
