"""Requests that come whether or not others have been answered, and what their clients saw."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.load import StreamResult, percentile, stream_chat

_WORDS = ("red", "stone", "river", "seven", "quick", "winter", "paper", "glass", "north", "under", "bread", "clock")
_BROKEN = 0
"""The status of a request whose connection broke."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What each client asks."""

    prompt_words: int = 60
    new_tokens: int = 32

    def body(self, dice: random.Random) -> dict[str, object]:
        """A request unlike any other."""
        words = " ".join(dice.choice(_WORDS) for _ in range(self.prompt_words))
        return {
            "model": "demo",
            "messages": [{"role": "user", "content": f"{dice.randint(0, 10**9)} {words}"}],
            "max_tokens": self.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }


async def one_request(port: int, body: dict[str, object], key: str | None = None) -> StreamResult:
    """What a client saw; a broken connection is a result too."""
    started_s = time.perf_counter()
    try:
        return await stream_chat(port, body, key=key)
    except (OSError, ValueError, IndexError, TimeoutError) as error:
        return StreamResult(
            status=_BROKEN, started_s=started_s, token_times_s=(), text="", completion_tokens=0,
            finish_reason=None, error=repr(error), ended_s=time.perf_counter(),
        )  # fmt: skip


async def offer(
    port: int, workload: Workload, *, rate_per_s: float, seconds: float, dice: random.Random
) -> list[StreamResult]:
    """Poisson arrivals for so long; every one is waited for, in the order of their coming."""
    loop = asyncio.get_running_loop()
    at_s = loop.time()
    end_s = at_s + seconds
    async with asyncio.TaskGroup() as group:
        tasks = []
        while (at_s := at_s + dice.expovariate(rate_per_s)) < end_s:
            await asyncio.sleep(max(at_s - loop.time(), 0.0))
            tasks.append(group.create_task(one_request(port, workload.body(dice))))
    return [task.result() for task in tasks]


async def keep_busy(
    port: int, workload: Workload, *, streams: int, seconds: float, dice: random.Random, key: str | None = None
) -> list[StreamResult]:
    """`streams` clients that each ask again as soon as they are answered."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + seconds
    results: list[StreamResult] = []

    async def client() -> None:
        while loop.time() < end_s:
            results.append(await one_request(port, workload.body(dice), key))

    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(client())
    return results


def answered(results: Sequence[StreamResult]) -> list[StreamResult]:
    """Those that were admitted and told something."""
    return [one for one in results if one.status == 200 and one.token_times_s]


def refused(results: Sequence[StreamResult]) -> list[StreamResult]:
    """Those that got 429."""
    return [one for one in results if one.status == 429]


def figures(results: Sequence[StreamResult], *, began_s: float, seconds: float) -> dict[str, Any]:
    """Of the requests that came within these seconds, and of the tokens that did."""
    good, no = answered(results), refused(results)
    end_s = began_s + seconds
    tokens = sum(began_s <= at_s < end_s for one in good for at_s in one.token_times_s)
    came = [one for one in results if began_s <= one.started_s < end_s]
    good, no = answered(came), refused(came)
    gaps = [b - a for one in good for a, b in zip(one.token_times_s, one.token_times_s[1:], strict=False)]
    failed = len(came) - len(good) - len(no)
    return {
        "offered_per_s": round(len(came) / seconds, 2),
        "admitted_per_s": round(len(good) / seconds, 2),
        "tokens_per_s": round(tokens / seconds, 1),
        "refused_share": round(len(no) / max(len(came), 1), 3),
        "failed": failed,
        "errors": sorted({f"{one.status}: {one.error}"[:200] for one in came if one not in good and one not in no})[:3],
        **_spread("ttft", [one.ttft_s for one in good]),
        **_spread("itl", gaps),
        **_spread("refusal", [one.ended_s - one.started_s for one in no]),
    }


def _spread(name: str, values_s: Sequence[float]) -> dict[str, float | None]:
    if not values_s:
        return {f"{name}_p50_ms": None, f"{name}_p99_ms": None}
    return {f"{name}_p{share}_ms": round(percentile(values_s, share / 100) * 1e3, 1) for share in (50, 99)}
