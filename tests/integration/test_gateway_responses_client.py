"""Responses, tokens and readiness as clients use them, over a real NATS."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest

from molink.embedded import EmbeddedServer
from molink_common.messages import RefusalCode, Refused, SubmitSequence
from tests.integration.test_gateway_pool import (
    CONTEXT_LENGTH,
    FakePool,
    prompt_of,
    ready_gateway,
    running_gateway,
)


async def test_a_response_is_made_kept_continued_and_deleted(client: openai.AsyncOpenAI, pool: FakePool) -> None:
    pool.text = "Paris. 日本語 😀"
    first = await client.responses.create(
        model="demo", input="Capital?", instructions="Be brief.", max_output_tokens=99
    )
    assert (first.status, first.output_text, first.model) == ("completed", pool.text, "demo")
    assert first.usage is not None
    assert first.usage.total_tokens == first.usage.input_tokens + first.usage.output_tokens
    asked = "<|im_start|>{}\n{}<|im_end|>\n"
    begins = asked.format("user", "Capital?")
    ends = "<|im_start|>assistant\n"
    assert await prompt_of(pool) == asked.format("system", "Be brief.") + begins + ends

    assert await client.responses.retrieve(first.id) == first
    second = await client.responses.create(model="demo", input="Sure?", previous_response_id=first.id)
    answered = asked.format("assistant", pool.text)
    assert await prompt_of(pool) == begins + answered + asked.format("user", "Sure?") + ends

    page = await client.responses.input_items.list(second.id, order="asc", limit=2)
    assert [item.type for item in page.data] == ["message", "message"]
    assert page.has_next_page()
    items: list[Any] = [item async for item in page]
    assert [item.content[0].text for item in items] == ["Capital?", pool.text, "Sure?"]
    assert len({item.id for item in items}) == 3

    await client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError) as gone:
        await client.responses.retrieve(first.id)
    assert gone.value.code == "response_not_found"
    with pytest.raises(openai.NotFoundError) as lost:
        await client.responses.create(model="demo", input="Sure?", previous_response_id=first.id)
    assert (lost.value.code, lost.value.param) == ("previous_response_not_found", "previous_response_id")


async def test_a_streamed_response_is_the_same_and_kept_when_its_end_is_read(
    client: openai.AsyncOpenAI, pool: FakePool
) -> None:
    pool.text = "Hello wörld 日本語 and 😀 in it."
    async with client.responses.stream(model="demo", input="Hello") as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert final.output_text == pool.text
    kept = await client.responses.retrieve(final.id)
    assert kept.output_text == pool.text
    assert kept.usage is not None


async def test_an_answer_that_reaches_its_bound_is_incomplete(client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(model="demo", input="Hello", max_output_tokens=1, store=False)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(response.id)


async def test_a_response_that_breaks_off_says_so_in_its_last_event(client: openai.AsyncOpenAI, pool: FakePool) -> None:
    token = pool.tokenizer.encode("Hello").ids[0]

    async def break_off(submit: SubmitSequence) -> None:
        await pool.say(submit.sequence, 0, token)
        await pool.fail(submit, "A stage was lost.")

    pool.answer = break_off
    stream = await client.responses.create(model="demo", input="Hello", stream=True)
    last = [event async for event in stream][-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert last.response.error.message == "A stage was lost."


async def test_what_is_wrong_is_an_error_of_openais(client: openai.AsyncOpenAI, pool: FakePool) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        await client.responses.create(model="demo", input="Hello", max_output_tokens=CONTEXT_LENGTH)
    assert (long.value.param, long.value.code) == ("max_output_tokens", "context_length_exceeded")
    assert "`max_output_tokens` is too large" in str(long.value)
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(model="nobody", input="Hello")
    pool.refusal = lambda submit: Refused(
        sequence=submit.sequence, code=RefusalCode.QUEUE_FULL, message="full", retry_after_s=1
    )
    with pytest.raises(openai.RateLimitError):
        await client.responses.create(model="demo", input="Hello")


async def test_there_is_nothing_to_cancel(client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(model="demo", input="Hello")
    with pytest.raises(openai.BadRequestError, match="Only a response with `background`"):
        await client.responses.cancel(response.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.cancel("resp_" + "0" * 32)


async def test_another_gateway_knows_what_one_has_answered(
    client: openai.AsyncOpenAI, nats_server: EmbeddedServer
) -> None:
    response = await client.responses.create(model="demo", input="Hello")
    async with ready_gateway(nats_server) as other:
        assert (await other.get(f"/v1/responses/{response.id}")).json()["id"] == response.id


async def test_a_text_is_tokenized_and_told_again(http: httpx.AsyncClient, pool: FakePool) -> None:
    text = "Hello wörld 日本語<|im_end|>"
    answer = (await http.post("/tokenize", json={"model": "demo", "prompt": text, "return_token_strs": True})).json()
    assert answer["tokens"] == pool.tokenizer.encode(text).ids
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), CONTEXT_LENGTH)
    assert answer["token_strs"][-1] == "<|im_end|>"
    again = await http.post("/detokenize", json={"tokens": answer["tokens"]})
    assert again.json() == {"prompt": text}


async def test_a_chat_is_tokenized_as_it_would_be_for_an_answer(http: httpx.AsyncClient, pool: FakePool) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    tokens = (await http.post("/tokenize", json={"messages": messages})).json()["tokens"]
    assert (await http.post("/v1/chat/completions", json={"model": "demo", "messages": messages})).status_code == 200
    assert tokens == list((await asyncio.wait_for(pool.submitted.get(), 5)).prompt)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
    ],
)
async def test_what_cannot_be_tokenized(http: httpx.AsyncClient, path: str, body: dict[str, Any], param: str) -> None:
    answer = await http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_a_gateway_alone_lives_but_is_not_ready(nats_server: EmbeddedServer) -> None:
    async with running_gateway(nats_server) as client:
        answer = await client.get("/ready")
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert "scheduler" in answer.json()["reason"]
        health = await client.get("/health")
        assert (health.status_code, health.json()["ready"]) == (200, False)


async def test_a_message_in_anthropics_shape(http: httpx.AsyncClient, pool: FakePool) -> None:
    pool.text = "Paris END."
    asked = {"model": "demo", "max_tokens": 99, "messages": [{"role": "user", "content": "Capital?"}]}
    counted = (await http.post("/v1/messages/count_tokens", json=asked)).json()["input_tokens"]
    message = (await http.post("/v1/messages", json={**asked, "stop_sequences": ["END"]})).json()
    assert message["content"] == [{"type": "text", "text": "Paris "}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")
    assert message["usage"]["input_tokens"] == counted
    async with http.stream("POST", "/v1/messages", json={**asked, "stream": True}) as streamed:
        lines = [line async for line in streamed.aiter_lines() if line.startswith("event: ")]
    assert lines[:2] == ["event: message_start", "event: content_block_start"]
    assert lines[-3:] == ["event: content_block_stop", "event: message_delta", "event: message_stop"]


async def test_errors_of_messages_have_anthropics_shape(http: httpx.AsyncClient) -> None:
    for answer, status, kind in (
        (await http.post("/v1/messages", content=b"x"), 400, "invalid_request_error"),
        (await http.post("/v1/messages/count_tokens", content=b"x"), 400, "invalid_request_error"),
        (await http.get("/v1/messages"), 405, "invalid_request_error"),
        (await http.post("/v1/messages/other", json={}), 404, "not_found_error"),
        (
            await http.post(
                "/v1/messages",
                json={"model": "nobody", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]},
            ),
            404,
            "not_found_error",
        ),
    ):
        assert answer.status_code == status
        told = answer.json()
        assert (told["type"], told["error"]["type"]) == ("error", kind)
        assert told["error"]["message"]


async def test_the_document_is_there_for_everybody(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    assert "/v1/responses" in document["paths"]
