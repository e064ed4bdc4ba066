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
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from bench.netlab.lab import open_lab
from bench.netlab.topology import LinkSpec, two_hosts
from bench.peers.bursts import decode, figures, line, stall, under_way_after_s
from bench.peers.command import parser_of_bursts, run
from bench.peers.llama_cpp_build import LlamaCpp
from bench.peers.llama_cpp_server import Lab, LlamaServer, Loopback, Slots, llama_rpc

LINKS = {
    "lan": None,
    "gbit2": LinkSpec(rate_bit_per_s=1e9, round_trip_s=0.002),
    "wan30": LinkSpec(rate_bit_per_s=100e6, round_trip_s=0.03),
    "wan100": LinkSpec(rate_bit_per_s=100e6, round_trip_s=0.1),
    "slow30": LinkSpec(rate_bit_per_s=10e6, round_trip_s=0.03),
}
LOOPBACK = "loopback"


async def _measure(server: LlamaServer, concurrency: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row. Prompts are new in each run, so that none is found in a cache."""
    runs = [
        await decode(server, concurrency, arguments.new_tokens, first=run * concurrency)
        for run in range(arguments.runs)
    ]
    row = {"concurrency": concurrency, "new_tokens": arguments.new_tokens, **figures(runs)}
    if arguments.prompt_tokens:
        first = arguments.runs * concurrency
        row["stall"] = await stall(server, concurrency, arguments.prompt_tokens, under_way_after_s(runs), first)
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
                print(line(rows[-1]), flush=True)
    return {"link": arguments.link, "load_s": round(server.load_s, 1), "cases": rows, "build": peer.options}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = parser_of_bursts("llama_cpp", __doc__, [LOOPBACK, *LINKS], new_tokens=48, runs=3)
    parser.add_argument("--batch-tokens", type=int, default=None, help="most tokens of a batch (llama.cpp: 2048)")
    parser.add_argument("--unified", action="store_true", help="one pool of KV cells for all streams")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse(sys.argv[1:]))
