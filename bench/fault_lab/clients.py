"""Clients that stream one answer after the other, and note what they saw."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from bench.fault_lab.judging import LONGEST_GAP_S, Stream
from bench.fault_lab.prompts import Prompt

_REFUSED_FOR_S = 180.0
"""A request that nobody accepts for so long counts as cut."""
_LONGEST_RETRY_S = 5.0
_CONNECT_TIMEOUT_S = 5.0
_RECONNECT_S = 0.2
_RESUMES = 40
_MAY_BE_REFUSED = frozenset({404, 429, 503})
"""404: a gateway that has just started knows no model yet. Any other status is a fault of the system."""


class _Refused(Exception):
    def __init__(self, what: str, retry_after_s: float) -> None:
        super().__init__(what)
        self.what, self.retry_after_s = what, retry_after_s


class _BrokenOff(Exception):
    """An accepted answer that did not come to its end."""


@dataclass(slots=True, kw_only=True)
class _Seen:
    client: int
    prompt: int
    started_s: float
    accepted_s: float | None = None
    arrivals: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    told_tokens: int | None = None
    last_event: str | None = None
    is_done: bool = False
    refusals: Counter[str] = field(default_factory=Counter)
    resumed: int = 0

    def stream(self, *, ended_s: float, problem: str | None) -> Stream:
        """As it is judged."""
        return Stream(
            prompt=self.prompt,
            client=self.client,
            started_s=self.started_s,
            accepted_s=self.accepted_s,
            ended_s=ended_s,
            arrivals=tuple(self.arrivals),
            tokens=tuple(self.tokens),
            told_tokens=self.told_tokens,
            problem=problem,
            refusals=dict(self.refusals),
            resumed=self.resumed,
        )


class Clients:
    """`streams` are those that ended in `loop`."""

    def __init__(self, ports: Sequence[int], *, model: str, resumes: bool) -> None:
        self._ports = list(ports)
        self._model = model
        self._resumes = resumes
        self._running: dict[int, _Seen] = {}
        self.streams: list[Stream] = []

    def num_flowing(self, within_s: float) -> int:
        """Streams to which a token has come a moment ago."""
        since_s = time.monotonic() - within_s
        return sum(1 for seen in self._running.values() if seen.arrivals and seen.arrivals[-1] > since_s)

    def streams_so_far(self) -> list[Stream]:
        """Those that ended, and those that have not."""
        return [*self.streams, *(seen.stream(ended_s=math.inf, problem=None) for seen in self._running.values())]

    async def loop(self, client: int, prompts: Sequence[Prompt], stop: asyncio.Event) -> None:
        """One answer after the other, beginning with a prompt of its own, until `stop`; the last one is read whole."""
        number = client
        while not stop.is_set():
            self.streams.append(await self.ask(client, prompts[number % len(prompts)]))
            number += 1

    async def ask(self, client: int, prompt: Prompt) -> Stream:
        """One answer. Refusals before it was accepted are waited out; whatever fails later is told in the result."""
        seen = _Seen(client=client, prompt=prompt.number, started_s=time.monotonic())
        self._running[client] = seen
        problem = None
        try:
            await self._ask(client, prompt, seen)
        except (_BrokenOff, _Refused) as error:
            problem = str(error)
        finally:
            del self._running[client]
        return seen.stream(ended_s=time.monotonic(), problem=problem)

    async def _ask(self, client: int, prompt: Prompt, seen: _Seen) -> None:
        body = orjson.dumps(prompt.body(self._model))
        turn = client
        while True:
            port = self._ports[turn % len(self._ports)]
            try:
                await self._attempt(port, body, seen)
            except _Refused as refused:
                seen.refusals[refused.what] += 1
                last_s = seen.arrivals[-1] if seen.arrivals else seen.started_s
                if time.monotonic() - last_s > (_REFUSED_FOR_S if seen.accepted_s is None else LONGEST_GAP_S):
                    raise
                await asyncio.sleep(min(refused.retry_after_s, _LONGEST_RETRY_S))
            except _BrokenOff:
                if not self._resumes or seen.last_event is None or seen.resumed >= _RESUMES:
                    raise
                seen.resumed += 1
            else:
                return
            turn += 1

    async def _attempt(self, port: int, body: bytes, seen: _Seen) -> None:
        try:
            async with _posted(port, body, self._headers(seen)) as (status, headers, reader):
                if status != 200:
                    raise await _refusal(status, headers, reader)
                seen.accepted_s = seen.accepted_s or time.monotonic()
                await _read_answer(reader, seen)
        except TimeoutError as error:
            raise _BrokenOff(f"nothing for {LONGEST_GAP_S:g} s") from error
        except (OSError, ValueError, IndexError) as error:
            if seen.accepted_s is None and self._resumes:
                raise _Refused("no answer", _RECONNECT_S) from error  # as good as refused: its gateway was killed
            raise _BrokenOff(f"connection broken: {error!r}") from error
        if not seen.is_done:
            raise _BrokenOff("ended without [DONE]")

    def _headers(self, seen: _Seen) -> dict[str, str]:
        if not self._resumes:
            return {}
        return {"X-MoLink-Resumable": "1"} if seen.last_event is None else {"Last-Event-ID": seen.last_event}


async def _read_answer(reader: asyncio.StreamReader, seen: _Seen) -> None:
    """Until its end.

    Raises:
        TimeoutError: no token for too long.
        _BrokenOff: an error came instead of tokens.
    """
    loop = asyncio.get_running_loop()
    event_id: str | None = None
    async with asyncio.timeout(LONGEST_GAP_S) as patience:
        while line := await reader.readline():
            if line.startswith(b"id: "):
                event_id = line[4:].strip().decode()
            elif line.startswith(b"data: {"):
                if _take_chunk(orjson.loads(line[6:]), seen):
                    patience.reschedule(loop.time() + LONGEST_GAP_S)
                seen.last_event = event_id or seen.last_event
            elif line.startswith(b"data: [DONE]"):
                seen.is_done = True
                return
            else:
                event_id = None


def _take_chunk(chunk: dict[str, Any], seen: _Seen) -> bool:
    """Note what a chunk holds; gives whether tokens."""
    if "error" in chunk:
        raise _BrokenOff(f"error: {chunk['error'].get('message')}")
    if chunk.get("usage"):
        seen.told_tokens = chunk["usage"]["completion_tokens"]
    tokens = [token for choice in chunk["choices"] for token in choice.get("token_ids") or ()]
    if tokens:
        seen.arrivals.append(time.monotonic())
        seen.tokens += tokens
    return bool(tokens)


async def _refusal(status: int, headers: dict[str, str], reader: asyncio.StreamReader) -> Exception:
    async with asyncio.timeout(_CONNECT_TIMEOUT_S):
        body = (await reader.read(4096)).decode(errors="replace")
    if status not in _MAY_BE_REFUSED:
        return _BrokenOff(f"HTTP {status}: {body[:300]}")
    try:
        retry_after_s = float(headers.get("retry-after", "1"))
    except ValueError:
        retry_after_s = 1.0
    return _Refused(str(status), retry_after_s)


@contextlib.asynccontextmanager
async def _posted(
    port: int, body: bytes, extra: dict[str, str]
) -> AsyncIterator[tuple[int, dict[str, str], asyncio.StreamReader]]:
    """Status and headers of the answer, and its body to be read line by line."""
    head = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": str(len(body)), **extra}
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    except OSError as error:
        raise _Refused("no connection", _RECONNECT_S) from error
    try:
        writer.write(f"POST /v1/chat/completions HTTP/1.1\r\n{lines}Connection: close\r\n\r\n".encode() + body)
        async with asyncio.timeout(LONGEST_GAP_S):
            status = int((await reader.readline()).split()[1])
            headers = {}
            while line := (await reader.readline()).strip():
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.lower()] = value.strip()
        yield status, headers, reader
    finally:
        writer.close()
