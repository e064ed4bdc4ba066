"""llama.cpp with its layers on two hosts, joined by its RPC backend, as an OpenAI-compatible server to measure.

Each host computes with one thread. The near host's server computes the first half of the layers and the output head in
its own process, the far host's RPC worker the second half. This is the fastest order that was found: what crosses the
link is one activation each way, in one blocking round trip a step. With the head on the far host, as llama.cpp
chooses if it is left alone, every step sends the whole fp32 logits back. With a second RPC worker on the near host,
which allows the far half to come first, each step makes further blocking calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

from bench.peers.llama_cpp_build import LlamaCpp
from molink.embedded import free_port

#: Weights cross the link before the server is ready: 110 MB take 90 s at 10 Mbit/s.
_LOAD_TIMEOUT_S = 900.0
_LISTEN_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 5.0
_RETRY_S = 0.1
_NUM_LAYERS = 30
#: The embedding is the head too: SmolLM2 ties them.
_HEAD = "^(output|token_embd|output_norm).*"
_CONTEXT_PADDING = 256


class Lab(Protocol):
    """What is asked of the network laboratory."""

    def command(self, host: str, argv: Sequence[str]) -> list[str]:
        """`argv` so that it runs on `host`."""
        ...

    def address(self, host: str) -> str:
        """Where this process reaches `host`."""
        ...

    def link_address(self, host: str) -> str:
        """Where the other hosts reach `host`, over the shaped links."""
        ...


class Loopback:
    """No laboratory: every host is this machine."""

    def command(self, host: str, argv: Sequence[str]) -> list[str]:
        """See `Lab`."""
        return list(argv)

    def address(self, host: str) -> str:
        """See `Lab`."""
        return "127.0.0.1"

    def link_address(self, host: str) -> str:
        """See `Lab`."""
        return "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """What the server has room for at once, and how its batches are cut."""

    streams: int = 64
    stream_tokens: int = 160
    """Prompt and answer of one stream."""
    long_prompt_tokens: int = 1600
    """Room for one long prompt beside the streams."""
    batch_tokens: int | None = None
    """Most tokens of one batch, of all prompts and streams together; None: llama.cpp's own choice, 2048."""
    unified: bool = False
    """One pool of KV cells for all slots; else each slot has room for the long prompt, which takes more memory but no
    stream's attention then passes over the cells of the others."""

    @property
    def parallel(self) -> int:
        """Slots: one for each stream and one for the long prompt."""
        return self.streams + 1

    @property
    def context_tokens(self) -> int:
        """The whole context, in KV cells."""
        if self.unified:
            return self.streams * self.stream_tokens + self.long_prompt_tokens
        each = max(self.stream_tokens, self.long_prompt_tokens)
        return self.parallel * (-(-each // _CONTEXT_PADDING) * _CONTEXT_PADDING)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaServer:
    """A server that answers."""

    host: str
    port: int
    load_s: float
    """From its start to its first healthy answer: reading the model and sending the far host's half."""


def rpc_server_flags(port: int) -> list[str]:
    """Of ``ggml-rpc-server`` on a host."""
    return ["--host", "0.0.0.0", "--port", str(port), "--threads", "1"]


def server_flags(model: Path, port: int, rpc_server: str, slots: Slots) -> list[str]:
    """Of ``llama-server``. `rpc_server` is the far host's ``host:port``.

    Everything that is not said here is as llama.cpp has it.
    """
    flags = ["--model", str(model), "--host", "0.0.0.0", "--port", str(port), "--offline", "--no-ui"]
    flags += ["--rpc", rpc_server, "--device", "RPC0", "--split-mode", "layer", "--fit", "off"]
    # the last layers go to the far host; llama.cpp counts the output head as one more of them, so it is called back
    flags += ["--gpu-layers", str(_NUM_LAYERS // 2 + 1), "--override-tensor", f"{_HEAD}=CPU"]
    flags += ["--load-mode", "none"]
    flags += ["--threads", "1", "--threads-batch", "1"]
    flags += ["--parallel", str(slots.parallel), "--cont-batching", "--ctx-size", str(slots.context_tokens)]
    flags += ["--kv-unified" if slots.unified else "--no-kv-unified"]
    # saving idle slots to this host's memory would carry their KV cells across the link
    flags += ["--cache-ram", "0"]
    if slots.batch_tokens is not None:
        flags += ["--batch-size", str(slots.batch_tokens)]
    return flags


@contextlib.asynccontextmanager
async def llama_rpc(
    lab: Lab, *, near: str, far: str, peer: LlamaCpp, folder: Path, slots: Slots | None = None
) -> AsyncIterator[LlamaServer]:
    """Start the RPC worker on `far` and the server on `near`; stop both at the end. Logs go to `folder`.

    Raises:
        RuntimeError: one of them ended or was not ready in time; the message carries its last lines.
    """
    async with contextlib.AsyncExitStack() as stack:
        port = free_port()
        command = lab.command(far, [str(peer.rpc_server), *rpc_server_flags(port)])
        worker = await stack.enter_async_context(_running(command, folder / f"rpc-server-{port}.log"))
        await worker.until(_accepts(lab.address(far), port), _LISTEN_TIMEOUT_S)
        rpc_server = f"{lab.link_address(far)}:{port}"
        port = free_port()
        flags = server_flags(peer.model, port, rpc_server, slots or Slots())
        started = asyncio.get_running_loop().time()
        log = folder / f"llama-server-{port}.log"
        server = await stack.enter_async_context(_running(lab.command(near, [str(peer.server), *flags]), log))
        await server.until(_is_healthy(lab.address(near), port), _LOAD_TIMEOUT_S)
        load_s = asyncio.get_running_loop().time() - started
        yield LlamaServer(host=lab.address(near), port=port, load_s=load_s)


@dataclass(frozen=True, slots=True)
class _Running:
    process: asyncio.subprocess.Process
    log: Path

    async def until(self, is_ready: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
        """Ask again and again; a process cannot be waited for otherwise that only prints into a buffer."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while not await is_ready():
            if self.process.returncode is not None or loop.time() > deadline:
                last_lines = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
                raise RuntimeError(f"{self.log.stem} did not become ready:\n{last_lines}")
            await asyncio.sleep(_RETRY_S)


def _accepts(host: str, port: int) -> Callable[[], Awaitable[bool]]:
    async def accepts() -> bool:
        try:
            _, writer = await asyncio.open_connection(host, port)
        except OSError:
            return False
        # a worker serves one connection at a time: it must see this one end before the server's
        writer.close()
        await writer.wait_closed()
        return True

    return accepts


def _is_healthy(host: str, port: int) -> Callable[[], Awaitable[bool]]:
    async def is_healthy() -> bool:
        async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
            try:
                return (await client.get(f"http://{host}:{port}/health")).status_code == 200
            except httpx.HTTPError:
                return False

    return is_healthy


@contextlib.asynccontextmanager
async def _running(command: Sequence[str], log: Path) -> AsyncIterator[_Running]:
    """A process in a group of its own, ended with everything that it started."""
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield _Running(process, log)
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
                break
