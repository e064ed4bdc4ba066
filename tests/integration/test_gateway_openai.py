"""The usual client against the gateway."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from tests.integration.test_gateway_pool import FakePool

HELLO: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


async def test_a_chat_is_answered(client: openai.AsyncOpenAI, pool: FakePool) -> None:
    pool.text = "Paris. 日本語 😀 wörld"
    answer = await client.chat.completions.create(model="demo", messages=HELLO, seed=5, temperature=0)
    assert answer.choices[0].message.content == pool.text
    assert answer.choices[0].finish_reason == "stop"
    submit = pool.submitted.get_nowait()
    assert submit.model == "Small-Test"
    assert submit.options.seed == 5
    prompt = pool.tokenizer.decode(list(submit.prompt), skip_special_tokens=False)
    assert prompt == f"<|im_start|>user\n{HELLO[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert submit.options.max_tokens == 256 - len(submit.prompt)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(submit.prompt)
    assert answer.usage.completion_tokens == len(pool.tokenizer.encode(pool.text).ids) + 1
    assert pool.cancelled.empty()


async def test_a_stream_is_the_same_text_in_pieces(client: openai.AsyncOpenAI, pool: FakePool) -> None:
    pool.text = "Hello wörld 日本語 and 😀 in it."
    stream = await client.chat.completions.create(
        model="Small-Test", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == pool.text
    assert "\ufffd" not in "".join(texts)
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-2].choices[0].delta.content is None
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(pool.tokenizer.encode(pool.text).ids) + 1
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


async def test_a_stop_string_ends_the_answer_and_cancels_the_sequence(
    client: openai.AsyncOpenAI, pool: FakePool
) -> None:
    pool.text = "one two STOP three " * 20
    stream = await client.chat.completions.create(model="demo", messages=HELLO, stream=True, stop=["STOP"])
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two "
    assert chunks[-1].choices[0].finish_reason == "stop"
    submit = pool.submitted.get_nowait()
    assert await asyncio.wait_for(pool.cancelled.get(), 5) == submit.sequence


async def test_n_choices_have_their_own_seeds(client: openai.AsyncOpenAI, pool: FakePool) -> None:
    answer = await client.chat.completions.create(model="demo", messages=HELLO, n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == [pool.text] * 3
    seeds = [pool.submitted.get_nowait().options.seed for _ in range(3)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3


async def test_completions_take_text_and_token_ids(client: openai.AsyncOpenAI, pool: FakePool) -> None:
    answer = await client.completions.create(model="demo", prompt=["The capital", "Hello"], echo=True, max_tokens=40)
    assert [choice.text for choice in answer.choices] == ["The capital" + pool.text, "Hello" + pool.text]
    first = pool.submitted.get_nowait()
    pool.submitted.get_nowait()
    again = await client.completions.create(model="demo", prompt=list(first.prompt))
    assert again.choices[0].text == pool.text
    last = pool.submitted.get_nowait()
    assert last.prompt == first.prompt
    assert last.options.max_tokens == 16


async def test_the_end_by_length_is_told(client: openai.AsyncOpenAI, pool: FakePool) -> None:
    pool.text = "one two three four"
    answer = await client.completions.create(model="demo", prompt="Count", max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert pool.text.startswith(answer.choices[0].text)


async def test_log_probabilities_of_a_chat(client: openai.AsyncOpenAI, pool: FakePool) -> None:
    answer = await client.chat.completions.create(model="demo", messages=HELLO, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == pool.text
    assert bytes(byte for entry in logprobs.content for byte in entry.bytes or []) == pool.text.encode()
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [2] * len(logprobs.content)


async def test_log_probabilities_of_a_completion(client: openai.AsyncOpenAI, pool: FakePool) -> None:
    answer = await client.completions.create(model="demo", prompt="Where?", logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    assert "".join(logprobs.tokens) == pool.text
    assert logprobs.text_offset[0] == 0
    assert logprobs.token_logprobs == [-0.5] * len(logprobs.tokens)


async def test_models_are_listed_under_all_names(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["Small-Test", "demo"]
    assert (await client.models.retrieve("demo")).id == "demo"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


async def test_an_unknown_model_is_404(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert caught.value.code == "model_not_found"
    assert "demo" in caught.value.message


async def test_token_ids_are_told_when_asked_for(http: httpx.AsyncClient, pool: FakePool) -> None:
    tokens = [*pool.tokenizer.encode(pool.text).ids, 2]
    body = {"model": "demo", "return_token_ids": True}
    answer = (await http.post("/v1/chat/completions", json={**body, "messages": HELLO})).json()
    assert answer["choices"][0]["token_ids"] == tokens
    assert answer["prompt_token_ids"] == list(pool.submitted.get_nowait().prompt)
    answer = (await http.post("/v1/completions", json={**body, "prompt": [5, 6]})).json()
    assert answer["choices"][0]["token_ids"] == tokens
    assert answer["choices"][0]["prompt_token_ids"] == [5, 6]
    async with http.stream("POST", "/v1/completions", json={**body, "prompt": [5, 6], "stream": True}) as response:
        lines = [line[6:] async for line in response.aiter_lines() if line.startswith("data: {")]
    choices = [json.loads(line)["choices"][0] for line in lines]
    assert choices[0]["prompt_token_ids"] == [5, 6]
    assert [token for choice in choices for token in choice.get("token_ids", [])] == tokens
