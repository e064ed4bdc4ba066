"""The gateway as a process of its own: how it starts, what it loads, how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from molink.embedded import EmbeddedServer, free_port
from molink_common.bus import NatsBus
from molink_common.messages import FinishReason
from tests.integration.test_gateway_pool import (
    FakePool,
    silent_pool,
    submitted,
    token_of,
    until_healthy,
)

BODY: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}
CHAT = "/v1/chat/completions"
END = 2


@pytest.fixture
async def pool(bus: NatsBus, tmp_path: Path) -> AsyncIterator[FakePool]:
    async with silent_pool(bus, tmp_path) as pool:
        yield pool


def libraries_of(pid: int) -> str:
    maps = Path(f"/proc/{pid}/maps")  # only Linux tells
    return maps.read_text() if maps.exists() else ""


async def run_as_process(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "molink_gateway", *arguments, stderr=asyncio.subprocess.PIPE, env={**os.environ}
    )


async def test_a_taken_port_is_one_clear_line(nats_server: EmbeddedServer) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = await run_as_process("--port", str(port), "--nats-url", nats_server.url, "--log-style", "text")
        _, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 1
    assert len(err.decode().strip().splitlines()) == 1
    assert f"127.0.0.1:{port}" in err.decode()


async def test_the_process_serves_without_torch_and_ends_at_sigterm(
    pool: FakePool, nats_server: EmbeddedServer
) -> None:
    port = free_port()
    process = await run_as_process("--port", str(port), "--nats-url", nats_server.url)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            await until_healthy(client)
            asking = asyncio.create_task(client.post(CHAT, json=BODY))
            sequence = (await submitted(pool)).sequence
            assert "libtorch" not in libraries_of(process.pid)
            process.send_signal(signal.SIGTERM)
            await pool.say(sequence, 0, token_of(pool, "a"))
            await pool.say(sequence, 1, END, FinishReason.STOP)
            assert (await asking).json()["choices"][0]["message"]["content"] == "a"
        _, err = await asyncio.wait_for(process.communicate(), 15)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    line = next(json.loads(line) for line in err.decode().splitlines() if CHAT in line)
    assert (line["status"], line["tokens"], line["model"]) == (200, 2, "Small-Test")
    assert line["ttft_s"] <= line["duration_s"]
    assert "Hello" not in err.decode()
