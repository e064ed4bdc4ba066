"""API keys from end to end: the command line, a scheduler with its Redis, gateways; only the worker is a fake."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from redis.asyncio import Redis
from typer.testing import CliRunner

from molink.app import app
from molink.embedded import EmbeddedServer, free_port, start_nats
from molink_common import subjects
from molink_common.bus import BusSettings, NatsBus, open_bus, serve
from molink_common.messages import (
    ClusterState,
    FetchFile,
    FinishReason,
    Heartbeat,
    Message,
    ModelCard,
    StartSequence,
)
from molink_scheduler.settings import SchedulerSettings
from tests.integration.scheduler_stand import FakeWorker, Stand
from tests.integration.test_gateway_pool import FakePool, make_card, make_tokenizer, ready_gateway, running_gateway

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
CHAT = {"model": "demo", "messages": HELLO, "max_tokens": 4}
ANSWER = (30, 31, 32)


class AnsweringWorker(FakeWorker):
    """One stage that is the whole model: it answers with three tokens, or with one and then nothing."""

    def __init__(self, bus: NatsBus, name: str, card: ModelCard) -> None:
        super().__init__(bus, name)
        self._card = card
        self.is_hanging = False

    def heartbeat(self) -> Heartbeat:
        return super().heartbeat().model_copy(update={"card": self._card})

    async def _head(self, message: Message) -> Message:
        answer = await super()._head(message)
        if isinstance(message, StartSequence):
            for index, token in enumerate(ANSWER[:1] if self.is_hanging else ANSWER):
                finish = FinishReason.STOP if index == len(ANSWER) - 1 else None
                await self.speak(message.sequence, index, token, finish)
        return answer


class KeyStand(Stand):
    """A pool with one worker, and a command line."""

    worker: AnsweringWorker
    nats: EmbeddedServer

    async def molink(self, *arguments: str) -> str:
        """What `molink keys …` prints on standard output."""
        code, output, problem = await self.try_molink(*arguments)
        assert code == 0, problem
        return output

    async def try_molink(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output, and what went wrong."""
        flags = [*arguments, "--nats-url", self.nats.url]
        result = await asyncio.to_thread(CliRunner().invoke, app, ["keys", *flags], None, {"COLUMNS": "200"})
        return result.exit_code, result.stdout, str(result.exception or "")

    async def add_key(self, name: str, *flags: str) -> str:
        """The secret."""
        return (await self.molink("add", name, *flags)).strip()


@pytest.fixture
async def stand(tmp_path: Path, redis_server: EmbeddedServer) -> AsyncIterator[KeyStand]:
    for name in ("nats", "model"):
        (tmp_path / name).mkdir()
    nats = start_nats(tmp_path / "nats", free_port())
    settings = SchedulerSettings(
        nats_url=nats.url, redis_url=redis_server.url, stages=1, settle_s=0, stage_overhead_bytes=0
    )
    try:
        async with (
            Redis.from_url(redis_server.url) as redis,
            open_bus(BusSettings(url=nats.url), name="test") as bus,
            asyncio.TaskGroup() as tasks,
        ):
            await redis.flushdb()
            stand = KeyStand(bus, redis, settings, tasks)
            stand.nats = nats
            tokenizer = make_tokenizer(tmp_path / "model")
            card = make_card(tmp_path / "model", tokenizer.get_vocab_size())
            files = FakePool(bus, tmp_path / "model", tokenizer, card)
            stand.worker = AnsweringWorker(bus, "w1", card)
            async with contextlib.AsyncExitStack() as stack:
                for subscription in (
                    await serve(bus, subjects.STATE, stand.hear_state, ClusterState),
                    await serve(bus, subjects.files("w1"), files._file, FetchFile),
                ):
                    stack.push_async_callback(subscription.close)
                running = tasks.create_task(stand.worker.run())
                yield stand
                running.cancel()
                for task in tasks._tasks:
                    task.cancel()
    finally:
        nats.stop()


@pytest.fixture
async def scheduler(stand: KeyStand) -> asyncio.Event:
    """It runs until this is set."""
    stop, _ = stand.start_scheduler()
    await stand.until_state(lambda state: state.ready)
    return stop


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


async def until_keys_are_known(client: httpx.AsyncClient) -> None:
    """Until who comes without one is sent away."""
    async with asyncio.timeout(2):
        while (await client.get("/v1/models")).status_code != 401:  # noqa: ASYNC110  HTTP has no way to be told
            await asyncio.sleep(0.02)


async def until_let_in(client: httpx.AsyncClient, secret: str) -> None:
    """Until the gateway knows this key, which was added while it ran."""
    async with asyncio.timeout(2):
        while (await client.get("/v1/models", headers=bearer(secret))).status_code != 200:  # noqa: ASYNC110  as above
            await asyncio.sleep(0.02)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


async def test_without_a_scheduler_nobody_is_let_in(nats_server: EmbeddedServer) -> None:
    async with running_gateway(nats_server) as client:
        answer = await client.get("/v1/models")
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert (await client.get("/version")).status_code == 200


@pytest.mark.usefixtures("scheduler")
async def test_without_keys_a_gateway_answers_its_own_machine_alone(stand: KeyStand) -> None:
    async with (
        ready_gateway(stand.nats) as here,
        ready_gateway(stand.nats, host="0.0.0.0") as everywhere,
        ready_gateway(stand.nats, host="0.0.0.0", require_keys="once-added") as told_so,
        ready_gateway(stand.nats, require_keys="always") as strict,
    ):
        for client in (here, told_so):
            answer = await client.post("/v1/chat/completions", json=CHAT, headers=bearer("unused"))
            assert answer.status_code == 200, answer.text
            refused = await client.post("/v1/chat/completions", json=CHAT, headers=bearer("sk-molink-mistyped"))
            assert refused.status_code == 401, "what was meant as a key is not taken for none"
        for client in (everywhere, strict):
            refused = await client.post("/v1/chat/completions", json=CHAT)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
            assert "molink keys add" in error_of(refused)["message"]
            assert (await client.get("/molink/status")).status_code == 401
            for path in ("/health", "/version"):
                assert (await client.get(path)).status_code == 200
        secret = await stand.add_key("alice")
        for client in (here, told_so):
            await until_keys_are_known(client)
        for client in (here, everywhere, told_so, strict):
            await until_let_in(client, secret)
            answer = await client.post("/v1/chat/completions", json=CHAT, headers=bearer(secret))
            assert answer.status_code == 200, answer.text


@pytest.mark.usefixtures("scheduler")
async def test_a_key_lets_in_until_it_is_revoked(stand: KeyStand, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="molink")
    secret = await stand.add_key("alice")
    async with ready_gateway(stand.nats) as client:
        for headers in ({}, bearer("sk-molink-no"), bearer("sk-other"), {"authorization": f"Basic {secret}"}):
            refused = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert refused.status_code == 401
            assert error_of(refused)["code"] == "invalid_api_key"
            assert error_of(refused)["type"] == "authentication_error"
            assert refused.headers["www-authenticate"] == "Bearer"
            assert refused.headers["x-request-id"]
        for headers in (bearer(secret), {"authorization": f"bearer  {secret}"}, {"x-api-key": secret}):
            answer = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert answer.status_code == 200, answer.text
        table = await stand.molink("list")
        assert "alice" in table
        assert secret not in table
        (started, *_) = stand.worker.starts
        assert started.tenant in table, "the head knows whose it is"
        stand.worker.is_hanging = True
        usual = openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key=secret, max_retries=0)
        stream = await usual.chat.completions.create(model="demo", messages=HELLO, stream=True)
        assert (await anext(aiter(stream))).choices
        assert "revoked alice" in await stand.molink("revoke", "alice")
        revoked_s = time.perf_counter()
        with pytest.raises(openai.APIError, match="revoked"):
            async for _ in stream:
                pass
        while (await client.get("/v1/models", headers=bearer(secret))).status_code != 401:
            assert time.perf_counter() - revoked_s < 2
        with pytest.raises(openai.AuthenticationError, match="revoked"):
            await usual.models.list()
        assert (await client.get("/v1/models")).status_code == 401, "the door stays closed"
        await usual.close()
    told = [str(record.__dict__) for record in caplog.records]
    assert any(started.tenant in line for line in told), "logs say whose a request was"
    assert not any(secret in line or "sk-molink-no" in line for line in told), "and never by which secret"


@pytest.mark.usefixtures("scheduler")
async def test_limits_are_answered_with_a_time_to_come_back(stand: KeyStand) -> None:
    async with ready_gateway(stand.nats) as client:

        async def ask(secret: str, **fields: object) -> httpx.Response:
            return await client.post("/v1/chat/completions", json={**CHAT, **fields}, headers=bearer(secret))

        rare = await stand.add_key("rare", "--requests-per-minute", "2")
        await until_let_in(client, rare)
        assert [(await ask(rare, n=2)).status_code, (await ask(rare)).status_code] == [200, 200]
        refused = await ask(rare)
        assert refused.status_code == 429
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert 25 <= int(refused.headers["retry-after"]) <= 30

        short = await stand.add_key("short", "--tokens-per-day", "5")
        await until_let_in(client, short)
        answers = [await ask(short), await ask(short)]
        assert [answer.status_code for answer in answers] == [200, 429]
        assert error_of(answers[1])["code"] == "insufficient_quota"
        assert 1 <= int(answers[1].headers["retry-after"]) <= 86400
        used = answers[0].json()["usage"]["total_tokens"]
        assert f" {used} " in await stand.molink("list")

        single = await stand.add_key("single", "--concurrent", "1")
        await until_let_in(client, single)
        stand.worker.is_hanging = True
        async with client.stream(
            "POST", "/v1/chat/completions", json={**CHAT, "stream": True}, headers=bearer(single)
        ) as stream:
            assert stream.status_code == 200
            refused = await ask(single)
            assert refused.status_code == 429
            assert "retry-after" in refused.headers
        stand.worker.is_hanging = False
        async with asyncio.timeout(5):
            while (await ask(single)).status_code != 200:
                pass


async def test_the_next_scheduler_has_the_same_keys(stand: KeyStand, scheduler: asyncio.Event) -> None:
    secret = await stand.add_key("alice", "--tokens-per-day", "5")
    gone = await stand.add_key("bob")
    await stand.molink("revoke", "bob")
    async with ready_gateway(stand.nats) as client:
        first = await client.post("/v1/chat/completions", json=CHAT, headers=bearer(secret))
        assert first.status_code == 200, first.text
    used = first.json()["usage"]["total_tokens"]
    async with asyncio.timeout(5):
        while not await stand.redis.hlen("molink:v1:usage"):  # type: ignore[misc]  # noqa: ASYNC110  nobody is told
            await asyncio.sleep(0.02)
    stored = await stand.redis.hgetall("molink:v1:keys")  # type: ignore[misc]
    assert len(stored) == 2
    assert not any(secret.encode() in value for value in stored.values())
    stand.start_scheduler()
    scheduler.set()
    async with ready_gateway(stand.nats) as client:
        assert (await client.get("/v1/models", headers=bearer(secret))).status_code == 200
        assert (await client.get("/v1/models", headers=bearer(gone))).status_code == 401
        async with asyncio.timeout(5):
            while True:
                answer = await client.post("/v1/chat/completions", json=CHAT, headers=bearer(secret))
                if answer.status_code != 503:  # nobody is active at the moment
                    break
        assert (answer.status_code, error_of(answer)["code"]) == (429, "insufficient_quota")
        assert f" {used} " in await stand.molink("list")


@pytest.mark.usefixtures("scheduler")
async def test_the_command_line_says_what_was_wrong(stand: KeyStand) -> None:
    await stand.add_key("alice")
    for arguments, words in (
        (("add", "alice"), "name"),
        (("add", "a/b"), "letters"),
        (("revoke", "carol"), "valid keys: alice"),
    ):
        code, output, problem = await stand.try_molink(*arguments)
        assert code != 0
        assert words in problem
        assert output == "", "no secret of a key that is none"
    await stand.molink("revoke", "alice")
    assert "already" in (await stand.try_molink("revoke", "alice"))[2]
    assert "revoked" in await stand.molink("list")


@pytest.mark.usefixtures("scheduler")
async def test_who_may_not_ask_is_told_before_the_body_is_read(stand: KeyStand) -> None:
    async with ready_gateway(stand.nats, require_keys="always") as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\nx-request-id: mine\r\n\r\n"
        )
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 401 ")
        assert b"x-request-id: mine\r\n" in head
        writer.close()
        await writer.wait_closed()


@pytest.mark.usefixtures("scheduler")
async def test_a_browser_may_ask_from_the_pages_that_were_named(stand: KeyStand) -> None:
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    page = {"origin": "https://chat.example"}
    async with (
        ready_gateway(stand.nats, require_keys="always", cors_origins=("https://chat.example",)) as client,
        ready_gateway(stand.nats) as closed,
    ):
        allowed = await client.options("/v1/chat/completions", headers={**page, **ask})
        assert allowed.status_code == 200, "a browser asks this without a key"
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        refused = await client.post("/v1/chat/completions", json=CHAT, headers=page)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://chat.example", "the page can read why"
        assert "retry-after" in refused.headers["access-control-expose-headers"].lower()
        other = await client.options("/v1/chat/completions", headers={"origin": "https://evil.example", **ask})
        assert "access-control-allow-origin" not in other.headers
        for answer in (await closed.options("/v1/models", headers={**page, **ask}), await closed.get("/v1/models")):
            assert "access-control-allow-origin" not in answer.headers
