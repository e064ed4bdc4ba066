"""A streaming client that costs little, so that on a small machine it does not measure itself.

It speaks just enough HTTP/1.1 to read one server-sent event stream a connection.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

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

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.token_times_s[0] - self.started_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first."""
        return (self.token_times_s[-1] - self.token_times_s[0]) / max(1, len(self.token_times_s) - 1)


async def stream_chat(
    port: int, body: dict[str, object], *, hang_up_after: int | None = None, host: str = "127.0.0.1"
) -> StreamResult:
    """One streamed chat completion; closes the connection after `hang_up_after` chunks if given.

    Raises:
        TimeoutError: no end within ten minutes.
        OSError: the connection broke.
    """
    async with asyncio.timeout(_TIMEOUT_S):
        return await _stream_chat(host, port, body, hang_up_after)


async def _stream_chat(host: str, port: int, body: dict[str, object], hang_up_after: int | None) -> StreamResult:
    request = {**body, "stream": True, "stream_options": {"include_usage": True}}
    payload = orjson.dumps(request)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    ).encode()
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    times: list[float] = []
    text: list[str] = []
    usage, finish, error = 0, None, None
    try:
        writer.write(head + payload)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
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
                usage = chunk["usage"]["completion_tokens"]
            for choice in chunk["choices"]:
                finish = choice.get("finish_reason") or finish
                if choice["delta"].get("content"):
                    times.append(time.perf_counter())
                    text.append(choice["delta"]["content"])
            if hang_up_after is not None and len(times) >= hang_up_after:
                break
    finally:
        writer.close()
    return StreamResult(
        status=status, started_s=started, token_times_s=tuple(times), text="".join(text),
        completion_tokens=usage, finish_reason=finish, error=error,
    )  # fmt: skip


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
