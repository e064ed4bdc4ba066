"""A streaming client that costs little, so that on a small machine it does not measure itself.

It speaks just enough HTTP/1.1 to read one server-sent event stream a connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamResult:
    """What one client saw. Times are seconds on one monotonic clock."""

    status: int
    started_s: float
    token_times_s: tuple[float, ...]
    text: str
    completion_tokens: int
    finish_reason: str | None
    error: str | None = None
    ended_s: float = 0.0
    """When the answer had been read."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's: needed no computing."""

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.token_times_s[0] - self.started_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first."""
        return (self.token_times_s[-1] - self.token_times_s[0]) / max(1, len(self.token_times_s) - 1)


async def stream_chat(
    port: int,
    body: dict[str, object],
    *,
    hang_up_after: int | None = None,
    host: str = "127.0.0.1",
    key: str | None = None,
) -> StreamResult:
    """One streamed chat completion; closes the connection after `hang_up_after` chunks if given. `key` is an API key.

    Raises:
        TimeoutError: no end within ten minutes.
        OSError: the connection broke.
    """
    async with asyncio.timeout(_TIMEOUT_S):
        return await _stream_chat(host, port, body, hang_up_after, key)


async def _stream_chat(
    host: str, port: int, body: dict[str, object], hang_up_after: int | None, key: str | None
) -> StreamResult:
    request = {**body, "stream": True, "stream_options": {"include_usage": True}}
    started = time.perf_counter()
    times: list[float] = []
    text: list[str] = []
    finish, error = None, None
    usage: dict[str, Any] = {"completion_tokens": 0}
    async with _posted(host, port, "/v1/chat/completions", request, key) as (status, reader):
        while line := await reader.readline():
            if status != 200:
                error = (error or "") + line.decode(errors="replace")
                continue
            if not line.startswith(b"data: {"):
                continue
            chunk = orjson.loads(line[6:])
            if "error" in chunk:
                error = str(chunk["error"].get("message"))
                continue
            if chunk.get("usage"):
                usage = chunk["usage"]
            for choice in chunk["choices"]:
                finish = choice.get("finish_reason") or finish
                if choice["delta"].get("content"):
                    times.append(time.perf_counter())
                    text.append(choice["delta"]["content"])
            if hang_up_after is not None and len(times) >= hang_up_after:
                break
    return StreamResult(
        status=status, started_s=started, token_times_s=tuple(times), text="".join(text),
        completion_tokens=usage["completion_tokens"], finish_reason=finish, error=error, ended_s=time.perf_counter(),
        prompt_tokens=usage.get("prompt_tokens", 0),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
    )  # fmt: skip


class RequestFailed(Exception):
    """A completion that was refused, broke off or ended early."""


@dataclass(slots=True, kw_only=True)
class TokenTrace:
    """What a client has seen of one completion so far. Times are seconds on one monotonic clock."""

    prompt_tokens: int
    started_s: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """When tokens came, and how many at once."""
    is_complete: bool = False

    @property
    def num_tokens(self) -> int:
        """How many have come."""
        return sum(count for _, count in self.arrivals)


async def trace_completion(
    trace: TokenTrace, *, host: str, port: int, model: str, prompt: Sequence[int], max_tokens: int
) -> None:
    """One streamed completion of exactly `max_tokens` tokens after the token ids of `prompt`.

    `trace` holds what has come, also when this is cancelled, which hangs up.

    Raises:
        RequestFailed: it was refused or ended early.
        TimeoutError: no end within ten minutes.
        OSError: the connection broke.
    """
    body = {"model": model, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "return_token_ids": True}
    async with asyncio.timeout(_TIMEOUT_S), _posted(host, port, "/v1/completions", body) as (status, reader):
        while line := await reader.readline():
            if status != 200 and line.startswith(b"{"):
                raise RequestFailed(f"{status}: {line.decode(errors='replace')}")
            if not line.startswith(b"data: {"):
                continue
            chunk = orjson.loads(line[6:])
            if "error" in chunk:
                raise RequestFailed(str(chunk["error"].get("message")))
            count = sum(len(choice.get("token_ids") or ()) for choice in chunk["choices"])
            if count:
                trace.arrivals.append((time.perf_counter(), count))
    if trace.num_tokens != max_tokens:
        raise RequestFailed(f"{trace.num_tokens} tokens instead of {max_tokens} (status {status})")
    trace.is_complete = True


@contextlib.asynccontextmanager
async def _posted(
    host: str, port: int, path: str, body: dict[str, object], key: str | None = None
) -> AsyncIterator[tuple[int, asyncio.StreamReader]]:
    """The status of the answer, and its body to be read line by line. The connection is closed at the end."""
    payload = orjson.dumps(body)
    who = "" if key is None else f"Authorization: Bearer {key}\r\n"
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{who}"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    ).encode()
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    try:
        writer.write(head + payload)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        yield status, reader
    finally:
        writer.close()


def chat_prompts(count: int) -> list[list[dict[str, str]]]:
    """`count` different conversations of about 30 tokens with SmolLM2's template (which adds a system text)."""
    subjects = ("rivers", "glass", "bread", "clocks", "maps", "bridges", "paper", "salt")
    places = ("Norway", "Kenya", "Peru", "Japan", "Italy", "Canada", "India", "Spain")
    return [
        [
            {"role": "system", "content": "You are a helpful guide."},
            {"role": "user", "content": f"Tell me about {subjects[i % 8]} in {places[i // 8 % 8]}, part {i}."},
        ]
        for i in range(count)
    ]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
