"""A closed loop of streams: each sends request after request, so that the same number is always under way.

The first requests of the streams are of different lengths, so that they do not end, and prefill, all together for
ever after. With newcomers, a long prompt comes every few seconds by the clock, whether or not the last was answered.
No prompt comes twice, in whatever load of this process: the system would know it, and compute nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from bench.load import TokenTrace, trace_completion

_FIRST_ID, _LAST_ID = 200, 40_000
"""Ordinary tokens of the demo model's vocabulary."""
_loads = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadShape:
    """What the clients ask for."""

    streams: int
    prompt_tokens: int = 32
    answer_tokens: int = 64
    newcomer_every_s: float | None = None
    """None: no long prompts."""
    newcomer_prompt_tokens: int = 1500
    newcomer_answer_tokens: int = 4
    most_newcomers: int = 4
    """At the same time. Where the link cannot carry them all, the others are left out, and counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where requests go."""

    host: str
    port: int
    model: str


@dataclass(slots=True, kw_only=True)
class SteadyLoad:
    """A load that runs, and what its clients have seen so far."""

    shape: LoadShape
    began_s: float
    number: int = field(default_factory=lambda: next(_loads))
    streams: list[TokenTrace] = field(default_factory=list)
    newcomers: list[TokenTrace] = field(default_factory=list)
    left_out: int = 0
    """Newcomers that found too many before them."""
    _warming: set[int] = field(default_factory=set)
    _warm: asyncio.Event = field(default_factory=asyncio.Event)

    async def until_warm(self, least_s: float, most_s: float) -> None:
        """Wait until every stream has ended its first request, `least_s` at least and `most_s` at most."""
        started_s = time.perf_counter()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                await self._warm.wait()
        await asyncio.sleep(max(0.0, least_s - (time.perf_counter() - started_s)))

    async def _stream(self, target: Target, number: int) -> None:
        dice = random.Random(f"load {self.number}, stream {number}")
        shape = self.shape
        answer_tokens = 1 + shape.answer_tokens * (number + 1) // shape.streams
        while True:
            await self._ask(target, self.streams, dice, shape.prompt_tokens, min(answer_tokens, shape.answer_tokens))
            answer_tokens = shape.answer_tokens
            self._warming.discard(number)
            if not self._warming:
                self._warm.set()

    async def _newcomers(self, target: Target, every_s: float) -> None:
        dice = random.Random(f"load {self.number}, newcomers")
        shape = self.shape
        next_s = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            while True:
                next_s += every_s
                await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
                if sum(not one.is_complete for one in self.newcomers) >= shape.most_newcomers:
                    self.left_out += 1
                    continue
                tokens = (shape.newcomer_prompt_tokens, shape.newcomer_answer_tokens)
                tasks.create_task(self._ask(target, self.newcomers, dice, *tokens))

    async def _ask(
        self, target: Target, seen: list[TokenTrace], dice: random.Random, prompt_tokens: int, answer_tokens: int
    ) -> None:
        prompt = [dice.randrange(_FIRST_ID, _LAST_ID) for _ in range(prompt_tokens)]
        trace = TokenTrace(prompt_tokens=prompt_tokens, started_s=time.perf_counter())
        seen.append(trace)
        await trace_completion(
            trace, host=target.host, port=target.port, model=target.model, prompt=prompt, max_tokens=answer_tokens
        )


@contextlib.asynccontextmanager
async def steady_load(target: Target, shape: LoadShape) -> AsyncIterator[SteadyLoad]:
    """Keep the load up while the block runs; hang up at its end.

    Raises:
        RequestFailed, OSError, TimeoutError: of the first request that failed.
    """
    load = SteadyLoad(shape=shape, began_s=time.perf_counter())
    load._warming.update(range(shape.streams))
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(load._stream(target, number)) for number in range(shape.streams)]
            if shape.newcomer_every_s is not None:
                running.append(tasks.create_task(load._newcomers(target, shape.newcomer_every_s)))
            try:
                yield load
            finally:
                for task in running:
                    task.cancel()
    except BaseExceptionGroup as group:
        raise _first(group) from group


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """One of several is enough to tell what went wrong."""
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
