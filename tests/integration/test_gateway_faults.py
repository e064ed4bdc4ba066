"""What a client sees when something goes wrong behind the gateway, or when the client itself goes away."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from molink.embedded import EmbeddedServer, start_nats
from molink_common import subjects
from molink_common.bus import BusSettings, NatsBus, open_bus
from molink_common.messages import FinishReason, SubmitSequence, TokenEvent
from tests.integration.test_gateway_pool import (
    FakePool,
    fake_pool,
    make_card,
    make_tokenizer,
    ready_gateway,
    running_gateway,
    silent_pool,
    submitted,
    token_of,
    until_healthy,
)

BODY: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}
STREAM = {**BODY, "stream": True}
CHAT = "/v1/chat/completions"
END = 2


@pytest.fixture
async def pool(bus: NatsBus, tmp_path: Path) -> AsyncIterator[FakePool]:
    async with silent_pool(bus, tmp_path) as pool:
        yield pool


async def cancelled(pool: FakePool) -> str:
    return await asyncio.wait_for(pool.cancelled.get(), 5)


def say_first_token(pool: FakePool) -> None:
    """From now on each sequence gets its first token, ``a``."""

    async def say_one(submit: SubmitSequence) -> None:
        await pool.say(submit.sequence, 0, token_of(pool, "a"))

    pool.answer = say_one


def events_of(body: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_a_failure_before_the_first_token_is_a_status(pool: FakePool, nats_server: EmbeddedServer) -> None:
    async with ready_gateway(nats_server) as client:
        for body in (BODY, STREAM):
            asking = asyncio.create_task(client.post(CHAT, json=body))
            await pool.fail(await submitted(pool), "no worker is left")
            response = await asking
            assert response.status_code == 503
            assert response.json()["error"]["message"] == "no worker is left"


async def test_a_failure_after_it_is_a_chunk(pool: FakePool, nats_server: EmbeddedServer) -> None:
    say_first_token(pool)
    async with ready_gateway(nats_server) as client, client.stream("POST", CHAT, json=STREAM) as response:
        assert response.status_code == 200
        await pool.fail(await submitted(pool), "no worker is left")
        events = events_of((await response.aread()).decode())
        assert events[1]["choices"][0]["delta"]["content"] == "a"
        assert events[-1]["error"]["message"] == "no worker is left"
        assert set(events[-1]["error"]) == {"message", "type", "param", "code"}


async def test_logits_that_are_not_finite_are_an_error(pool: FakePool, nats_server: EmbeddedServer) -> None:
    async with ready_gateway(nats_server) as client:
        asking = asyncio.create_task(client.post(CHAT, json=BODY))
        await pool.say_step([], failed=[(await submitted(pool)).sequence])
        response = await asking
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "given_up"


async def test_silence_ends_in_an_error_and_a_cancellation(pool: FakePool, nats_server: EmbeddedServer) -> None:
    async with ready_gateway(nats_server, queue_timeout_s=0.3) as client:
        response = await client.post(CHAT, json=BODY)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "stalled"
        assert await cancelled(pool) == (await submitted(pool)).sequence


async def test_repeated_and_overtaken_tokens_give_the_same_text(pool: FakePool, nats_server: EmbeddedServer) -> None:
    async with ready_gateway(nats_server) as client:
        asking = asyncio.create_task(client.post(CHAT, json=BODY))
        sequence = (await submitted(pool)).sequence
        await bus_garbage(pool)
        for index, text in ((1, "b"), (0, "a"), (0, "a"), (3, "d"), (1, "b"), (2, "c")):
            await pool.say(sequence, index, token_of(pool, text))
        await pool.say("0" * 16, 0, 5, FinishReason.STOP)
        await pool.say(sequence, 4, END, FinishReason.STOP)
        choice = (await asking).json()["choices"][0]
        assert choice["message"]["content"] == "abcd"
        assert choice["finish_reason"] == "stop"


async def bus_garbage(pool: FakePool) -> None:
    """What does not parse must not end the listening."""
    await pool.bus.publish(subjects.tokens(0), b"\xff")
    await pool.bus.publish(subjects.tokens(0), b'{"v": 1, "type": "step_tokens"}')
    await pool.bus.publish(subjects.STATE, b"{}")


async def test_a_lost_token_is_never_papered_over(pool: FakePool, nats_server: EmbeddedServer) -> None:
    async with ready_gateway(nats_server, gap_timeout_s=0.2) as client:
        asking = asyncio.create_task(client.post(CHAT, json=BODY))
        sequence = (await submitted(pool)).sequence
        await pool.say(sequence, 0, token_of(pool, "a"))
        await pool.say(sequence, 2, END, FinishReason.STOP)
        response = await asking
        assert response.status_code == 503
        assert "lost" in response.json()["error"]["message"]
        assert await cancelled(pool) == sequence


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_a_client_that_hangs_up_frees_its_sequence(
    pool: FakePool, nats_server: EmbeddedServer, body: dict[str, Any]
) -> None:
    if body is STREAM:
        say_first_token(pool)
    async with ready_gateway(nats_server) as client:
        asking = asyncio.create_task(hang_up_when_told(client, body))
        sequence = (await submitted(pool)).sequence
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert await cancelled(pool) == sequence


async def hang_up_when_told(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    async with client.stream("POST", CHAT, json=body) as response:
        await response.aread()


async def test_a_client_that_hangs_up_while_the_scheduler_decides(pool: FakePool, nats_server: EmbeddedServer) -> None:
    pool.may_admit.clear()
    async with ready_gateway(nats_server) as client:
        asking = asyncio.create_task(hang_up_when_told(client, BODY))
        await asyncio.wait_for(pool.asked.wait(), 5)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        for _ in range(5):  # time for the gateway to notice, and to say too early that it cancels
            await client.get("/ready")
            await pool.bus.flush()
        pool.may_admit.set()
        sequence = (await submitted(pool)).sequence
        assert await cancelled(pool) == sequence


async def test_more_requests_than_there_is_room_for(pool: FakePool, nats_server: EmbeddedServer) -> None:
    async with ready_gateway(nats_server, max_streams=1) as client:
        asking = asyncio.create_task(client.post(CHAT, json=BODY))
        sequence = (await submitted(pool)).sequence
        refused = await client.post(CHAT, json=BODY)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
        await pool.say(sequence, 0, END, FinishReason.STOP)
        assert (await asking).status_code == 200


async def test_without_a_scheduler(nats_server: EmbeddedServer) -> None:
    async with running_gateway(nats_server) as client:
        response = await client.get("/ready")
        assert response.status_code == 503
        assert "scheduler" in response.json()["reason"]
        for path in (CHAT, "/v1/models", "/molink/status"):  # nobody has said who may ask
            response = await (client.post(path, json=BODY) if path == CHAT else client.get(path))
            assert response.status_code == 503
            assert response.headers["retry-after"]


async def test_a_scheduler_that_has_gone(bus: NatsBus, nats_server: EmbeddedServer, tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with fake_pool(bus, tmp_path):
            client = await stack.enter_async_context(ready_gateway(nats_server))
        await bus.flush()
        response = await client.post(CHAT, json=BODY)
        assert response.status_code == 503
        assert "No scheduler is running" in response.json()["error"]["message"]
        assert response.headers["retry-after"]


async def test_health_and_status_follow_the_scheduler(pool: FakePool, nats_server: EmbeddedServer) -> None:
    async with ready_gateway(nats_server) as client:
        status = (await client.get("/molink/status")).json()
        assert status["ready"] is True
        assert status["card"]["name"] == "Small-Test"
        await pool.say_state(pool.state(ready=False, reason="worker w1 is loading"))
        async with asyncio.timeout(5):
            while (response := await client.get("/ready")).status_code == 200:
                await pool.bus.flush()
        assert response.json()["reason"] == "worker w1 is loading"
        assert (await client.get("/version")).json()["protocol"] == 1


async def test_files_with_the_wrong_checksum_are_not_taken(pool: FakePool, nats_server: EmbeddedServer) -> None:
    pool.damage_files = True
    async with running_gateway(nats_server) as client:
        async with asyncio.timeout(5):
            while "checksum" not in (await client.get("/ready")).json()["reason"]:
                await pool.bus.flush()
        pool.damage_files = False
        await pool.say_state(pool.state())
        await until_healthy(client)


async def test_another_model_brings_another_tokenizer(
    pool: FakePool, nats_server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    async with ready_gateway(nats_server) as client:
        folder = tmp_path_factory.mktemp("other")
        tokenizer = make_tokenizer(folder, chat_template=None)
        card = make_card(folder, tokenizer.get_vocab_size(), fingerprint="other")
        other = card.model_copy(update={"name": "Other", "aliases": ()})
        pool.folder = folder
        await pool.say_state(pool.state(card=other))
        async with asyncio.timeout(5):
            while [model["id"] for model in (await client.get("/v1/models")).json()["data"]] != ["Other"]:
                await pool.bus.flush()
        assert (await client.post(CHAT, json=BODY)).status_code == 404


async def test_a_stopping_gateway_lets_streams_finish_or_says_so(pool: FakePool, nats_server: EmbeddedServer) -> None:
    say_first_token(pool)
    async with contextlib.AsyncExitStack() as stack:
        async with ready_gateway(nats_server) as client:
            outer = await stack.enter_async_context(httpx.AsyncClient(base_url=client.base_url, timeout=20))
            response = await stack.enter_async_context(outer.stream("POST", CHAT, json=STREAM))
            sequence = (await submitted(pool)).sequence
        # leaving the block above has stopped the gateway
        events = events_of((await response.aread()).decode())
        assert "stopping" in events[-1]["error"]["message"]
        assert await cancelled(pool) == sequence


async def test_a_broker_that_restarts(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("nats")
    server = start_nats(folder)
    is_back = asyncio.Event()
    try:
        async with (
            open_bus(BusSettings(url=server.url), name="test", on_reconnect=is_back.set) as bus,
            fake_pool(bus, tmp_path) as pool,
            ready_gateway(server) as client,
        ):
            server.stop()
            async with asyncio.timeout(10):
                while (response := await client.get("/ready")).status_code == 200:
                    pass
            assert "NATS" in response.json()["reason"]
            assert (await client.post(CHAT, json=BODY)).status_code == 503
            server = start_nats(folder, server.port)
            await asyncio.wait_for(is_back.wait(), 10)
            pool.answer = pool.say_text
            asking = asyncio.create_task(until_healthy(client))
            while not asking.done():  # what is said before the gateway is back is said to nobody
                await pool.say_state(pool.state())
                await asyncio.wait({asking}, timeout=0.1)
            answer = await client.post(CHAT, json=BODY)
            assert answer.json()["choices"][0]["message"]["content"] == pool.text
    finally:
        server.stop()


class Collector:
    """Takes traces as an OTLP/HTTP collector does."""

    def __init__(self) -> None:
        self.spans: asyncio.Queue[Span] = asyncio.Queue()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        data = await reader.readexactly(length)
        if "content-encoding: gzip" in head:
            data = gzip.decompress(data)
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.put_nowait(span)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()


async def test_a_request_is_one_trace(pool: FakePool, nats_server: EmbeddedServer) -> None:
    pool.answer = pool.say_text
    collector = Collector()
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    async with await asyncio.start_server(collector.serve, "127.0.0.1", 0) as receiver:
        endpoint = f"http://127.0.0.1:{receiver.sockets[0].getsockname()[1]}"
        async with ready_gateway(nats_server, otlp_endpoint=endpoint) as client:
            headers = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}
            assert (await client.post(CHAT, json=BODY, headers=headers)).status_code == 200
            trace = (await submitted(pool)).trace
        # the gateway has stopped, so everything is exported
        span = await asyncio.wait_for(collector.spans.get(), 5)
    assert trace == f"00-{trace_id}-{span.span_id.hex()}-01"
    assert span.trace_id.hex() == trace_id
    assert span.name == f"POST {CHAT}"
    attributes = {one.key: one.value for one in span.attributes}
    assert attributes["gen_ai.request.model"].string_value == "Small-Test"
    assert attributes["gen_ai.usage.output_tokens"].int_value == len(pool.tokenizer.encode(pool.text).ids) + 1
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["molink.ttft_s"].double_value > 0


async def test_thirty_streams_at_once_each_get_their_own_text(pool: FakePool, nats_server: EmbeddedServer) -> None:
    async with ready_gateway(nats_server) as client:
        asking = [
            asyncio.create_task(client.post(CHAT, json={**STREAM, "messages": [{"role": "user", "content": str(n)}]}))
            for n in range(30)
        ]
        submits = [await submitted(pool) for _ in asking]
        letters = [chr(ord("A") + place) for place in range(30)]
        await pool.say_step(
            [
                TokenEvent(sequence=submit.sequence, index=0, token=pool.tokenizer.encode(letter).ids[0])
                for submit, letter in zip(submits, letters, strict=True)
            ]
        )
        await pool.say_step(
            [TokenEvent(sequence=one.sequence, index=1, token=END, finish=FinishReason.STOP) for one in submits]
        )
        expected = {submit.request: letter for submit, letter in zip(submits, letters, strict=True)}
        for one in asking:
            response = await one
            text = "".join(event["choices"][0]["delta"].get("content", "") for event in events_of(response.text))
            assert text == expected[response.headers["x-request-id"]]
