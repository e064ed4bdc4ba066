"""Two API keys: one floods with 100 streams, the other sends one request at a time. How long does that one wait?

    python -m bench.fairness          a table
    python -m bench.fairness --json   the same, and one JSON object as the last line

The whole system on this machine, clients too. Measured first: the polite one alone and the flood alone. Then both
together. Short prompts are of about a hundred tokens, long ones of about five hundred.
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

from bench.load import StreamResult, percentile
from bench.open_loop import Workload, answered, figures, keep_busy, one_request
from bench.system import RunningSystem, running_system
from molink.embedded import start_nats

_FLOOD_SETTLES_S = 8.0


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        nats = start_nats(folder)
        try:
            flags = ["--workers", str(arguments.workers), "--dtype", "bfloat16", "--nats", nats.url]
            environment = {"MOLINK_TTFT_TARGET_S": str(arguments.ttft_target_s)}
            async with running_system(folder / "up.log", flags, environment) as system:
                keys = {name: await _new_key(name, nats.url) for name in ("flood", "polite")}
                return await _measure(system, keys, arguments)
        finally:
            nats.stop()


async def _measure(system: RunningSystem, keys: dict[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    dice = random.Random(arguments.seed)
    flood = Workload(prompt_words=60, new_tokens=arguments.flood_tokens)
    await keep_busy(system.port, flood, streams=8, seconds=2, dice=dice, key=keys["polite"])
    report: dict[str, Any] = {"streams": arguments.streams, "cases": []}
    alone: dict[int, list[StreamResult]] = {}
    for words in arguments.prompt_words:
        alone[words] = await _polite(system, words, keys["polite"], dice, arguments)
    report["flood_alone"] = await _flooded(system, flood, keys["flood"], arguments, None)
    for words in arguments.prompt_words:
        together: list[StreamResult] = []

        async def polite(words: int = words, results: list[StreamResult] = together) -> None:
            results += await _polite(system, words, keys["polite"], dice, arguments)

        of_flood = await _flooded(system, flood, keys["flood"], arguments, polite)
        case = _case(words, alone[words], together, of_flood)
        report["cases"].append(case)
        print(_line(case), flush=True)
    print(f"the flood alone: {report['flood_alone']['tokens_per_s']} tokens/s", flush=True)
    return report


async def _flooded(system: RunningSystem, flood: Workload, key: str, arguments: argparse.Namespace, beside: Any) -> Any:
    """What the flood gets while `beside` runs; without one, for as long as a measurement takes."""
    began_s = time.perf_counter() + _FLOOD_SETTLES_S
    stop = asyncio.Event()
    results: list[StreamResult] = []

    async def client(number: int) -> None:
        dice = random.Random(arguments.seed * 1000 + number)
        while not stop.is_set():
            results.append(await one_request(system.port, flood.body(dice), key))
            if results[-1].status == 429:
                await asyncio.sleep(dice.uniform(0.5, 1.5))

    async with asyncio.TaskGroup() as group:
        for number in range(arguments.streams):
            group.create_task(client(number))
        await asyncio.sleep(_FLOOD_SETTLES_S)
        if beside is None:
            await asyncio.sleep(arguments.seconds)
        else:
            await beside()
        seconds = time.perf_counter() - began_s
        stop.set()
    return figures(results, began_s=began_s, seconds=seconds)


async def _polite(
    system: RunningSystem, words: int, key: str, dice: random.Random, arguments: argparse.Namespace
) -> list[StreamResult]:
    """One request after the other."""
    workload = Workload(prompt_words=words, new_tokens=arguments.polite_tokens)
    results = [await one_request(system.port, workload.body(dice), key) for _ in range(arguments.requests)]
    if len(answered(results)) != len(results):
        failed = next(one for one in results if one not in answered(results))
        raise RuntimeError(f"a polite request got {failed.status}: {failed.error}")
    return results


def _case(words: int, alone: Sequence[StreamResult], together: Sequence[StreamResult], flood: Any) -> dict[str, Any]:
    def p50_ms(results: Sequence[StreamResult], name: str) -> float:
        return round(percentile([getattr(one, name) for one in results], 0.5) * 1e3, 1)

    alone_ms, together_ms = p50_ms(alone, "ttft_s"), p50_ms(together, "ttft_s")
    return {
        "prompt_words": words,
        "requests": len(together),
        "ttft_p50_alone_ms": alone_ms,
        "ttft_p50_beside_flood_ms": together_ms,
        "ttft_max_beside_flood_ms": round(max(one.ttft_s for one in together) * 1e3, 1),
        "ratio": round(together_ms / alone_ms, 2),
        "tpot_p50_alone_ms": p50_ms(alone, "tpot_s"),
        "tpot_p50_beside_flood_ms": p50_ms(together, "tpot_s"),
        "flood_ttft_p50_ms": flood["ttft_p50_ms"],
        "flood_tokens_per_s": flood["tokens_per_s"],
        "flood_refused_share": flood["refused_share"],
        "flood_failed": flood["failed"],
    }


def _line(case: dict[str, Any]) -> str:
    return (
        f"prompts of {case['prompt_words']:3} words: TTFT p50 {case['ttft_p50_alone_ms']:.0f} ms alone, "
        f"{case['ttft_p50_beside_flood_ms']:.0f} beside the flood (ratio {case['ratio']:.2f}, "
        f"at most {case['ttft_max_beside_flood_ms']:.0f}); flood {case['flood_tokens_per_s']:.0f} tokens/s, "
        f"its TTFT p50 {case['flood_ttft_p50_ms'] or 0:.0f} ms, refused {case['flood_refused_share']:.0%}"
    )


async def _new_key(name: str, nats_url: str) -> str:
    command = [sys.executable, "-m", "molink", "keys", "add", name, "--nats-url", nats_url]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, problem = await asyncio.wait_for(process.communicate(), 60)
    if process.returncode != 0:
        raise RuntimeError(f"no key could be added: {problem.decode(errors='replace')[-300:]}")
    return out.decode().strip()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.fairness", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--streams", type=int, default=100, help="of the flood")
    parser.add_argument("--requests", type=int, default=15, help="of the polite one, of each length")
    parser.add_argument("--prompt-words", type=lambda text: [int(n) for n in text.split(",")], default=[60, 400])
    parser.add_argument("--polite-tokens", type=int, default=16)
    parser.add_argument("--flood-tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=15.0, help="the flood alone")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ttft-target-s", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(argv)


if __name__ == "__main__":
    chosen = parse(sys.argv[1:])
    outcome = asyncio.run(main(chosen))
    if chosen.json:
        print(json.dumps(outcome))
