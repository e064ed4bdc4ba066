"""Tokens a second of the whole system next to plain transformers on the same machine, in the same run.

    python -m bench.throughput            a table
    python -m bench.throughput --json     the same, and one JSON object as the last line

The system: NATS, Redis, scheduler, gateway and two workers of one thread each, over HTTP with streaming
clients. The baseline: plain transformers on two threads with all prompts in one batch. Both count everything
from the first byte of the request to the last token. The client runs on the same machine and is counted in.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.load import StreamResult, chat_prompts, percentile, stream_chat
from bench.system import RunningSystem, running_system


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    checkpoint = await _checkpoint(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--workers", str(arguments.workers), "--model", arguments.model, "--dtype", arguments.dtype]
        flags += ["--threads", str(arguments.threads), "--device", arguments.device]
        async with running_system(Path(folder) / "up.log", flags) as system:
            await _run_clients(system, 4, 16)  # first touches of memory and code are not what is measured
            cases = []
            for concurrency in arguments.concurrency:
                cases.append(await _measure(system, concurrency, checkpoint, arguments))
                print(_row(cases[-1]), flush=True)
            overhead = await _hop_overhead_ms(system, arguments.new_tokens)
            status = await system.status()
    workers: Any = status["workers"]
    report = {
        "cases": cases,
        "hop_overhead_ms": round(overhead, 3),
        "worker_rss_mb": [round(worker["rss_bytes"] / 2**20) for worker in workers],
    }
    print(f"overhead per hop {report['hop_overhead_ms']} ms; worker memory {report['worker_rss_mb']} MiB")
    return report


async def _measure(
    system: RunningSystem, concurrency: int, checkpoint: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One row: the median of the runs on both sides."""
    rates, results = [], list[StreamResult]()
    for _ in range(arguments.runs):
        started = time.perf_counter()
        streams = await _run_clients(system, concurrency, arguments.new_tokens)
        rates.append(sum(stream.completion_tokens for stream in streams) / (time.perf_counter() - started))
        results += streams
    baseline = await _transformers(concurrency, checkpoint, arguments)
    return {
        "concurrency": concurrency,
        "tokens_per_s": round(statistics.median(rates), 1),
        "tokens_per_s_min": round(min(rates), 1),
        "tokens_per_s_max": round(max(rates), 1),
        "transformers_tokens_per_s": round(baseline["tokens_per_s"], 1),
        "ratio": round(statistics.median(rates) / baseline["tokens_per_s"], 2),
        "ttft_p50_s": round(percentile([stream.ttft_s for stream in results], 0.5), 4),
        "tpot_p50_s": round(percentile([stream.tpot_s for stream in results], 0.5), 5),
    }


async def _run_clients(system: RunningSystem, concurrency: int, new_tokens: int) -> Sequence[StreamResult]:
    """`concurrency` clients at once, each with one prompt; every answer must be complete."""
    fixed = {"model": "demo", "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    streams = await asyncio.gather(
        *(stream_chat(system.port, {**fixed, "messages": messages}) for messages in chat_prompts(concurrency))
    )
    for stream in streams:
        if stream.error is not None or stream.completion_tokens != new_tokens:
            raise RuntimeError(f"a stream of {stream.completion_tokens} tokens: {stream.status} {stream.error}")
    return streams


async def _checkpoint(model: str) -> str:
    """The folder of the whole model, for transformers."""
    result = await _run_python("molink_stage_worker.models", model)
    return str(result["folder"])


async def _transformers(batch: int, checkpoint: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = ["bench.transformers_baseline", "--checkpoint", checkpoint]
    command += ["--batch", str(batch), "--threads", str(arguments.workers * arguments.threads)]
    command += ["--new-tokens", str(arguments.new_tokens), "--device", arguments.device, "--dtype", arguments.dtype]
    return await _run_python(*command)


async def _run_python(*command: str) -> dict[str, Any]:
    """Run a module and read the JSON object in its last line."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    out, _ = await asyncio.wait_for(process.communicate(), 600)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {out.decode(errors='replace')[-300:]}")
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


async def _hop_overhead_ms(system: RunningSystem, new_tokens: int) -> float:
    """What a step of one sequence takes beside the stages' computing, per hop (also tail → head is one)."""
    before = await _compute(system)
    streams = await _run_clients(system, 1, new_tokens)
    after = await _compute(system)
    step_s = streams[0].tpot_s
    compute_s = sum((b[0] - a[0]) / max(1, b[1] - a[1]) for a, b in zip(before, after, strict=True))
    return (step_s - compute_s) * 1e3 / len(after)


async def _compute(system: RunningSystem) -> list[tuple[float, int]]:
    """Compute seconds and steps of each stage so far. Heartbeats come every second: wait for a fresh one."""
    await asyncio.sleep(2.5)
    status: Any = await system.status()
    stages = [worker["stage"] for worker in status["workers"] if worker["stage"]]
    return [(stage["compute_s"], stage["steps_done"]) for stage in sorted(stages, key=lambda one: one["index"])]


def _row(case: dict[str, Any]) -> str:
    return (
        f"{case['concurrency']:4} concurrent  {case['tokens_per_s']:8.1f} tokens/s "
        f"(transformers {case['transformers_tokens_per_s']:.1f}, ratio {case['ratio']:.2f})  "
        f"TTFT p50 {case['ttft_p50_s'] * 1e3:.0f} ms  TPOT p50 {case['tpot_p50_s'] * 1e3:.1f} ms"
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--concurrency", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 16, 32])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="per worker")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


if __name__ == "__main__":
    chosen = parse(sys.argv[1:])
    outcome = asyncio.run(main(chosen))
    if chosen.json:
        print(json.dumps(outcome))
