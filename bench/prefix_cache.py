"""What the prefix cache saves: a chat of ten turns, and many requests with one long system prompt, with and without it.

    python -m bench.prefix_cache            a table
    python -m bench.prefix_cache --json     the same, and one JSON object as the last line

The system: NATS, Redis, scheduler, gateway and two workers of one thread each, over HTTP with streaming clients.
It is started twice, with the cache and without. Answers are greedy; both must be the same, word by word.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.load import StreamResult, percentile, stream_chat
from bench.system import RunningSystem, running_system

_QUESTIONS = (
    "I want to plant a small garden behind my house. Where do I begin?",
    "The soil is heavy clay. What do I do about that?",
    "Which vegetables are easy for somebody who has never grown any?",
    "How much water do tomatoes need in summer?",
    "Something eats the leaves of my cabbage. What may it be?",
    "I would rather not use poison. What else helps?",
    "When do I know that potatoes are ready?",
    "How do I keep them through the winter?",
    "What should I plant in the same place next year?",
    "Sum up in a few sentences what I should do in the first year.",
)
_RULE = "Rule {}: a guest who asks for item {} gets it at desk {} before noon and at desk {} after that. "


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    sides: dict[str, dict[str, Any]] = {}
    for name, value in (("with", "1"), ("without", "0")):
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--workers", str(arguments.workers), "--model", arguments.model, "--dtype", arguments.dtype]
            environment = {"MOLINK_PREFIX_CACHE": value}
            async with running_system(Path(folder) / "up.log", flags, environment=environment) as system:
                await _warm_up(system)
                chat = await _chat(system, arguments.turns)
                burst = await _burst(system, arguments.requests, arguments.rules)
                sides[name] = {"chat": chat, "burst": burst}
    report = {
        "turns": [
            {"turn": turn, **{side: _figures([sides[side]["chat"][turn - 1]]) for side in sides}}
            for turn in range(1, arguments.turns + 1)
        ],
        "burst": {side: _figures(sides[side]["burst"]) for side in sides},
        "same_chat": _same(sides, "chat"),
        "same_burst": _same(sides, "burst"),
    }
    _show(report)
    return report


async def _warm_up(system: RunningSystem) -> None:
    """First touches of memory and code are not what is measured."""
    for count in (1, 4):
        await asyncio.gather(
            *(_ask(system, [{"role": "system", "content": f"{count} {n}"}, *_user("Hello!")], 8) for n in range(count))
        )


async def _chat(system: RunningSystem, turns: int) -> list[StreamResult]:
    """One conversation; each turn sends all of it again."""
    messages = [{"role": "system", "content": "You are a gardener who answers in two or three sentences."}]
    results: list[StreamResult] = []
    for turn in range(turns):
        messages += _user(_QUESTIONS[turn % len(_QUESTIONS)])
        results.append(await _ask(system, messages, 64))
        messages.append({"role": "assistant", "content": results[-1].text})
    return results


async def _burst(system: RunningSystem, requests: int, rules: int) -> list[StreamResult]:
    """Many at once, who have a long system prompt in common."""
    rule = "".join(_RULE.format(n, n * 7 % 100, n % 9, (n + 4) % 9) for n in range(1, rules + 1))
    system_prompt = {"role": "system", "content": "You work in a hotel. " + rule}
    return list(
        await asyncio.gather(
            *(_ask(system, [system_prompt, *_user(f"Where do I get item {n * 7 % 100}?")], 16) for n in range(requests))
        )
    )


async def _ask(system: RunningSystem, messages: Sequence[dict[str, str]], max_tokens: int) -> StreamResult:
    result = await stream_chat(
        system.port, {"model": "demo", "max_tokens": max_tokens, "temperature": 0, "messages": list(messages)}
    )
    if result.error is not None or not result.token_times_s:
        raise RuntimeError(f"an answer without text: {result.status} {result.error}")
    return result


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _figures(results: Sequence[StreamResult]) -> dict[str, Any]:
    prompt, cached = sum(one.prompt_tokens for one in results), sum(one.cached_tokens for one in results)
    ttft = [one.ttft_s for one in results]
    return {
        "prompt_tokens": prompt,
        "computed_tokens": prompt - cached,
        "ttft_p50_ms": round(percentile(ttft, 0.5) * 1e3, 1),
        "ttft_max_ms": round(max(ttft) * 1e3, 1),
    }


def _same(sides: dict[str, dict[str, Any]], part: str) -> bool:
    texts = [[one.text for one in side[part]] for side in sides.values()]
    return all(one == texts[0] for one in texts)


def _show(report: dict[str, Any]) -> None:
    print("turn  prompt  computed            TTFT (ms)")
    print("                with  without       with  without")
    for row in report["turns"]:
        yes, no = row["with"], row["without"]
        print(
            f"{row['turn']:4} {no['prompt_tokens']:7} {yes['computed_tokens']:7} {no['computed_tokens']:8} "
            f"{yes['ttft_p50_ms']:10.0f} {no['ttft_p50_ms']:8.0f}"
        )
    for side, figures in report["burst"].items():
        print(
            f"burst {side:8} {figures['computed_tokens']:6} of {figures['prompt_tokens']} prompt tokens computed, "
            f"TTFT p50 {figures['ttft_p50_ms']:.0f} ms, longest {figures['ttft_max_ms']:.0f} ms"
        )
    print(f"same text: chat {report['same_chat']}, burst {report['same_burst']}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.prefix_cache", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rules", type=int, default=35, help="sentences of the long system prompt")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32", help="with bfloat16 the size of a pass shows in its numbers")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse(sys.argv[1:])
    report = asyncio.run(main(arguments))
    if arguments.json:
        print(json.dumps(report))
