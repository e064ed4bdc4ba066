"""Many streaming clients for minutes, a tenth of them hanging up in the middle; then look for leaks.

    python -m bench.soak                       200 clients for five minutes
    python -m bench.soak --clients 20 --seconds 30 --json

Judged: every answer complete or a 429; after the load no KV block in use, no sequence in Redis; the memory of
each worker at the end next to that after the first minute.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from bench.load import chat_prompts, percentile, stream_chat
from bench.system import RunningSystem, running_system
from molink.embedded import start_redis

_RETRY_S = 1.0
_SETTLE_S = 15.0


class Tally:
    """What the clients saw."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.errors: list[str] = []
        self.ttft_s: list[float] = []
        self.tokens = 0


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        redis = start_redis(folder)
        try:
            flags = ["--workers", str(arguments.workers), "--redis", redis.url]
            async with running_system(folder / "up.log", flags) as system:
                return await _soak(system, redis.url, arguments)
        finally:
            redis.stop()


async def _soak(system: RunningSystem, redis_url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    tally = Tally()
    memory: list[list[int]] = []
    end_s = time.monotonic() + arguments.seconds
    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for index in range(arguments.clients):
            tasks.create_task(_client(system.port, random.Random(arguments.seed + index), end_s, tally))
        tasks.create_task(_watch(system, end_s, memory, tally))
    lasted_s = time.perf_counter() - started
    leaks = await _leaks(system, redis_url)
    early = memory[min(len(memory) - 1, max(0, len(memory) // 5))]
    return {
        "clients": arguments.clients,
        "seconds": round(lasted_s, 1),
        "outcomes": dict(tally.outcomes),
        "errors": tally.errors[:10],
        "tokens_per_s": round(tally.tokens / lasted_s, 1),
        "ttft_p50_s": round(percentile(tally.ttft_s, 0.5), 3),
        "ttft_p99_s": round(percentile(tally.ttft_s, 0.99), 3),
        "worker_rss_mb_early": early,
        "worker_rss_mb_end": memory[-1],
        **leaks,
    }


async def _client(port: int, dice: random.Random, end_s: float, tally: Tally) -> None:
    """One request after the other until the end."""
    prompts = chat_prompts(64)
    while time.monotonic() < end_s:
        words = " ".join(dice.choice(("red", "stone", "river", "seven", "quick")) for _ in range(dice.randint(0, 120)))
        messages = [*dice.choice(prompts)]
        messages[-1] = {"role": "user", "content": messages[-1]["content"] + " " + words}
        new_tokens = dice.randint(1, 120)
        hang_up = dice.randint(1, new_tokens) if dice.random() < 0.1 else None
        body = {"model": "demo", "messages": messages, "max_tokens": new_tokens, "seed": dice.randint(0, 10**6)}
        try:
            stream = await stream_chat(port, body, hang_up_after=hang_up)
        except (OSError, ValueError, IndexError, TimeoutError) as error:
            tally.outcomes["broken"] += 1
            tally.errors.append(repr(error))
            continue
        tally.tokens += len(stream.token_times_s)
        if stream.token_times_s:
            tally.ttft_s.append(stream.ttft_s)
        if stream.status == 429:
            tally.outcomes["429"] += 1
            await asyncio.sleep(_RETRY_S)
        elif stream.error is not None or stream.status != 200:
            tally.outcomes["error"] += 1
            tally.errors.append(f"{stream.status}: {stream.error}")
        elif hang_up is not None:
            tally.outcomes["hung up"] += 1
        else:
            tally.outcomes["complete" if stream.finish_reason in ("stop", "length") else "cut"] += 1


async def _watch(system: RunningSystem, end_s: float, memory: list[list[int]], tally: Tally) -> None:
    """The workers' memory every five seconds, and a sign of life."""
    while time.monotonic() < end_s:
        status: Any = await system.status()
        memory.append([round(worker["rss_bytes"] / 2**20) for worker in status["workers"]])
        print(f"{end_s - time.monotonic():5.0f} s left  {dict(tally.outcomes)}  memory {memory[-1]} MiB", flush=True)
        await asyncio.sleep(5)


async def _leaks(system: RunningSystem, redis_url: str) -> dict[str, int]:
    """What is still held once everybody has gone; the system gets a moment to notice the last to hang up."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        status: Any = await system.status()
        head = next(worker["stage"]["head"] for worker in status["workers"] if (worker["stage"] or {}).get("head"))
        async with Redis.from_url(redis_url) as redis:
            keys = [key async for key in redis.scan_iter("molink:v1:*") if b"sequence" in key or b"tokens" in key]
        leaks = {
            "kv_blocks_leaked": head["num_blocks"] - head["free_blocks"],
            "sequences_left": status["sequences"] + head["running"] + head["waiting"],
            "redis_keys_left": len(keys),
        }
        if not any(leaks.values()) or time.monotonic() > deadline:
            return leaks
        await asyncio.sleep(1)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    chosen = parse(sys.argv[1:])
    outcome = asyncio.run(main(chosen))
    print(json.dumps(outcome) if chosen.json else json.dumps(outcome, indent=2))
