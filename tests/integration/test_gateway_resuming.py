"""Streams that are cut off and taken up again, at the same gateway or at another one."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from molink.embedded import EmbeddedServer
from molink_common.bus import NatsBus
from molink_common.messages import FinishReason, SubmitSequence
from molink_gateway.resume_state import decode_resume_state
from tests.integration.test_gateway_pool import FakePool, ready_gateway, silent_pool, submitted

CHAT = "/v1/chat/completions"
TEXT = "The capital of France is Paris. Hello wörld, 日本語 and 😀!"
BODY: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": "Hello"}],
    "stream": True,
    "stream_options": {"include_usage": True},
}
RESUMABLE = {"X-MoLink-Resumable": "1"}
END = 2


@dataclass(frozen=True, slots=True)
class Event:
    id: str | None
    data: str

    @property
    def content(self) -> str:
        choices = {} if self.data == "[DONE]" else json.loads(self.data).get("choices", [])
        return str(choices[0].get("delta", choices[0]).get("content", choices[0].get("text", ""))) if choices else ""


def events_of(body: str) -> list[Event]:
    """As the specification has it: fields until an empty line; comments are left out."""
    events = []
    for block in body.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if "data" in fields:
            events.append(Event(fields.get("id"), fields["data"]))
    return events


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.content for event in events)


def token_ids_of(events: Sequence[Event]) -> list[int]:
    choices = [choice for event in events[:-1] for choice in json.loads(event.data)["choices"]]
    return [token for choice in choices for token in choice.get("token_ids", [])]


def head_of(event: Event) -> list[Any]:
    chunk = json.loads(event.data)
    return [chunk[name] for name in ("id", "created", "model", "object", "system_fingerprint")]


@pytest.fixture
async def pool(bus: NatsBus, tmp_path: Path) -> AsyncIterator[FakePool]:
    async with silent_pool(bus, tmp_path) as pool:
        yield pool


@pytest.fixture
async def one(pool: FakePool, nats_server: EmbeddedServer) -> AsyncIterator[httpx.AsyncClient]:
    async with ready_gateway(nats_server, gateway_id="one") as client:
        yield client


@pytest.fixture
async def other(pool: FakePool, nats_server: EmbeddedServer) -> AsyncIterator[httpx.AsyncClient]:
    async with ready_gateway(nats_server, gateway_id="other") as client:
        yield client


def tokens_of(pool: FakePool, text: str = TEXT) -> list[int]:
    return [*pool.tokenizer.encode(text).ids, END]


async def say(pool: FakePool, sequence: str, tokens: Sequence[int], first: int, last: int) -> None:
    """The tokens from `first` to before `last`, one a step."""
    for index in range(first, last):
        finish = FinishReason.STOP if tokens[index] == END else None
        await pool.say(sequence, index, tokens[index], finish)


class Client:
    """Reads a stream event by event, as long as it likes."""

    def __init__(self, response: httpx.Response) -> None:
        self._chunks = response.aiter_text()
        self.events: list[Event] = []
        self._rest = ""

    async def read_until(self, text: str) -> None:
        """Until the answer's text is at least this."""
        async with asyncio.timeout(5):
            while not text_of(self.events).startswith(text):
                self._rest += await anext(self._chunks)
                whole, _, self._rest = self._rest.rpartition("\n\n")
                self.events += events_of(whole)

    async def read_all(self) -> None:
        async with asyncio.timeout(10):
            self.events += events_of(self._rest + "".join([chunk async for chunk in self._chunks]))


async def whole(client: httpx.AsyncClient, event_id: str, path: str = CHAT) -> list[Event]:
    response = await client.post(path, headers={"Last-Event-ID": event_id})
    assert response.status_code == 200, response.text
    return events_of(response.text)


async def whole_stream(pool: FakePool, client: httpx.AsyncClient, body: dict[str, Any], path: str) -> list[Event]:
    """A stream to its end, token by token, so that every token that shows text has an event of its own."""
    tokens = tokens_of(pool)
    async with client.stream("POST", path, json=body, headers=RESUMABLE) as response:
        reading = Client(response)
        sequence = (await submitted(pool)).sequence
        assert response.headers["x-molink-stream"] == sequence
        for index in range(len(tokens) - 1):
            await say(pool, sequence, tokens, index, index + 1)
            shown = pool.tokenizer.decode(tokens[: index + 1])
            if not body.get("stop") and not shown.endswith("\ufffd"):
                await reading.read_until(body.get("prompt", "") * bool(body.get("echo")) + shown)
        await say(pool, sequence, tokens, len(tokens) - 1, len(tokens))
        await reading.read_all()
    return reading.events


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, BODY),
        (CHAT, {**BODY, "stop": ["Hello wörld, 日"]}),
        (CHAT, {**BODY, "stop": ["nowhere", " and 😀?"], "stream_options": None}),
        (CHAT, {**BODY, "return_token_ids": True, "stream_options": {**BODY["stream_options"]}}),
        (
            "/v1/completions",
            {"model": "demo", "prompt": "Hello", "stream": True, "echo": True, "max_tokens": 200},
        ),
    ],
)
async def test_from_every_event_on_any_gateway_tells_the_same_rest(
    pool: FakePool, one: httpx.AsyncClient, other: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    told = await whole_stream(pool, one, body, path)
    assert told[-1].data == "[DONE]"
    assert all(event.id is not None for event in told[:-1])
    assert len({event.id for event in told}) == len(told)
    if not body.get("stop"):
        assert len(told) > 20
    for place, event in enumerate(told[:-1]):
        assert event.id is not None
        rest, untold = await whole(other, event.id, path), told[place + 1 :]
        assert text_of(rest) == text_of(untold)
        assert token_ids_of(rest) == token_ids_of(untold)
        for what in ('"finish_reason":"', '"choices":[]'):
            assert [one for one in rest if what in one.data] == [one for one in untold if what in one.data]
        assert rest[-1].data == "[DONE]"
        assert all(head_of(one) == head_of(told[0]) for one in rest[:-1])


async def test_a_client_that_comes_back_while_the_sequence_runs(
    pool: FakePool, one: httpx.AsyncClient, other: httpx.AsyncClient
) -> None:
    tokens = tokens_of(pool)
    async with one.stream("POST", CHAT, json=BODY, headers=RESUMABLE) as response:
        before = Client(response)
        submit = await submitted(pool)
        await say(pool, submit.sequence, tokens, 0, 6)
        await before.read_until(pool.tokenizer.decode(tokens[:6]))
    # the client has gone, the pipeline goes on
    await say(pool, submit.sequence, tokens, 6, 12)
    last = before.events[-1].id
    assert last == f"{submit.sequence}.6"
    asking = asyncio.create_task(whole(other, last))
    assert (await asyncio.wait_for(pool.resumed.get(), 5)).gateway == "other"
    await say(pool, submit.sequence, tokens, 12, len(tokens))
    rest = await asking
    assert text_of(before.events) + text_of(rest) == TEXT
    usage = json.loads(rest[-2].data)["usage"]
    assert usage["completion_tokens"] == len(tokens)
    assert usage["prompt_tokens"] == len(submit.prompt)
    assert pool.cancelled.empty()


async def test_the_whole_stream_by_its_address(
    pool: FakePool, one: httpx.AsyncClient, other: httpx.AsyncClient
) -> None:
    told = await whole_stream(pool, one, BODY, CHAT)
    sequence, number, *_ = (told[3].id or "").split(".")
    response = await other.get(f"/v1/streams/{sequence}")
    again = events_of(response.text)
    assert json.loads(again[0].data)["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(again) == TEXT
    assert response.headers["x-molink-stream"] == sequence
    response = await other.get(f"/v1/streams/{sequence}", headers={"Last-Event-ID": f"{sequence}.{number}"})
    assert text_of(events_of(response.text)) == text_of(told[4:])


async def test_a_stop_string_that_came_while_nobody_read(
    pool: FakePool, one: httpx.AsyncClient, other: httpx.AsyncClient
) -> None:
    tokens = tokens_of(pool)
    body = {**BODY, "stop": ["Paris. He"]}
    async with one.stream("POST", CHAT, json=body, headers=RESUMABLE) as response:
        reading = Client(response)
        submit = await submitted(pool)
        await say(pool, submit.sequence, tokens, 0, 2)
        await reading.read_until(pool.tokenizer.decode(tokens[:2]))
    await say(pool, submit.sequence, tokens, 2, len(tokens) - 1)
    rest = await whole(other, reading.events[-1].id or "")
    assert text_of(reading.events) + text_of(rest) == "The capital of France is "
    assert json.loads(rest[-3].data)["choices"][0]["finish_reason"] == "stop"
    assert await asyncio.wait_for(pool.cancelled.get(), 5) == submit.sequence


async def test_the_newest_connection_wins(pool: FakePool, one: httpx.AsyncClient, other: httpx.AsyncClient) -> None:
    tokens = tokens_of(pool)
    async with contextlib.AsyncExitStack() as stack:
        first = Client(await stack.enter_async_context(one.stream("POST", CHAT, json=BODY, headers=RESUMABLE)))
        submit = await submitted(pool)
        await say(pool, submit.sequence, tokens, 0, 3)
        await first.read_until(pool.tokenizer.decode(tokens[:3]))
        readers = [first]
        for client in (other, other, one):  # elsewhere, there again, and back
            headers = {"Last-Event-ID": readers[-1].events[-1].id or ""}
            response = await stack.enter_async_context(client.stream("POST", CHAT, headers=headers))
            assert response.status_code == 200
            await readers[-1].read_all()
            assert json.loads(readers[-1].events[-1].data)["error"]["code"] == "taken_up"
            readers[-1].events.pop()
            said = 3 * len(readers)
            readers.append(Client(response))
            await say(pool, submit.sequence, tokens, said, said + 3)
            new = pool.tokenizer.decode(tokens[: said + 3]).removeprefix(pool.tokenizer.decode(tokens[:said]))
            await readers[-1].read_until(new)
        await say(pool, submit.sequence, tokens, 12, len(tokens))
        await readers[-1].read_all()
        assert "".join(text_of(reader.events) for reader in readers) == TEXT
        assert readers[-1].events[-1].data == "[DONE]"
    assert pool.cancelled.empty()


async def test_a_gateway_that_stops_leaves_the_stream_to_others(
    pool: FakePool, nats_server: EmbeddedServer, other: httpx.AsyncClient
) -> None:
    tokens = tokens_of(pool)
    async with contextlib.AsyncExitStack() as stack:
        async with ready_gateway(nats_server) as client:
            outer = await stack.enter_async_context(httpx.AsyncClient(base_url=client.base_url, timeout=20))
            response = await stack.enter_async_context(outer.stream("POST", CHAT, json=BODY, headers=RESUMABLE))
            reading = Client(response)
            submit = await submitted(pool)
            await say(pool, submit.sequence, tokens, 0, 5)
            await reading.read_until(pool.tokenizer.decode(tokens[:5]))
        await reading.read_all()
    error = reading.events.pop()
    assert json.loads(error.data)["error"]["code"] == "stopping"
    asking = asyncio.create_task(whole(other, reading.events[-1].id or ""))
    await say(pool, submit.sequence, tokens, 5, len(tokens))
    assert text_of(reading.events) + text_of(await asking) == TEXT
    assert pool.cancelled.empty()


async def test_only_streams_that_ask_for_it_outlive_their_client(
    pool: FakePool, one: httpx.AsyncClient, other: httpx.AsyncClient
) -> None:
    tokens = tokens_of(pool)
    asked: list[tuple[dict[str, Any], dict[str, str]]] = [
        (BODY, {}),
        ({**BODY, "n": 2}, RESUMABLE),
        ({**BODY, "logprobs": True}, RESUMABLE),
    ]

    async def say_one(submit: SubmitSequence) -> None:
        await pool.say(submit.sequence, 0, tokens[0], logprob=-0.5)

    pool.answer = say_one
    for body, headers in asked:
        async with one.stream("POST", CHAT, json=body, headers=headers) as response:
            await Client(response).read_until("T")
            assert "x-molink-stream" not in response.headers
        submits = [await submitted(pool) for _ in range(body.get("n", 1))]
        assert [submit.resume_state for submit in submits] == [None] * len(submits)
        cancelled = {await asyncio.wait_for(pool.cancelled.get(), 5) for _ in submits}
        assert cancelled == {submit.sequence for submit in submits}
        response = await other.post(CHAT, headers={"Last-Event-ID": f"{submits[0].sequence}.1"})
        assert response.status_code == 404
        assert "X-MoLink-Resumable" in response.json()["error"]["message"]


async def test_every_stream_can_be_made_resumable(pool: FakePool, nats_server: EmbeddedServer) -> None:
    async with ready_gateway(nats_server, resumable_streams=True) as client:
        async with client.stream("POST", CHAT, json={**BODY, "stop": ["x", "y"]}):
            submit = await submitted(pool)
        state = decode_resume_state(submit.resume_state or "")
        assert (state.style.stop, state.has_usage, state.model) == (("x", "y"), True, "demo")
        asking = asyncio.create_task(client.post(CHAT, json={**BODY, "stream": False, "stream_options": None}))
        submit = await submitted(pool)
        assert submit.resume_state is None
        await pool.say(submit.sequence, 0, END, FinishReason.STOP)
        assert (await asking).status_code == 200


async def test_the_usual_client_reads_ids_and_comments(pool: FakePool, nats_server: EmbeddedServer) -> None:
    tokens = tokens_of(pool)
    async with (
        ready_gateway(nats_server, sign_of_life_s=0.05) as http,
        openai.AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Hello"}], stream=True, extra_headers=RESUMABLE
        )
        submit = await submitted(pool)
        await say(pool, submit.sequence, tokens, 0, 4)
        reader = aiter(stream)
        text = ""
        while text != pool.tokenizer.decode(tokens[:4]):
            text += (await anext(reader)).choices[0].delta.content or ""
        following = asyncio.ensure_future(anext(reader))
        # comments come in the meantime, and must not be taken for events
        done, _ = await asyncio.wait({following}, timeout=0.3)
        assert not done
        await say(pool, submit.sequence, tokens, 4, len(tokens))
        text += (await following).choices[0].delta.content or ""
        async for chunk in reader:
            text += chunk.choices[0].delta.content or ""
    assert text == TEXT


async def test_a_stream_that_waits_says_so_seldom(pool: FakePool, nats_server: EmbeddedServer) -> None:
    tokens = tokens_of(pool)
    async with (
        ready_gateway(nats_server, sign_of_life_s=0.2) as client,
        client.stream("POST", CHAT, json=BODY, headers=RESUMABLE) as response,
    ):
        submit = await submitted(pool)
        chunks = response.aiter_text()
        raw = ""
        began_s = asyncio.get_running_loop().time()
        async with asyncio.timeout(5):
            while raw.count(": waiting\n") < 3:
                raw += await anext(chunks)
        assert asyncio.get_running_loop().time() - began_s >= 0.5
        await say(pool, submit.sequence, tokens, 0, len(tokens))
        raw += "".join([chunk async for chunk in chunks])
    assert text_of(events_of(raw)) == TEXT
