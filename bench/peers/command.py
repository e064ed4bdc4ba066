"""What the commands that measure bursts have in common: their flags, and how they begin and end."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from bench.peers.llama_cpp_build import LlamaCpp, ensure_llama_cpp
from molink_common.errors import MolinkError


def parser_of_bursts(
    name: str, description: str | None, links: Iterable[str], *, new_tokens: int, runs: int
) -> argparse.ArgumentParser:
    """Of ``python -m bench.peers.NAME``, with what `new_tokens` and `runs` are if nobody says otherwise."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.peers.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--link", choices=list(links), default="wan30")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--concurrency", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=new_tokens)
    parser.add_argument("--runs", type=int, default=runs)
    parser.add_argument("--prompt-tokens", type=int, default=1500, help="of the long prompt; 0 leaves it out")
    return parser


def run(
    main: Callable[[argparse.Namespace, LlamaCpp], Awaitable[dict[str, Any]]], arguments: argparse.Namespace
) -> None:
    """Build llama.cpp if need be, measure, and print the report if it is asked for.

    Raises:
        SystemExit: it could not be measured; the message says why.
    """
    began_s = time.monotonic()

    async def measured() -> dict[str, Any]:
        return await main(arguments, peer)

    try:
        peer = ensure_llama_cpp()
        report = asyncio.run(measured())
    except* (MolinkError, RuntimeError) as errors:
        sys.exit(f"error: {errors.exceptions[0]}")
    if arguments.json:
        print(json.dumps(report | {"seconds": round(time.monotonic() - began_s, 1)}))
