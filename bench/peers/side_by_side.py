"""MoLink and llama.cpp's RPC backend by turns: the same clients, prompts, links and minutes.

    python -m bench.peers.side_by_side --link wan30 --concurrency 1,8,32          a table
    python -m bench.peers.side_by_side --link wan30 --concurrency 1,8,32 --json   and one JSON object as the last line

Both are up on the same two hosts of a laboratory (which needs root), with one thread a host. A run is a burst: so many
streams at once, each with a prompt of its own, for the one and then for the other; who is first changes with each run.
Whoever is not asked takes next to no processor time; how much is measured, too. Progress goes to stderr.

llama.cpp starts anew for each number of streams, with a slot for each and one more, and one pool of KV cells for all:
it then does best. Slots keep the cells of what they computed last. With 33 slots in one pool eight streams got 67
tokens a second after other loads instead of 78, and with cells of their own 22: 353 ms a token, about eight ways round.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.link_grid.measuring import processors_s
from bench.load import StreamResult
from bench.netlab.serving import serving
from bench.netlab.topology import two_hosts
from bench.peers.bursts import Endpoint, decode, figures, line, stall, tokens_per_s, under_way_after_s
from bench.peers.command import parser_of_bursts, run
from bench.peers.llama_cpp import LINKS
from bench.peers.llama_cpp_build import LlamaCpp
from bench.peers.llama_cpp_server import Slots, llama_rpc

MOLINK, LLAMA_CPP = "MoLink", "llama.cpp"
_IDLE_S = 3.0


async def main(arguments: argparse.Namespace, peer: LlamaCpp) -> dict[str, Any]:
    cases: list[dict[str, Any]] = []
    prompts = _Prompts()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with serving(
            two_hosts(LINKS[arguments.link]), folder / "molink", scheduler_flags=arguments.scheduler_flags.split()
        ) as system:
            for concurrency in arguments.concurrency:
                _say(f"{concurrency} streams: llama.cpp starts, and sends half of its weights over the link")
                slots = Slots(streams=concurrency, unified=True)
                async with llama_rpc(system.lab, near="a", far="b", peer=peer, folder=folder, slots=slots) as server:
                    cases.append(await _case({MOLINK: system, LLAMA_CPP: server}, concurrency, arguments, prompts))
    return {"link": arguments.link, "cases": cases, "build": peer.options}


class _Prompts:
    """Numbers of prompts that nobody has had yet."""

    def __init__(self) -> None:
        self._next = 0

    def of(self, concurrency: int) -> int:
        """The first of so many."""
        first = self._next
        self._next += concurrency
        return first


async def _case(
    engines: dict[str, Endpoint], concurrency: int, arguments: argparse.Namespace, prompts: _Prompts
) -> dict[str, Any]:
    """All runs of one concurrency, and then what a long prompt does to as many streams."""
    runs: dict[str, list[list[StreamResult]]] = {name: [] for name in engines}
    first = prompts.of(concurrency)
    for engine in engines.values():  # first touches, and what a planner has to learn
        await decode(engine, concurrency, arguments.new_tokens, first)
    busy_while_idle = await _idle_share()
    for number in range(arguments.runs):
        _say(f"{concurrency} streams, run {number + 1} of {arguments.runs}")
        first = prompts.of(concurrency)
        for name in sorted(engines, reverse=number % 2 == 1):
            runs[name].append(await decode(engines[name], concurrency, arguments.new_tokens, first))
    case: dict[str, Any] = {
        "concurrency": concurrency,
        "new_tokens": arguments.new_tokens,
        "busy_while_idle": busy_while_idle,
        **ratios(runs[MOLINK], runs[LLAMA_CPP]),
    }
    first = prompts.of(concurrency)
    for name, engine in engines.items():
        row = {"concurrency": concurrency, **figures(runs[name])}
        if arguments.prompt_tokens:
            delay_s = under_way_after_s(runs[name])
            row["stall"] = await stall(engine, concurrency, arguments.prompt_tokens, delay_s, first)
        case[name] = row
        print(f"{name:10}{line(row)}", flush=True)
    print(f"{'':10}{concurrency:4} concurrent  ratio {case['ratio']} ({case['ratio_min']} to {case['ratio_max']})")
    return case


def ratios(ours: Sequence[Sequence[StreamResult]], theirs: Sequence[Sequence[StreamResult]]) -> dict[str, float]:
    """Our tokens a second over theirs, run by run: in the middle, least and most."""
    found = [tokens_per_s(one) / tokens_per_s(other) for one, other in zip(ours, theirs, strict=True)]
    return {
        "ratio": round(statistics.median(found), 2),
        "ratio_min": round(min(found), 2),
        "ratio_max": round(max(found), 2),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def _idle_share() -> float:
    """The share of this machine's processors that is busy while nobody asks."""
    busy_s, idle_s = processors_s()
    await asyncio.sleep(_IDLE_S)
    later_busy_s, later_idle_s = processors_s()
    return round((later_busy_s - busy_s) / (later_busy_s - busy_s + later_idle_s - idle_s), 3)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = parser_of_bursts("side_by_side", __doc__, LINKS, new_tokens=64, runs=5)
    parser.add_argument("--scheduler-flags", default="", help='for MoLink, as "--speculation lookup"')
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse(sys.argv[1:]))
