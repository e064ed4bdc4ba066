"""A pool that answers, a gateway in front of it, and the usual client; files that need others override them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest

from molink.embedded import EmbeddedServer
from molink_common.bus import NatsBus
from tests.integration.test_gateway_pool import FakePool, fake_pool, ready_gateway


@pytest.fixture
async def pool(bus: NatsBus, tmp_path: Path) -> AsyncIterator[FakePool]:
    async with fake_pool(bus, tmp_path) as pool:
        yield pool


@pytest.fixture
async def http(pool: FakePool, nats_server: EmbeddedServer) -> AsyncIterator[httpx.AsyncClient]:
    async with ready_gateway(nats_server) as client:
        yield client


@pytest.fixture
async def client(http: httpx.AsyncClient) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client
