"""Tokens that are lost on their way to the gateway alone, and tokens of a pipeline's earlier life."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from molink.embedded import EmbeddedServer, start_nats
from molink_common import subjects
from molink_common.bus import BusSettings, NatsBus, open_bus
from molink_common.messages import FinishReason, StepTokens, TokenEvent
from tests.integration.test_gateway_pool import FakePool, ready_gateway, silent_pool, submitted, until_healthy

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}
STREAM = {**BODY, "stream": True}
RESUMABLE = {"X-MoLink-Resumable": "1"}
END = 2


@pytest.fixture
async def pool(bus: NatsBus, tmp_path: Path) -> AsyncIterator[FakePool]:
    """A pool that admits every sequence and says nothing by itself."""

    async with silent_pool(bus, tmp_path) as pool:
        yield pool


def event(pool: FakePool, sequence: str, index: int, text: str) -> TokenEvent:
    """One character, or the end of the text."""
    token = pool.tokenizer.encode(text).ids[0] if text else END
    return TokenEvent(sequence=sequence, index=index, token=token, finish=None if text else FinishReason.STOP)


async def say_in_epoch(pool: FakePool, epoch: int, *events: TokenEvent) -> None:
    await pool.bus.send(subjects.tokens(0), StepTokens(pipeline=0, epoch=epoch, step=1, events=events))


async def content_of(asking: asyncio.Task[httpx.Response]) -> str:
    response = await asyncio.wait_for(asking, 10)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


async def test_a_hole_is_filled_from_the_scheduler(pool: FakePool, nats_server: EmbeddedServer) -> None:
    async with ready_gateway(nats_server) as client:
        asking = asyncio.create_task(client.post(CHAT, json=BODY))
        sequence = (await submitted(pool)).sequence
        for index, text in enumerate(["a", "b", "c", "d", ""]):
            one = event(pool, sequence, index, text)
            if text in ("b", "c"):
                pool.keep(one)  # a message that never arrives
            else:
                await pool.say_step([one])
        assert await content_of(asking) == "abcd"
    assert pool.resumed.qsize() == 1
    assert pool.cancelled.empty()


async def test_a_scheduler_that_lacks_it_too_is_asked_again(pool: FakePool, nats_server: EmbeddedServer) -> None:
    async with ready_gateway(nats_server) as client:
        asking = asyncio.create_task(client.post(CHAT, json=BODY))
        sequence = (await submitted(pool)).sequence
        await pool.say_step([event(pool, sequence, 0, "a")])
        await say_in_epoch(pool, 0, event(pool, sequence, 2, ""))
        await asyncio.wait_for(pool.resumed.get(), 5)
        assert not asking.done()
        pool.keep(event(pool, sequence, 1, "b"))
        pool.keep(event(pool, sequence, 2, ""))
        assert await content_of(asking) == "ab"


async def test_log_probabilities_are_not_made_up(pool: FakePool, nats_server: EmbeddedServer) -> None:
    async with ready_gateway(nats_server, gap_timeout_s=1.3) as client:
        asking = asyncio.create_task(client.post(CHAT, json={**BODY, "logprobs": True}))
        sequence = (await submitted(pool)).sequence
        pool.keep(event(pool, sequence, 0, "a"))
        await pool.say(sequence, 1, END, FinishReason.STOP, logprob=-0.5)
        response = await asking
        assert (response.status_code, response.json()["error"]["code"]) == (503, "stalled")


async def test_a_resumable_stream_that_the_pool_has_forgotten(pool: FakePool, nats_server: EmbeddedServer) -> None:
    async with (
        ready_gateway(nats_server) as client,
        client.stream("POST", CHAT, json=STREAM, headers=RESUMABLE) as response,
    ):
        sequence = (await submitted(pool)).sequence
        del pool.books[sequence]
        await pool.say_step([event(pool, sequence, 1, "b")])
        text = (await response.aread()).decode()
    assert '"code":"sequence_lost"' in text
    assert text.endswith("data: [DONE]\n\n")


async def test_tokens_of_an_epoch_that_is_over_are_dropped(pool: FakePool, nats_server: EmbeddedServer) -> None:
    async with ready_gateway(nats_server) as client:
        asking = asyncio.create_task(client.post(CHAT, json=BODY))
        sequence = (await submitted(pool)).sequence
        await say_in_epoch(pool, 4, event(pool, sequence, 0, "a"))
        await say_in_epoch(pool, 5)
        await say_in_epoch(pool, 4, event(pool, sequence, 1, "x"), event(pool, sequence, 2, ""))
        await say_in_epoch(pool, 5, event(pool, sequence, 1, "b"), event(pool, sequence, 2, ""))
        assert await content_of(asking) == "ab"


async def test_the_scheduler_tells_epochs_too(pool: FakePool, nats_server: EmbeddedServer) -> None:
    async with ready_gateway(nats_server) as client:
        asking = asyncio.create_task(client.post(CHAT, json=BODY))
        sequence = (await submitted(pool)).sequence
        pool.epoch = 7
        await pool.say_state(pool.state(reason="seven"))
        async with asyncio.timeout(5):
            while (await client.get("/molink/status")).json()["reason"] != "seven":
                await pool.bus.flush()
        await say_in_epoch(pool, 6, event(pool, sequence, 0, "x"))
        await say_in_epoch(pool, 7, event(pool, sequence, 0, "a"), event(pool, sequence, 1, ""))
        assert await content_of(asking) == "a"


async def test_what_was_said_while_the_gateway_had_no_broker(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The broker restarts while streams run; meanwhile the scheduler gets further than the gateway has heard."""
    folder = tmp_path_factory.mktemp("nats")
    server = start_nats(folder)
    is_back = asyncio.Event()
    try:
        async with (
            open_bus(BusSettings(url=server.url), name="test", on_reconnect=is_back.set) as bus,
            silent_pool(bus, tmp_path) as pool,
            ready_gateway(server) as client,
        ):
            whole = asyncio.create_task(client.post(CHAT, json=BODY))
            first = (await submitted(pool)).sequence
            async with client.stream("POST", CHAT, json=STREAM, headers=RESUMABLE) as response:
                second = (await submitted(pool)).sequence
                for sequence in (first, second):
                    await pool.say_step([event(pool, sequence, 0, "a")])
                await bus.flush()
                server.stop()
                for sequence in (first, second):
                    for index, text in enumerate(["b", "c", ""], 1):
                        pool.keep(event(pool, sequence, index, text))
                server = start_nats(folder, server.port)
                await asyncio.wait_for(is_back.wait(), 10)
                assert await content_of(whole) == "abc"
                lines = (await response.aread()).decode().splitlines()
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "abc"
            asking = asyncio.create_task(until_healthy(client))
            while not asking.done():  # what is said before the gateway is back is said to nobody
                await pool.say_state(pool.state())
                await asyncio.wait({asking}, timeout=0.1)
    finally:
        server.stop()
