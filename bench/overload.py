"""What rising load does to throughput and waiting: below capacity, at it, and far beyond.

    python -m bench.overload                                    a table
    python -m bench.overload --json --plot docs/load-curve.png  the same, one JSON object as the last line, a picture

The whole system on this machine, clients too. First, the capacity: requests a second that as many clients get
through as the head has places, each asking again at once. Then requests come at random (Poisson, seeded), at rates
that are parts and multiples of it, whether or not others were answered; a rate is kept up for some seconds, the
first of which do not count, and the next one begins when all are answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.open_loop import Workload, answered, figures, keep_busy, offer
from bench.overload_plot import save_plot
from bench.system import RunningSystem, running_system

_PLACES = 64


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    flags = ["--workers", str(arguments.workers), "--dtype", "bfloat16"]
    environment = {"MOLINK_TTFT_TARGET_S": str(arguments.ttft_target_s)}
    workload = Workload(prompt_words=arguments.prompt_words, new_tokens=arguments.new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        async with running_system(Path(folder) / "up.log", flags, environment) as system:
            return await _curve(system, workload, arguments)


async def _curve(system: RunningSystem, workload: Workload, arguments: argparse.Namespace) -> dict[str, Any]:
    dice = random.Random(arguments.seed)
    capacity_per_s = arguments.capacity or await _capacity_per_s(system, workload, arguments, dice)
    print(f"capacity {capacity_per_s:.2f} requests/s, {capacity_per_s * workload.new_tokens:.0f} tokens/s", flush=True)
    rows: list[dict[str, Any]] = []
    for load in arguments.loads:
        began_s = time.perf_counter() + arguments.warm_up_s
        seconds = arguments.warm_up_s + arguments.seconds
        results = await offer(system.port, workload, rate_per_s=load * capacity_per_s, seconds=seconds, dice=dice)
        row = {"load": load, **figures(results, began_s=began_s, seconds=arguments.seconds)}
        rows.append(row)
        print(_line(row), flush=True)
    report = {
        "capacity_per_s": round(capacity_per_s, 2),
        "ttft_target_s": arguments.ttft_target_s,
        "prompt_words": workload.prompt_words,
        "new_tokens": workload.new_tokens,
        "seconds": arguments.seconds,
        "rates": rows,
        **_judged(rows),
    }
    if arguments.plot is not None:
        await asyncio.to_thread(save_plot, report, arguments.plot)
    return report


async def _capacity_per_s(
    system: RunningSystem, workload: Workload, arguments: argparse.Namespace, dice: random.Random
) -> float:
    await keep_busy(system.port, workload, streams=8, seconds=2, dice=dice)  # first touches of memory and code
    began_s = time.perf_counter() + arguments.warm_up_s
    seconds = arguments.warm_up_s + arguments.seconds
    results = await keep_busy(system.port, workload, streams=_PLACES, seconds=seconds, dice=dice)
    end_s = began_s + arguments.seconds
    tokens = sum(began_s <= at_s < end_s for one in answered(results) for at_s in one.token_times_s)
    return float(tokens / workload.new_tokens / arguments.seconds)


def _judged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Twice the capacity next to the capacity."""
    by_load = {row["load"]: row for row in rows}
    at, twice = by_load.get(1.0), by_load.get(2.0)
    if at is None or twice is None or not at["ttft_p99_ms"] or not twice["ttft_p99_ms"]:
        return {}
    return {
        "ttft_p99_at_twice_next_to_capacity": round(twice["ttft_p99_ms"] / at["ttft_p99_ms"], 2),
        "refusal_p99_ms_at_twice": twice["refusal_p99_ms"],
    }


def _line(row: dict[str, Any]) -> str:
    def shown(name: str) -> str:
        return "–" if row[name] is None else f"{row[name]:.0f}"

    return (
        f"{row['load']:5.2f} × capacity  {row['tokens_per_s']:6.1f} tokens/s  "
        f"TTFT {shown('ttft_p50_ms')}/{shown('ttft_p99_ms')} ms  ITL {shown('itl_p50_ms')}/{shown('itl_p99_ms')} ms  "
        f"refused {row['refused_share']:.0%} in {shown('refusal_p50_ms')}/{shown('refusal_p99_ms')} ms"
        + (f"  {row['failed']} FAILED {row['errors']}" if row["failed"] else "")
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.overload", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--plot", type=Path, help="where to save the picture")
    loads = [0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 1.5, 2.0, 4.0]
    parser.add_argument("--loads", type=lambda text: [float(one) for one in text.split(",")], default=loads)
    parser.add_argument("--capacity", type=float, help="requests a second; default: measured first")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a rate, that count")
    parser.add_argument("--warm-up-s", type=float, default=5.0)
    parser.add_argument("--prompt-words", type=int, default=60)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ttft-target-s", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(argv)


if __name__ == "__main__":
    chosen = parse(sys.argv[1:])
    outcome = asyncio.run(main(chosen))
    if chosen.json:
        print(json.dumps(outcome))
