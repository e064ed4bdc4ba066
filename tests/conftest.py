"""Real servers for the tests that want them. A missing server is a failure, never a skip."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import settings

from molink.embedded import EmbeddedServer, start_nats, start_redis
from molink_common.bus import BusSettings, NatsBus, open_bus

# `make test` draws the same examples everywhere, so that what fails was broken by the change; `make test-deep` draws
# new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("new", derandomize=False, print_blob=True)
settings.load_profile("same")


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    server = start_nats(tmp_path_factory.mktemp("nats"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
async def bus(nats_server: EmbeddedServer) -> AsyncIterator[NatsBus]:
    async with open_bus(BusSettings(url=nats_server.url), name="test") as opened:
        yield opened
