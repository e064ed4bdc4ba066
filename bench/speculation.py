"""What guessing tokens gains over a weak link, by kind of text: the same requests with and without it.

    python -m bench.speculation                                  100 Mbit/s and 30 ms, one to 32 streams
    python -m bench.speculation --links lan --concurrency 1 --kinds chat --json

Two stages of the demo model on hosts of a laboratory (see `netlab`; it needs root on Linux), asked over HTTP. Each
stream asks for `--answers` answers of `--new-tokens` tokens, one after the other; a figure is all tokens over all of
that time. The kinds: *chat*, short questions, greedy; *sampled*, the same at temperature 0.8; *copy*, a text that is
to be said again. In float32 (`--dtype`) both sides must say the same, word by word.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from bench.link_grid.cells import EngineKind, Setup
from bench.load import StreamResult, chat_prompts, stream_chat
from bench.netlab.serving import ServingSystem, serving

KINDS = ("chat", "sampled", "copy")
_STATUS_AGE_S = 1.2
"""The head's report is at most one heartbeat old."""


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for link in arguments.links:
        policies = ("adaptive", "adaptive" if arguments.control else "adaptive+lookup")
        sides = [[row async for row in _side(arguments, link, policy)] for policy in policies]
        for without, with_it in zip(*sides, strict=True):
            texts = [row.pop("texts") for row in (without, with_it)]
            rows.append(
                {
                    "link": link,
                    **with_it,
                    "without": without["tokens_per_s"],
                    "ratio": round(with_it["tokens_per_s"] / without["tokens_per_s"], 2),
                    "same_texts": sum(one == other for one, other in zip(*texts, strict=True)),
                    "of": len(texts[0]),
                }
            )
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), file=sys.stderr, flush=True)
    return {"dtype": arguments.dtype, "new_tokens": arguments.new_tokens, "rows": rows}


async def _side(arguments: argparse.Namespace, link: str, policy: str) -> AsyncIterator[dict[str, Any]]:
    setup = Setup(engine=EngineKind.REAL, stages=2, link=link, policy=policy)
    async with _serving(setup, arguments.dtype) as system:
        await _run(system, _bodies("chat", 8, arguments.new_tokens, first=5000), streams=4)  # first touches of memory
        first = 0
        for kind in arguments.kinds:
            for streams in arguments.concurrency:
                count = streams * arguments.answers
                before = await _guesses(system)
                results, seconds = await _run(system, _bodies(kind, count, arguments.new_tokens, first), streams)
                after = await _guesses(system)
                first += count  # no prompt twice: the prefix cache would answer it
                drafted, accepted = (new - old for new, old in zip(after, before, strict=True))
                yield {
                    "kind": kind,
                    "streams": streams,
                    "tokens_per_s": round(sum(one.completion_tokens for one in results) / seconds, 1),
                    "guessed_rightly": round(accepted / drafted, 2) if drafted else None,
                    "of_all_tokens": round(accepted / sum(one.completion_tokens for one in results), 2),
                    "texts": [one.text for one in results],
                }


@contextlib.asynccontextmanager
async def _serving(setup: Setup, dtype: str) -> AsyncIterator[ServingSystem]:
    with tempfile.TemporaryDirectory() as folder:
        async with serving(
            setup.topology,
            Path(folder),
            scheduler_flags=[*setup.scheduler_flags, "--dtype", dtype],
            worker_flags=["--max-running", "160"],
            worker_module=setup.worker_module,
        ) as system:
            yield system


def _bodies(kind: str, count: int, new_tokens: int, first: int) -> list[dict[str, Any]]:
    bodies = []
    for number, messages in enumerate(chat_prompts(first + count)[first:], start=first):
        body: dict[str, Any] = {"messages": messages, "temperature": 0.0}
        if kind == "sampled":
            body |= {"temperature": 0.8, "seed": number}
        if kind == "copy":
            body["messages"] = [{"role": "user", "content": _to_copy(number)}]
        bodies.append({"model": "demo", "max_tokens": new_tokens, "ignore_eos": True, **body})
    return bodies


def _to_copy(number: int) -> str:
    text = (
        f"Order {number}: the baker in street {number * 7 % 90} wants {number % 9 + 2} bags of flour, a box of yeast "
        f"and {number % 5 + 1} jars of honey. Bring them before {number % 6 + 5} in the morning, to the back door, and "
        f"ask for Mr. Olsen, who has the key. He pays at the end of the month."
    )
    return f'Repeat this text three times, word for word: "{text}"'


async def _run(
    system: ServingSystem, bodies: Sequence[dict[str, Any]], streams: int
) -> tuple[list[StreamResult], float]:
    """All answers, in the order of the requests; and how long they took together."""
    results: dict[int, StreamResult] = {}
    waiting = iter(enumerate(bodies))

    async def stream() -> None:
        for number, body in waiting:
            results[number] = await stream_chat(system.port, body, host=system.host)
            if results[number].error is not None:
                raise RuntimeError(f"an answer failed: {results[number].status} {results[number].error}")

    started_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(stream())
    return [results[number] for number in range(len(bodies))], time.perf_counter() - started_s


async def _guesses(system: ServingSystem) -> tuple[int, int]:
    await asyncio.sleep(_STATUS_AGE_S)
    head = (await system.status())["pipelines"][0]["head"]
    return head["drafted_tokens"], head["accepted_tokens"]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.speculation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--links", type=lambda text: text.split(","), default=["100m30"])
    parser.add_argument("--concurrency", type=lambda text: list(map(int, text.split(","))), default=[1, 8, 32])
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS))
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--answers", type=int, default=4, help="of each stream")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--control", action="store_true", help="nobody guesses: what differs from one run to the next")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.kinds) - set(KINDS):
        parser.error(f"no such kind of text: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    return arguments


if __name__ == "__main__":
    chosen = parse(sys.argv[1:])
    result = asyncio.run(main(chosen))
    if chosen.json:
        print(json.dumps(result))
