"""How much of a link a long prompt gets, next to one plain TCP flow through the same link in the same run.

    python -m bench.goodput                    10, 100 and 1000 Mbit/s
    python -m bench.goodput --links 100m30 --json

A synthetic 70B on two hosts prefills one long prompt and nothing else; its activations are 16 KiB a token, so that
the link is the limit. Counted are the bytes of frames that the head's sender reports, between two of its heartbeats
in the middle of the prompt. What TCP is read to get counts for no more than the link carries of payload: bytes that
waited behind a lost packet, and came before the reading began, are read all at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.cost_curve import CostCurve
from bench.link_grid.cells import EngineKind, Setup, link_of
from bench.load import TokenTrace, trace_completion
from bench.netlab import probe
from bench.netlab.serving import ServingSystem, serving

_PROMPT_SHARE = 0.95
_EDGE_S = 1.5
_TCP_S = 5.0
_TOKEN_BYTES = 16 * 1024


async def main(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for link in arguments.links:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(await _measure(link, Path(folder)))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), file=sys.stderr, flush=True)
    return rows


async def _measure(link: str, folder: Path) -> dict[str, Any]:
    setup = Setup(engine=EngineKind.SYNTHETIC, stages=2, link=link, policy="adaptive")
    curve = replace(CostCurve(), layer_token_s=CostCurve().layer_token_s / 20)  # the link is to be the limit
    async with serving(
        setup.topology,
        folder,
        scheduler_flags=setup.scheduler_flags,
        worker_flags=setup.worker_flags(curve),
        worker_module=setup.worker_module,
    ) as system:
        tcp = await probe.measure(system.lab, "a", "b", seconds=_TCP_S)
        bulk_bytes_per_s = await _prefill(system)
    spec = link_of(link)
    most_bit_per_s = None if spec is None else probe.expected_goodput_bit_per_s(spec)
    tcp_bit_per_s = min(tcp.steady_goodput_bit_per_s, most_bit_per_s or math.inf)
    return {
        "link": link,
        "tcp_read_mbit_per_s": round(tcp.steady_goodput_bit_per_s / 1e6, 2),
        "tcp_mbit_per_s": round(tcp_bit_per_s / 1e6, 2),
        "prefill_mbit_per_s": round(bulk_bytes_per_s * 8 / 1e6, 2),
        "ratio": round(bulk_bytes_per_s * 8 / tcp_bit_per_s, 3),
    }


async def _prefill(system: ServingSystem) -> float:
    """Bytes a second of frames while a prompt that fills most of the context is prefilled."""
    status = await system.status()
    card = status["card"]
    prompt = [200] * int(card["context_length"] * _PROMPT_SHARE)
    trace = TokenTrace(prompt_tokens=len(prompt), started_s=time.perf_counter())
    seen: list[tuple[float, int]] = []
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(
            trace_completion(trace, host=system.host, port=system.port, model=card["name"], prompt=prompt, max_tokens=1)
        )
        while not asking.done():
            status = await system.status()
            head = next(worker for worker in status["workers"] if (worker["stage"] or {}).get("index") == 0)
            seen.append((time.perf_counter() - head["silent_s"], head["stage"]["link"]["sent_bytes"]))
            await asyncio.wait([asking], timeout=0.25)
    first_s, last_s = trace.started_s + _EDGE_S, trace.arrivals[0][0] - _EDGE_S
    inside = sorted((at_s, sent) for at_s, sent in seen if first_s <= at_s <= last_s)
    if len(inside) < 2 or inside[-1][0] - inside[0][0] < 1.0:
        # a fast link is done before two heartbeats are in: over the whole prompt, its start and end included
        return len(prompt) * _TOKEN_BYTES / (trace.arrivals[0][0] - trace.started_s)
    return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.goodput", description=__doc__)
    parser.add_argument("--links", type=lambda text: text.split(","), default=["10m30", "100m30", "100m100", "1g2"])
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    chosen = parse(sys.argv[1:])
    outcome = asyncio.run(main(chosen))
    print(json.dumps(outcome) if chosen.json else json.dumps(outcome, indent=2))
