"""llama.cpp's RPC backend over an emulated link: tokens a second, and what a long prompt does to running streams.

    python -m bench.peers.llama_cpp --link wan30 --concurrency 1,8,32          a table
    python -m bench.peers.llama_cpp --link wan30 --concurrency 1,8,32 --json   and one JSON object as the last line

The first call builds llama.cpp, which takes many minutes; see ``bench.peers.llama_cpp_build``. Every link but
``loopback`` needs root, for the network laboratory.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from bench.load import StreamResult, chat_prompts, percentile, stream_chat
from bench.netlab.lab import open_lab
from bench.netlab.topology import LinkSpec, two_hosts
from bench.peers.llama_cpp_build import LlamaCpp, ensure_llama_cpp
from bench.peers.llama_cpp_server import Lab, LlamaServer, Loopback, Slots, llama_rpc
from molink_common.errors import MolinkError

__all__ = ["LlamaServer", "Loopback", "Slots", "decode", "ensure_llama_cpp", "llama_rpc", "stall"]

LINKS = {
    "lan": None,
    "gbit2": LinkSpec(rate_bit_per_s=1e9, round_trip_s=0.002),
    "wan30": LinkSpec(rate_bit_per_s=100e6, round_trip_s=0.03),
    "wan100": LinkSpec(rate_bit_per_s=100e6, round_trip_s=0.1),
    "slow30": LinkSpec(rate_bit_per_s=10e6, round_trip_s=0.03),
}
LOOPBACK = "loopback"

_PROMPT_WORDS = ("river", "glass", "bread", "clock", "bridge", "paper", "salt", "stone", "light", "garden", "winter")
_STALL_NEW_TOKENS = 96
_TOKENS_BEFORE_PROMPT = 8


async def decode(server: LlamaServer, concurrency: int, new_tokens: int, first: int = 0) -> list[StreamResult]:
    """That many streams at once, each with a prompt of its own, which are numbered from `first`.

    Raises:
        ExceptionGroup: of RuntimeError; a stream ended early or with an error.
    """
    prompts = chat_prompts(first + concurrency)[first:]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_stream(server, messages, new_tokens)) for messages in prompts]
    return [task.result() for task in tasks]


async def stall(
    server: LlamaServer, concurrency: int, prompt_tokens: int, delay_s: float, first: int = 0
) -> dict[str, Any]:
    """A long prompt arrives `delay_s` after that many streams began: how long did they stand still?

    Raises:
        RuntimeError: no stream was under way when it arrived.
        ExceptionGroup: of RuntimeError; a stream ended early or with an error.
    """
    text = long_prompt(prompt_tokens, first)
    counted = await _count_tokens(server, text)
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
        "prompt_tokens": counted,
        "prompt_ttft_s": round(prompt.ttft_s, 3),
        "streams_met": len(met),
        "longest_gap_s": round(max(met), 3),
        "median_gap_s": round(statistics.median(usual), 4),
    }


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


async def _stream(server: LlamaServer, messages: list[dict[str, str]], new_tokens: int) -> StreamResult:
    fixed = {"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    stream = await stream_chat(server.port, {**fixed, "messages": messages}, host=server.host)
    if stream.error is not None or stream.completion_tokens != new_tokens:
        raise RuntimeError(f"a stream of {stream.completion_tokens} tokens: {stream.status} {stream.error}")
    return stream


async def _count_tokens(server: LlamaServer, text: str) -> int:
    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
        answer = await client.post(f"http://{server.host}:{server.port}/tokenize", json={"content": text})
        answer.raise_for_status()
        return len(answer.json()["tokens"])


async def _measure(server: LlamaServer, concurrency: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: the median of the runs. Prompts are new in each run, so that none is found in a cache."""
    rates, results = [], list[StreamResult]()
    for run in range(arguments.runs):
        streams = await decode(server, concurrency, arguments.new_tokens, first=run * concurrency)
        rates.append(tokens_per_s(streams))
        results += streams
    row: dict[str, Any] = {
        "concurrency": concurrency,
        "new_tokens": arguments.new_tokens,
        "tokens_per_s": round(statistics.median(rates), 1),
        "tokens_per_s_min": round(min(rates), 1),
        "tokens_per_s_max": round(max(rates), 1),
        "ttft_p50_s": round(percentile([stream.ttft_s for stream in results], 0.5), 4),
        "tpot_p50_s": round(percentile([stream.tpot_s for stream in results], 0.5), 5),
    }
    if arguments.prompt_tokens:
        warm = [stream.token_times_s[_TOKENS_BEFORE_PROMPT] - stream.started_s for stream in results]
        first = arguments.runs * concurrency
        row["stall"] = await stall(server, concurrency, arguments.prompt_tokens, statistics.median(warm), first)
    return row


@contextlib.asynccontextmanager
async def _laboratory(link: str) -> AsyncIterator[Lab]:
    if link == LOOPBACK:
        task = asyncio.current_task()
        assert task is not None
        # a measurement that is ended from outside must not leave the servers behind; a laboratory sees to that itself
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        yield Loopback()
        return
    async with open_lab(two_hosts(LINKS[link])) as lab:
        yield lab


async def main(arguments: argparse.Namespace, peer: LlamaCpp) -> dict[str, Any]:
    slots = Slots(streams=max(arguments.concurrency), batch_tokens=arguments.batch_tokens, unified=arguments.unified)
    with tempfile.TemporaryDirectory() as folder:
        async with (
            _laboratory(arguments.link) as lab,
            llama_rpc(lab, near="a", far="b", peer=peer, folder=Path(folder), slots=slots) as server,
        ):
            await decode(server, 4, 16)  # first touches of memory and code are not what is measured
            rows = []
            for concurrency in arguments.concurrency:
                rows.append(await _measure(server, concurrency, arguments))
                print(_row(rows[-1]), flush=True)
    return {"link": arguments.link, "load_s": round(server.load_s, 1), "cases": rows, "build": peer.options}


def _row(row: dict[str, Any]) -> str:
    text = (
        f"{row['concurrency']:4} concurrent  {row['tokens_per_s']:8.1f} tokens/s "
        f"({row['tokens_per_s_min']:.1f} to {row['tokens_per_s_max']:.1f})  "
        f"TTFT p50 {row['ttft_p50_s'] * 1e3:.0f} ms  TPOT p50 {row['tpot_p50_s'] * 1e3:.1f} ms"
    )
    if "stall" in row:
        text += f"  longest gap {row['stall']['longest_gap_s']:.2f} s behind {row['stall']['prompt_tokens']} tokens"
    return text


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.peers.llama_cpp", description=__doc__)
    parser.add_argument("--link", choices=[LOOPBACK, *LINKS], default="wan30")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--concurrency", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=1500, help="of the long prompt; 0 leaves it out")
    parser.add_argument("--batch-tokens", type=int, default=None, help="most tokens of a batch (llama.cpp: 2048)")
    parser.add_argument("--unified", action="store_true", help="one pool of KV cells for all streams")
    return parser.parse_args(argv)


if __name__ == "__main__":
    given = parse(sys.argv[1:])
    began = time.monotonic()
    try:
        found = ensure_llama_cpp()
        report = asyncio.run(main(given, found))
    except* (MolinkError, RuntimeError) as errors:
        sys.exit(f"error: {errors.exceptions[0]}")
    report["seconds"] = round(time.monotonic() - began, 1)
    if given.json:
        print(json.dumps(report))
