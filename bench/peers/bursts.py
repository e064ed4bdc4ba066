"""Bursts of streams at an OpenAI-compatible server, whichever it is, and what is read off them."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from bench.load import StreamResult, chat_prompts, percentile, stream_chat

_PROMPT_WORDS = ("river", "glass", "bread", "clock", "bridge", "paper", "salt", "stone", "light", "garden", "winter")
_STALL_NEW_TOKENS = 96
_UNDER_WAY_TOKENS = 8


class Endpoint(Protocol):
    """Where a server listens."""

    @property
    def host(self) -> str:
        """Its address."""
        ...

    @property
    def port(self) -> int:
        """Its port."""
        ...


async def decode(server: Endpoint, concurrency: int, new_tokens: int, first: int = 0) -> list[StreamResult]:
    """That many streams at once, each with a prompt of its own, which are numbered from `first`.

    Raises:
        ExceptionGroup: of RuntimeError; a stream ended early or with an error.
    """
    prompts = chat_prompts(first + concurrency)[first:]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_stream(server, messages, new_tokens)) for messages in prompts]
    return [task.result() for task in tasks]


async def stall(
    server: Endpoint, concurrency: int, prompt_tokens: int, delay_s: float, first: int = 0
) -> dict[str, Any]:
    """A long prompt arrives `delay_s` after that many streams began: how long did they stand still?

    Raises:
        RuntimeError: no stream was under way when it arrived.
        ExceptionGroup: of RuntimeError; a stream ended early or with an error.
    """
    text = long_prompt(prompt_tokens, first)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(decode(server, concurrency, _STALL_NEW_TOKENS, first))
        await asyncio.sleep(delay_s)
        newcomer = group.create_task(_stream(server, [{"role": "user", "content": text}], 4))
    prompt = newcomer.result()
    gaps = [
        longest_gap_s(stream.token_times_s, prompt.started_s, prompt.token_times_s[0]) for stream in running.result()
    ]
    met = [gap for gap in gaps if gap is not None]
    if not met:
        raise RuntimeError("no stream was running when the long prompt came")
    usual = [b - a for stream in running.result() for a, b in itertools.pairwise(stream.token_times_s)]
    return {
        "prompt_tokens": prompt.prompt_tokens,
        "prompt_ttft_s": round(prompt.ttft_s, 3),
        "streams_met": len(met),
        "longest_gap_s": round(max(met), 3),
        "median_gap_s": round(statistics.median(usual), 4),
    }


def figures(runs: Sequence[Sequence[StreamResult]]) -> dict[str, Any]:
    """Of several bursts of the same size: tokens a second, in the middle, least and most, and what a stream saw."""
    rates = [tokens_per_s(streams) for streams in runs]
    results = [stream for streams in runs for stream in streams]
    return {
        "tokens_per_s": round(statistics.median(rates), 1),
        "tokens_per_s_min": round(min(rates), 1),
        "tokens_per_s_max": round(max(rates), 1),
        "ttft_p50_s": round(percentile([stream.ttft_s for stream in results], 0.5), 4),
        "tpot_p50_s": round(percentile([stream.tpot_s for stream in results], 0.5), 5),
    }


def line(row: Mapping[str, Any]) -> str:
    """A row of `figures` with its ``concurrency``, and perhaps a ``stall``, to be read."""
    text = (
        f"{row['concurrency']:4} concurrent  {row['tokens_per_s']:8.1f} tokens/s "
        f"({row['tokens_per_s_min']:.1f} to {row['tokens_per_s_max']:.1f})  "
        f"TTFT p50 {row['ttft_p50_s'] * 1e3:.0f} ms  TPOT p50 {row['tpot_p50_s'] * 1e3:.1f} ms"
    )
    if "stall" in row:
        text += f"  longest gap {row['stall']['longest_gap_s']:.2f} s behind {row['stall']['prompt_tokens']} tokens"
    return text


def under_way_after_s(runs: Sequence[Sequence[StreamResult]]) -> float:
    """How long after its start a stream of such bursts has had some tokens: a good moment for a `stall`."""
    return statistics.median(
        stream.token_times_s[_UNDER_WAY_TOKENS] - stream.started_s for streams in runs for stream in streams
    )


def longest_gap_s(token_times_s: Sequence[float], since_s: float, until_s: float) -> float | None:
    """The longest time between two tokens of a stream that overlaps ``(since_s, until_s)``; None if none does."""
    gaps = [b - a for a, b in itertools.pairwise(token_times_s) if b > since_s and a < until_s]
    return max(gaps, default=None)


def tokens_per_s(streams: Sequence[StreamResult]) -> float:
    """Of all together, from the first byte of the first request to the last token of the last stream."""
    began = min(stream.started_s for stream in streams)
    ended = max(stream.token_times_s[-1] for stream in streams)
    return sum(stream.completion_tokens for stream in streams) / (ended - began)


def long_prompt(num_words: int, number: int) -> str:
    """About one token a word, and no common beginning with one of another `number`."""
    words = [_PROMPT_WORDS[(index * (number + 1) + index // 7) % len(_PROMPT_WORDS)] for index in range(num_words)]
    return f"{number}: " + " ".join(words)


async def _stream(server: Endpoint, messages: list[dict[str, str]], new_tokens: int) -> StreamResult:
    fixed = {"model": "demo", "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    stream = await stream_chat(server.port, {**fixed, "messages": messages}, host=server.host)
    if stream.error is not None or stream.completion_tokens != new_tokens:
        raise RuntimeError(f"a stream of {stream.completion_tokens} tokens: {stream.status} {stream.error}")
    return stream
