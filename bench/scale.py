"""From two workers to five and back to two, under a steady load.

    python -m bench.scale --json

Timed workers (`timed_stage`): everything is real but the layers, which sleep as long as a slow GPU would compute, so
that a machine with few cores can show what further workers bring. Two of them make a pipeline; four make two, and the
fifth stands by. Workers leave by SIGTERM, one after the other, those of the first pipeline too. Told are the
throughput of each size, requests that failed, and the longest gap of any stream, in all and in the steady windows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from bench.cost_curve import CostCurve
from bench.fault_lab.parts import Plan
from bench.fault_lab.system import ChaosSystem, DidNotRun, running_system
from bench.link_grid.steady_load import LoadShape, SteadyLoad, Target, steady_load
from bench.load import RequestFailed
from bench.timed_worker_flags import curve_flags

_CURVE = CostCurve(layer_read_s=0.9e-3, layer_token_s=100e-6)
"""Slow enough for two pipelines to be limited by their stages and not by this machine's cores."""
_FEW, _MANY = 2, 5
_PIPELINE_WITHIN_S = 60.0
_LEAVE_WITHIN_S = 40.0
_LOOK_AGAIN_S = 0.2


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    plan = Plan(
        workers=_MANY,
        stages=2,
        schedulers=1,
        gateways=1,
        dtype="bfloat16",
        worker_memory_bytes=100 << 30,
        worker_module="bench.timed_worker",
        worker_flags=("--step-tokens", "1024", "--max-running", "128", *curve_flags(_CURVE)),
    )
    with contextlib.ExitStack() as stack:
        logs = arguments.logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        logs.mkdir(parents=True, exist_ok=True)
        async with running_system(plan, logs) as system:
            for name in plan.worker_names[_FEW:]:
                system.processes.kill(name)
            await _until_pipelines(system, 1)
            await _until_gateway(system)
            return await _scale(system, arguments)


async def _scale(system: ChaosSystem, arguments: argparse.Namespace) -> dict[str, Any]:
    state = await system.state()
    if state is None or state.card is None:
        raise DidNotRun("the scheduler names no model")
    target = Target(host="127.0.0.1", port=system.gateway_ports[0], model=state.card.name)
    windows: dict[str, float] = {}
    failed: str | None = None
    extra = system.plan.worker_names[_FEW:]
    gaps: dict[str, float] = {}
    requests = 0
    in_time: list[bool] = []
    try:
        async with steady_load(target, LoadShape(streams=arguments.streams)) as load:
            await load.until_warm(5.0, 60.0)
            windows["two"] = await _window(load, arguments.seconds, gaps, "two")
            began_s = time.perf_counter()
            for name in extra:
                await system.start_again(name)
            await _until_pipelines(system, 2)
            joined_s = time.perf_counter() - began_s
            await asyncio.sleep(arguments.settle_s)
            windows["five"] = await _window(load, arguments.seconds, gaps, "five")
            first = system.plan.worker_names[0]
            for name in (first, *extra[:-1]):
                in_time.append(await system.processes.leave(name, _LEAVE_WITHIN_S))
            await _until_pipelines(system, 1)
            await asyncio.sleep(arguments.settle_s)
            windows["two again"] = await _window(load, arguments.seconds, gaps, "two again")
            gaps["in all"] = _longest_gap_s(load, load.began_s, time.perf_counter())
            requests = sum(one.is_complete for one in load.streams)
    except (RequestFailed, OSError, TimeoutError) as error:
        failed = repr(error)
    return {
        "streams": arguments.streams,
        "tokens_per_s": {name: round(rate, 1) for name, rate in windows.items()},
        "five_to_two": round(windows["five"] / windows["two"], 2) if "five" in windows else None,
        "longest_gap_s": {name: round(gap_s, 2) for name, gap_s in gaps.items()},
        "second_pipeline_after_s": round(joined_s, 1) if "five" in windows else None,
        "left_in_time": in_time,
        "requests": requests,
        "failed": failed,
    }


async def _window(load: SteadyLoad, seconds: float, gaps: dict[str, float], name: str) -> float:
    """Tokens a second from now on."""
    from_s = time.perf_counter()
    await asyncio.sleep(seconds)
    until_s = time.perf_counter()
    gaps[name] = _longest_gap_s(load, from_s, until_s)
    tokens = sum(count for one in load.streams for at_s, count in one.arrivals if from_s <= at_s < until_s)
    return tokens / (until_s - from_s)


def _longest_gap_s(load: SteadyLoad, from_s: float, until_s: float) -> float:
    """Between two tokens of one answer."""
    longest_s = 0.0
    for one in load.streams:
        times = [at_s for at_s, _ in one.arrivals if from_s <= at_s <= until_s]
        longest_s = max([longest_s, *(later - earlier for earlier, later in pairwise(times))])
    return longest_s


async def _until_pipelines(system: ChaosSystem, count: int) -> None:
    """Wait until so many pipelines serve, and no more.

    Raises:
        DidNotRun: within a minute they do not.
    """
    deadline_s = time.monotonic() + _PIPELINE_WITHIN_S
    while True:
        state = await system.state()
        if state is not None and sum(one.ready for one in state.pipelines) == count:
            return
        if time.monotonic() > deadline_s:
            raise DidNotRun(f"no {count} pipelines: {state.reason if state is not None else 'no scheduler answers'}")
        await asyncio.sleep(_LOOK_AGAIN_S)  # nobody tells of this


async def _until_gateway(system: ChaosSystem) -> None:
    """Wait until the gateway has the model's tokenizer.

    Raises:
        DidNotRun: within a minute it has not.
    """
    deadline_s = time.monotonic() + _PIPELINE_WITHIN_S
    async with httpx.AsyncClient(trust_env=False) as client:
        while (await client.get(f"http://127.0.0.1:{system.gateway_ports[0]}/ready")).status_code != httpx.codes.OK:
            if time.monotonic() > deadline_s:
                raise DidNotRun("the gateway does not become ready")
            await asyncio.sleep(_LOOK_AGAIN_S)  # nobody tells of this


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--streams", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each window")
    parser.add_argument("--settle-s", type=float, default=6.0, help="between a change and the window after it")
    parser.add_argument("--logs", type=Path, default=None, help="folder for the parts' logs; none: not kept")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    chosen = parse(sys.argv[1:])
    outcome = asyncio.run(main(chosen))
    print(json.dumps(outcome) if chosen.json else json.dumps(outcome, indent=2))
