"""Bad input over real HTTP: the right status, OpenAI's shape, a message that helps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from molink.embedded import EmbeddedServer
from molink_common.bus import NatsBus
from molink_common.messages import RefusalCode, Refused
from tests.integration.test_gateway_pool import FakePool, fake_pool, ready_gateway

HELLO = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"


@pytest.fixture
async def http(pool: FakePool, nats_server: EmbeddedServer) -> AsyncIterator[httpx.AsyncClient]:
    async with ready_gateway(nats_server, max_body_bytes=8 * 1024 * 1024) as client:
        yield client


def error_in(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"\xff\xfe{}",
        b'{"model": "demo", "messages": [{"role": "user", "content": "\xc3\x28"}]}',
        b'{"model": "demo", "messages": [{"role": "user", "content": "\\udc00"}]}',
        b'{"model": "demo", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b"",
    ],
)
async def test_broken_json(http: httpx.AsyncClient, body: bytes) -> None:
    error = error_in(await http.post(CHAT, content=body), 400)
    assert error["code"] == "invalid_json"
    assert error["type"] == "invalid_request_error"


async def test_bad_values_name_their_field(http: httpx.AsyncClient, pool: FakePool) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"messages": []}, "messages"),
        ({"n": 1000}, "n"),
        ({"stop": ["s"] * 100}, "stop"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 1_000_000}, "max_tokens"),
        ({"temperature": "warm"}, "temperature"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"stop_token_ids": [100000]}, "stop_token_ids"),
    ]
    for fields, param in cases:
        response = await http.post(CHAT, json={"model": "demo", "messages": HELLO, **fields})
        assert error_in(response, 400)["param"] == param
    assert pool.submitted.empty()


async def test_a_prompt_longer_than_the_context(http: httpx.AsyncClient) -> None:
    for words, path, fields in (
        ("at least", CHAT, {"messages": [{"role": "user", "content": "word " * 50_000}]}),
        ("256", CHAT, {"messages": [{"role": "user", "content": "xyz " * 150}]}),
        ("has 300", COMPLETION, {"prompt": [5] * 300}),
    ):
        error = error_in(await http.post(path, json={"model": "demo", **fields}), 400)
        assert error["code"] == "context_length_exceeded"
        assert words in error["message"]


async def test_tokens_outside_of_the_vocabulary(http: httpx.AsyncClient) -> None:
    error = error_in(await http.post(COMPLETION, json={"model": "demo", "prompt": [5, 300]}), 400)
    assert error["param"] == "prompt"
    assert "299" in error["message"]


async def test_an_empty_prompt(http: httpx.AsyncClient) -> None:
    assert error_in(await http.post(COMPLETION, json={"model": "demo", "prompt": ""}), 400)["param"] == "prompt"


async def test_a_template_that_refuses(bus: NatsBus, nats_server: EmbeddedServer, tmp_path: Path) -> None:
    template = "{{ raise_exception('no system here') }}"
    async with fake_pool(bus, tmp_path, chat_template=template), ready_gateway(nats_server) as client:
        error = error_in(await client.post(CHAT, json={"model": "demo", "messages": HELLO}), 400)
        assert error == {
            "message": "The model's chat template refuses these messages: no system here",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "chat_template",
        }


async def test_a_large_body_is_refused_by_its_announcement_and_while_reading(http: httpx.AsyncClient) -> None:
    large = b" " * 20_000_000
    assert error_in(await http.post(CHAT, content=large), 413)["code"] == "request_too_large"

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(large), 1_000_000):
            yield large[start : start + 1_000_000]

    assert error_in(await http.post(CHAT, content=pieces()), 413)["code"] == "request_too_large"
    assert (await http.get("/health")).status_code == 200


async def test_a_body_that_never_ends_is_given_up(pool: FakePool, nats_server: EmbeddedServer) -> None:
    async with ready_gateway(nats_server, body_timeout_s=0.2) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        await writer.drain()
        assert b" 408 " in await asyncio.wait_for(reader.readline(), 5)
        writer.close()


async def test_paths_and_methods(http: httpx.AsyncClient) -> None:
    assert "/nowhere" in error_in(await http.get("/nowhere"), 404)["message"]
    response = await http.get(CHAT)
    assert "GET" in error_in(response, 405)["message"]
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("code", "status", "shown"),
    [
        (RefusalCode.UNKNOWN_MODEL, 404, "model_not_found"),
        (RefusalCode.TOO_LONG, 400, "context_length_exceeded"),
        (RefusalCode.QUEUE_FULL, 429, "queue_full"),
        (RefusalCode.NO_PIPELINE, 503, "no_pipeline"),
    ],
)
async def test_refusals_of_the_scheduler(
    http: httpx.AsyncClient, pool: FakePool, code: RefusalCode, status: int, shown: str
) -> None:
    pool.refusal = lambda submit: Refused(sequence=submit.sequence, code=code, message="no", retry_after_s=2.5)
    for stream in (False, True):
        response = await http.post(CHAT, json={"model": "demo", "messages": HELLO, "stream": stream})
        assert error_in(response, status)["code"] == shown
        assert response.headers.get("retry-after") == ("3" if status in (429, 503) else None)


async def test_one_refused_choice_cancels_the_others(http: httpx.AsyncClient, pool: FakePool) -> None:
    async def be_silent(_: Any) -> None:
        return

    def refuse_the_second(submit: Any) -> Refused | None:
        if pool.submitted.empty():
            return None
        return Refused(sequence=submit.sequence, code=RefusalCode.QUEUE_FULL, message="full")

    pool.answer = be_silent
    pool.refusal = refuse_the_second
    response = await http.post(CHAT, json={"model": "demo", "messages": HELLO, "n": 2})
    assert error_in(response, 429)["message"] == "full"
    admitted = pool.submitted.get_nowait().sequence
    assert await asyncio.wait_for(pool.cancelled.get(), 5) == admitted


async def test_a_request_id_is_kept_or_made(http: httpx.AsyncClient, pool: FakePool) -> None:
    body = {"model": "demo", "messages": HELLO}
    response = await http.post(CHAT, json=body, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert pool.submitted.get_nowait().request == "mine-1"
    response = await http.post(CHAT, json=body, headers={"x-request-id": "x" * 500})
    assert response.headers["x-request-id"].startswith("req-")


async def test_a_base_model_has_no_chat(bus: NatsBus, nats_server: EmbeddedServer, tmp_path: Path) -> None:
    async with fake_pool(bus, tmp_path, chat_template=None) as pool, ready_gateway(nats_server) as client:
        error = error_in(await client.post(CHAT, json={"model": "demo", "messages": HELLO}), 400)
        assert "/v1/completions" in error["message"]
        response = await client.post(COMPLETION, json={"model": "demo", "prompt": "Hello"})
        assert response.json()["choices"][0]["text"] == pool.text
