"""Ids and addresses of streams that lead nowhere: what the client is told."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from molink.embedded import EmbeddedServer
from molink_common.bus import NatsBus
from tests.integration.test_gateway_pool import FakePool, fake_pool, ready_gateway, submitted

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": "Hello"}],
    "stream": True,
    "stream_options": {"include_usage": True},
}
RESUMABLE = {"X-MoLink-Resumable": "1"}


@pytest.mark.parametrize(
    ("event_id", "status", "code"),
    [
        ("0" * 16 + ".3", 404, "stream_not_found"),
        ("0" * 16, 400, "invalid_event_id"),
        ("", 400, "invalid_event_id"),
        ("0" * 16 + ".-1", 400, "invalid_event_id"),
        ("0" * 16 + ".1.rest", 400, "invalid_event_id"),
        ("x" * 5000, 400, "invalid_event_id"),
    ],
)
async def test_ids_that_lead_nowhere(
    pool: FakePool, http: httpx.AsyncClient, event_id: str, status: int, code: str
) -> None:
    response = await http.post(CHAT, headers={"Last-Event-ID": event_id}, json=BODY)
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["code"], set(error)) == (code, {"message", "type", "param", "code"})


async def test_addresses_that_lead_nowhere(pool: FakePool, http: httpx.AsyncClient) -> None:
    assert (await http.get(f"/v1/streams/{'0' * 16}")).status_code == 404
    assert (await http.get("/v1/streams/last")).status_code == 400
    headers = {"Last-Event-ID": "1" * 16 + ".3"}
    assert (await http.get(f"/v1/streams/{'0' * 16}", headers=headers)).status_code == 400


async def test_what_another_version_has_kept_is_not_guessed(pool: FakePool, http: httpx.AsyncClient) -> None:
    async with http.stream("POST", CHAT, json=BODY, headers=RESUMABLE):
        submit = await submitted(pool)
    for state, status in (('{"version": 9}', 500), ("", 500), ("{", 500), (None, 404)):
        pool.books[submit.sequence] = submit.model_copy(update={"resume_state": state})
        response = await http.get(f"/v1/streams/{submit.sequence}")
        assert response.status_code == status


async def test_without_a_scheduler_it_can_be_tried_again(
    bus: NatsBus, nats_server: EmbeddedServer, tmp_path: Path
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with fake_pool(bus, tmp_path):
            client = await stack.enter_async_context(ready_gateway(nats_server))
        await bus.flush()
        response = await client.post(CHAT, headers={"Last-Event-ID": "0" * 16 + ".3"})
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
