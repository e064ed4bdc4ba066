"""What the clients of llama.cpp see when one of its two RPC workers is killed.

    python -m bench.peers.llama_cpp_kill --json

Its server shares the layers between two RPC workers on this machine; clients stream; one worker gets SIGKILL. Reported:
how many streams were cut and after how long, whether the server is still there, and whether it answers again once the
worker has been started again on its port. The build comes from ``bench.peers.llama_cpp_build``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson

from bench.fault_lab.processes import Processes
from bench.load import StreamResult, chat_prompts, percentile, stream_chat
from bench.peers.llama_cpp_build import VERSION, LlamaCpp, ensure_llama_cpp
from bench.peers.llama_cpp_server import rpc_server_flags
from molink.embedded import free_port
from molink.parts import Kind, Part
from molink_common.errors import MolinkError

_READY_TIMEOUT_S = 120.0
_WATCH_S = 60.0
_LOOK_AGAIN_S = 0.1
_NUM_LAYERS = 30
_CONTEXT_TOKENS = 512
_SERVER = "llama-server"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSeen:
    """One stream around the kill. Times are seconds on one monotonic clock."""

    num_tokens: int
    wanted_tokens: int
    ended_s: float
    problem: str | None
    """What the client was told; None: it read to the end."""

    @property
    def is_cut(self) -> bool:
        """Whether it did not get all its tokens."""
        return self.problem is not None or self.num_tokens < self.wanted_tokens


def judge(streams: Sequence[StreamSeen], *, killed_s: float) -> dict[str, Any]:
    """What the clients saw. Decisions only."""
    cut = [stream for stream in streams if stream.is_cut]
    after_s = [stream.ended_s - killed_s for stream in cut]
    return {
        "streams": len(streams),
        "streams_cut": len(cut),
        "tokens_lost": sum(stream.wanted_tokens - stream.num_tokens for stream in cut),
        "cut_after_p50_s": round(percentile(after_s, 0.5), 3) if after_s else None,
        "cut_after_max_s": round(max(after_s), 3) if after_s else None,
        "told": dict(Counter(stream.problem or "an early end" for stream in cut)),
    }


def server_flags(model: Path, port: int, rpc_ports: Sequence[int], streams: int) -> list[str]:
    """Of ``llama-server`` with every layer on the RPC workers, shared equally. Else as llama.cpp has it."""
    flags = ["--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--offline", "--no-ui"]
    flags += ["--rpc", ",".join(f"127.0.0.1:{each}" for each in rpc_ports)]
    flags += ["--device", ",".join(f"RPC{number}" for number in range(len(rpc_ports)))]
    flags += ["--split-mode", "layer", "--fit", "off", "--gpu-layers", str(_NUM_LAYERS + 1), "--load-mode", "none"]
    flags += ["--threads", "1", "--threads-batch", "1", "--cache-ram", "0"]
    return [*flags, "--parallel", str(streams), "--cont-batching", "--ctx-size", str(streams * _CONTEXT_TOKENS)]


async def main(arguments: argparse.Namespace, peer: LlamaCpp) -> dict[str, Any]:
    task = asyncio.current_task()
    if task is not None and sys.platform != "win32":
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with tempfile.TemporaryDirectory() as folder, Processes.open() as processes:
        rpc_ports = [free_port(), free_port()]
        workers = [_part(f"rpc-server-{port}", folder, [str(peer.rpc_server), *rpc_server_flags(port)], port)
                   for port in rpc_ports]  # fmt: skip
        for worker in workers:
            processes.start(worker)
            await processes.until_listening(worker.name)
        port = free_port()
        flags = server_flags(peer.model, port, rpc_ports, arguments.clients)
        processes.start(_part(_SERVER, folder, [str(peer.server), *flags], port))
        if not await _is_healthy(port, within_s=_READY_TIMEOUT_S):
            raise MolinkError(f"llama-server is not ready after {_READY_TIMEOUT_S:g} s")
        async with asyncio.TaskGroup() as tasks:
            clients = [
                tasks.create_task(_stream(port, messages, arguments.new_tokens))
                for messages in chat_prompts(arguments.clients)
            ]
            await asyncio.sleep(arguments.after_s)
            running = sum(1 for client in clients if not client.done())
            killed_s = time.perf_counter()
            processes.kill(workers[-1].name)
        seen = judge([client.result() for client in clients], killed_s=killed_s)
        alive = processes.is_running(_SERVER)
        processes.start(workers[-1])
        await processes.until_listening(workers[-1].name)
        answers = alive and await _answers(port)
        return {
            "peer": f"llama.cpp of llama-cpp-python {VERSION}",
            "rpc_workers": len(rpc_ports),
            "running_at_the_kill": running,
            **seen,
            "server_alive": alive,
            "server_answers_when_the_worker_is_back": answers,
            "seconds": round(time.perf_counter() - killed_s, 1),
        }


def _part(name: str, folder: str, command: Sequence[str], port: int) -> Part:
    return Part(name=name, kind=Kind.WORKER, command=tuple(command), log=Path(folder) / f"{name}.log", port=port)


async def _stream(port: int, messages: list[dict[str, str]], new_tokens: int) -> StreamSeen:
    """One answer, with every failure as a result."""
    body = {"messages": messages, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    result: StreamResult | None = None
    try:
        async with asyncio.timeout(_WATCH_S):
            result = await stream_chat(port, body)
        problem = result.error if result.finish_reason is not None else result.error or "the connection was closed"
    except TimeoutError:
        problem = f"nothing for {_WATCH_S:g} s"
    except (OSError, IndexError, ValueError) as error:
        problem = f"the connection broke: {type(error).__name__}"
    num_tokens = 0 if result is None else result.completion_tokens or len(result.token_times_s)
    return StreamSeen(num_tokens=num_tokens, wanted_tokens=new_tokens, ended_s=time.perf_counter(), problem=problem)


async def _is_healthy(port: int, *, within_s: float) -> bool:
    deadline_s = time.monotonic() + within_s
    async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
        while time.monotonic() < deadline_s:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"http://127.0.0.1:{port}/health")).status_code == httpx.codes.OK:
                    return True
            await asyncio.sleep(_LOOK_AGAIN_S)  # HTTP has no way to be told
    return False


async def _answers(port: int) -> bool:
    """Whether it gives one short answer."""
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "stream": False}
    async with httpx.AsyncClient(timeout=_WATCH_S, trust_env=False) as client:
        try:
            answer = await client.post(f"http://127.0.0.1:{port}/v1/chat/completions", content=orjson.dumps(body))
        except httpx.HTTPError:
            return False
        return answer.status_code == httpx.codes.OK


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.peers.llama_cpp_kill", description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=300)
    parser.add_argument("--after-s", type=float, default=4.0, help="how long they stream until the kill")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser.parse_args(argv)


if __name__ == "__main__":
    given = parse(sys.argv[1:])
    try:
        outcome = asyncio.run(main(given, ensure_llama_cpp()))
    except* MolinkError as errors:
        sys.exit(f"error: {errors.exceptions[0]}")
    print(json.dumps(outcome) if given.json else json.dumps(outcome, indent=2))
