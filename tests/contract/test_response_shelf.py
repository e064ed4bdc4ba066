"""The same cases against the shelf in memory and against a real Redis; and over a real NATS."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import pytest
from redis.asyncio import Redis

from molink.embedded import EmbeddedServer, free_port
from molink_common import subjects
from molink_common.bus import NatsBus
from molink_common.messages import AskResponse, Done, DropResponse, Failed, KeepResponse, KeptResponse
from molink_scheduler.response_shelf import (
    EXPIRY_S,
    MemoryShelf,
    RedisShelf,
    ResponseShelf,
    keeping_responses,
    open_response_shelf,
)

FIRST, SECOND, THIRD = (f"resp_{digit * 32}" for digit in "123")
OpenShelf = Callable[..., AbstractAsyncContextManager[ResponseShelf]]


@pytest.fixture(params=["memory", "redis"])
async def open_shelf(request: pytest.FixtureRequest, redis_server: EmbeddedServer) -> OpenShelf:
    @contextlib.asynccontextmanager
    async def opened(max_bytes: int = 1000, max_responses: int = 10) -> AsyncIterator[ResponseShelf]:
        if request.param == "memory":
            yield MemoryShelf(max_bytes=max_bytes, max_responses=max_responses)
            return
        client = Redis.from_url(redis_server.url)
        await client.flushdb()
        await client.aclose()
        async with open_response_shelf(redis_server.url, max_bytes=max_bytes, max_responses=max_responses) as shelf:
            yield shelf

    return opened


async def test_what_is_kept_is_there_for_its_tenant_alone(open_shelf: OpenShelf) -> None:
    async with open_shelf() as shelf:
        await shelf.keep("anna", FIRST, '{"text": "日本語"}')
        assert await shelf.fetch("anna", FIRST) == '{"text": "日本語"}'
        assert await shelf.fetch("", FIRST) is None
        assert await shelf.fetch("anna", SECOND) is None


async def test_what_is_dropped_is_gone_and_dropping_again_is_harmless(open_shelf: OpenShelf) -> None:
    async with open_shelf() as shelf:
        await shelf.keep("", FIRST, "x")
        await shelf.drop("", FIRST)
        await shelf.drop("", FIRST)
        assert await shelf.fetch("", FIRST) is None


async def test_the_oldest_go_when_there_are_too_many(open_shelf: OpenShelf) -> None:
    async with open_shelf(max_responses=2) as shelf:
        for name in (FIRST, SECOND, THIRD):
            await shelf.keep("", name, "x")
        assert [await shelf.fetch("", name) for name in (FIRST, SECOND, THIRD)] == [None, "x", "x"]


async def test_the_oldest_go_when_they_are_too_large_together(open_shelf: OpenShelf) -> None:
    async with open_shelf(max_bytes=100) as shelf:
        for name in (FIRST, SECOND, THIRD):
            await shelf.keep("", name, "日" * 15)  # 45 bytes
        assert [await shelf.fetch("", name) is None for name in (FIRST, SECOND, THIRD)] == [True, False, False]


async def test_keeping_one_again_takes_no_more_room(open_shelf: OpenShelf) -> None:
    async with open_shelf(max_bytes=100) as shelf:
        for _ in range(5):
            await shelf.keep("", FIRST, "x" * 45)
        await shelf.keep("", SECOND, "x" * 45)
        assert await shelf.fetch("", FIRST) is not None


async def test_what_is_kept_expires(redis_server: EmbeddedServer) -> None:
    async with open_response_shelf(redis_server.url) as shelf:
        assert isinstance(shelf, RedisShelf)
        await shelf.keep("anna", FIRST, "x")
        client = Redis.from_url(redis_server.url)
        try:
            assert 0 < await client.ttl(f"molink:v1:response:anna:{FIRST}") <= EXPIRY_S
            assert 0 < await client.ttl("molink:v1:responses") <= 2 * EXPIRY_S
        finally:
            await client.aclose()


async def test_gateways_keep_ask_and_drop_over_the_bus(bus: NatsBus) -> None:
    async with keeping_responses(bus, MemoryShelf()):
        keep = KeepResponse(tenant="anna", response=FIRST, body="{}")
        await bus.ask(subjects.RESPONSES, keep, Done, timeout_s=5)
        ask = AskResponse(tenant="anna", response=FIRST)
        assert (await bus.ask(subjects.RESPONSES, ask, KeptResponse, timeout_s=5)).body == "{}"
        await bus.ask(subjects.RESPONSES, DropResponse(tenant="anna", response=FIRST), Done, timeout_s=5)
        assert (await bus.ask(subjects.RESPONSES, ask, KeptResponse, timeout_s=5)).body is None


async def test_without_redis_the_answer_is_a_failure_in_words(bus: NatsBus) -> None:
    async with (
        open_response_shelf(f"redis://127.0.0.1:{free_port()}/0") as shelf,
        keeping_responses(bus, shelf),
    ):
        failed = await bus.ask(subjects.RESPONSES, AskResponse(response=FIRST), KeptResponse, Failed, timeout_s=5)
    assert failed == Failed(message="Redis is away")
