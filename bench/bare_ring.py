"""What two stages reach with nothing around them: the yardstick between a bound on paper and the whole system.

    python -m bench.bare_ring                                       synthetic 70B, 100 Mbit/s and 30 ms
    python -m bench.bare_ring --links lan,100m30 --engine real --json

A loop that somebody might write for this one machine, link and load: two processes, one TCP connection, a fixed number
of micro-batches that go round and round. The engines are the system's own, links and load those of `bench.links`
(prompts of 32 tokens, answers of 64, closed loops). There are no services, no broker, no HTTP, no prompts that come
when they like, no recovery; the best of several numbers of micro-batches counts. It needs what the laboratory needs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any

from bench import bounds
from bench.cost_curve import CostCurve
from bench.link_grid.bounding import closed_loop, link_bound
from bench.link_grid.cells import EngineKind, link_of
from bench.netlab.lab import Lab, open_lab
from bench.netlab.registry import LabError
from bench.netlab.topology import two_hosts
from bench.timed_stage import HIDDEN_SIZE, NUM_LAYERS

_PORT = "9903"
_START_S = 60.0


async def main(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for link in arguments.links:
        async with open_lab(two_hosts(link_of(link))) as lab:
            found = [case async for case in _cases(lab, arguments)]
        for streams in arguments.concurrency:
            of_it = [case for case in found if case["streams"] == streams]
            best = max(of_it, key=lambda case: case["tokens_per_s"])
            row = {"link": link, **best, "all": {case["micro_batches"]: case["tokens_per_s"] for case in of_it}}
            if arguments.engine is EngineKind.SYNTHETIC:
                row["bound_ratio"] = round(best["tokens_per_s"] / _bound(link, streams), 3)
            print("  ".join(f"{name} {value}" for name, value in row.items()), file=sys.stderr, flush=True)
            rows.append(row)
    return rows


async def _cases(lab: Lab, arguments: argparse.Namespace) -> AsyncIterator[dict[str, Any]]:
    cases = [
        f"{streams}:{count}"
        for streams in arguments.concurrency
        for count in arguments.micro_batches
        if count <= streams
    ]
    words = (lab.link_address("b"), str(arguments.warm_s), str(arguments.seconds), ",".join(cases))
    async with _end(lab, "b", "tail", arguments.engine) as tail:
        await _line(tail)
        async with _end(lab, "a", "head", arguments.engine, *words) as head:
            for _ in cases:
                yield json.loads(await _line(head, arguments.warm_s + arguments.seconds))


def _end(
    lab: Lab, host: str, role: str, kind: EngineKind, *words: str
) -> AbstractAsyncContextManager[asyncio.subprocess.Process]:
    return lab.program(host, [sys.executable, "-m", "bench.bare_ring_end", role, kind, _PORT, *words])


async def _line(process: asyncio.subprocess.Process, more_s: float = 0.0) -> bytes:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_START_S + more_s):
            line = await process.stdout.readline()
    except TimeoutError:
        line = b""
    if not line:
        raise LabError("an end of the bare ring failed or does not end; what it said stands above")
    return line


def _bound(link: str, streams: int) -> float:
    """Of the timed stages, as `bench.links` has it."""
    way = link_bound(link)
    pipeline = bounds.PipelineBound(
        stages=(CostCurve().stage(NUM_LAYERS // 2),) * 2,
        links=(way,),
        return_s=way.one_way_s,
        bytes_a_token=HIDDEN_SIZE * 2,
    )
    return bounds.best(pipeline, closed_loop(streams)).tokens_per_s


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", type=lambda text: text.split(","), default=["100m30"])
    parser.add_argument("--engine", type=EngineKind, choices=list(EngineKind), default=EngineKind.SYNTHETIC)
    parser.add_argument("--concurrency", type=_numbers, default=[1, 8, 32, 64])
    parser.add_argument("--micro-batches", type=_numbers, default=[1, 2, 3, 4, 6])
    parser.add_argument("--warm-s", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    chosen = parser.parse_args()
    result = asyncio.run(main(chosen))
    if chosen.json:
        print(json.dumps({"engine": chosen.engine, "rows": result}))
