"""How much of a link a long prompt gets, next to one plain TCP flow through the same link in the same run.

    python -m bench.goodput                    10, 100 and 1000 Mbit/s
    python -m bench.goodput --links 100m30 --json

A synthetic 70B on two hosts prefills one long prompt and nothing else; its activations are 16 KiB a token, so that
the link is the limit. Counted are the bytes that come through the tail's device in the middle of the prompt, less the
headers of full packets. What TCP is read to get counts for no more than the link carries of payload: bytes that
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

from bench import bounds
from bench.cost_curve import CostCurve
from bench.link_grid.cells import EngineKind, Setup, link_of
from bench.load import TokenTrace, trace_completion
from bench.netlab import probe
from bench.netlab.serving import ServingSystem, serving

_PROMPT_SHARE = 0.95
_EDGE_S = 1.5
_TCP_S = 5.0
_LOOK_EVERY_S = 0.1
_LEAST_LOOKS = 10


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
    """Payload bytes a second over the link while a prompt that fills most of the context is prefilled."""
    card = (await system.status())["card"]
    prompt = [200] * int(card["context_length"] * _PROMPT_SHARE)
    trace = TokenTrace(prompt_tokens=len(prompt), started_s=time.perf_counter())
    seen: list[probe.Seen] = []
    async with asyncio.TaskGroup() as tasks, probe.watched(system.lab, "a", "b", every_s=_LOOK_EVERY_S) as looks:
        asking = tasks.create_task(
            trace_completion(trace, host=system.host, port=system.port, model=card["name"], prompt=prompt, max_tokens=1)
        )
        async for look in looks:
            seen.append(look)
            if asking.done():
                break
    first_s, last_s = trace.started_s + _EDGE_S, trace.arrivals[0][0] - _EDGE_S
    inside = [one for one in seen if first_s <= one[0] <= last_s]
    if len(inside) < _LEAST_LOOKS:  # a fast link is done too soon: the whole prompt, its start and end included
        inside = [one for one in seen if trace.started_s <= one[0] <= trace.arrivals[0][0]]
    (from_s, had), (to_s, has) = inside[0], inside[-1]
    payload_bytes_per_s = bounds.payload_bytes_per_s((has - had) * 8 / (to_s - from_s))
    assert payload_bytes_per_s is not None, "only an unlimited link has no rate"
    return payload_bytes_per_s


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.goodput", description=__doc__)
    parser.add_argument("--links", type=lambda text: text.split(","), default=["10m30", "100m30", "100m100", "1g2"])
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    chosen = parse(sys.argv[1:])
    outcome = asyncio.run(main(chosen))
    print(json.dumps(outcome) if chosen.json else json.dumps(outcome, indent=2))
