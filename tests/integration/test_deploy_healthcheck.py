"""What the containers' health checks see, against a real broker and a real HTTP server."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType

import pytest

from molink.embedded import EmbeddedServer, free_port
from molink_common import subjects
from molink_common.bus import BusSettings, NatsBus, serve
from molink_common.errors import BusUnavailable, NobodyListens, SettingsError
from molink_common.identity import new_peer_id
from molink_common.messages import AskState, ClusterState

ROOT = Path(__file__).resolve().parents[2]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deploy_healthcheck", ROOT / "deploy" / "healthcheck.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


healthcheck = _load()


class _NotReady(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def gateway_port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), _NotReady)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_gateway_that_is_not_ready_is_alive(gateway_port: int) -> None:
    assert healthcheck.check_gateway(gateway_port) == "HTTP 503"


def test_a_gateway_that_does_not_listen_is_not() -> None:
    with pytest.raises(healthcheck.Unhealthy, match="no HTTP answer"):
        healthcheck.check_gateway(free_port())


async def test_a_scheduler_that_answers_is_alive_whatever_it_says(bus: NatsBus, nats_server: EmbeddedServer) -> None:
    async def answer(_question: AskState) -> ClusterState:
        return ClusterState(ready=False, reason="no worker yet")

    subscription = await serve(bus, subjects.STATUS, answer, AskState)
    await bus.flush()
    assert await healthcheck.check_scheduler(BusSettings(url=nats_server.url)) == "no worker yet"
    await subscription.close()


async def test_no_scheduler_is_known_at_once(nats_server: EmbeddedServer) -> None:
    with pytest.raises(NobodyListens):
        await healthcheck.check_scheduler(BusSettings(url=nats_server.url))


async def test_only_the_heartbeat_of_this_host_counts(
    bus: NatsBus, nats_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "5c0ffee5c0ff")
    own = subjects.heartbeat(new_peer_id("worker"))
    monkeypatch.setattr("socket.gethostname", lambda: "badbadbadbad")
    other = subjects.heartbeat(new_peer_id("worker"))

    async def beat(subject: str) -> None:
        while True:
            await bus.publish(subject, b"")
            await asyncio.sleep(0.02)

    settings = BusSettings(url=nats_server.url)
    beats = asyncio.create_task(beat(other))
    with pytest.raises(healthcheck.Unhealthy, match="no heartbeat"):
        await healthcheck.check_worker(settings, "5c0ffee5c0ff", timeout_s=0.3)
    beats.cancel()
    beats = asyncio.create_task(beat(own))
    assert await healthcheck.check_worker(settings, "5c0ffee5c0ff") == own
    beats.cancel()


async def test_no_broker_is_unhealthy_within_the_time() -> None:
    settings = BusSettings(url=f"nats://127.0.0.1:{free_port()}", connect_timeout_s=0.2)
    with pytest.raises(BusUnavailable):
        await healthcheck.check_scheduler(settings)


def test_settings_of_the_service_itself_do_not_disturb() -> None:
    settings = healthcheck.bus_settings_of(
        {"MOLINK_NATS_URL": "nats://broker:4222", "MOLINK_REDIS_URL": "redis://store", "MOLINK_SITE": "here"}
    )
    assert settings.url == "nats://broker:4222"


def test_a_wrong_shared_setting_is_named() -> None:
    with pytest.raises(SettingsError, match="MOLINK_LOG_LEVEL"):
        healthcheck.bus_settings_of({"MOLINK_LOG_LEVEL": "loud"})
