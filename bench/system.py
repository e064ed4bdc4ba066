"""The whole system for a measurement: ``molink up`` in a process group of its own, and its status."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import httpx

from molink.embedded import free_port

_READY_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningSystem:
    """A system that answers."""

    port: int

    @property
    def url(self) -> str:
        """The gateway's address."""
        return f"http://127.0.0.1:{self.port}"

    async def status(self) -> dict[str, object]:
        """What ``molink status --json`` prints."""
        async with httpx.AsyncClient(timeout=10) as client:
            answer = await client.get(f"{self.url}/molink/status")
            answer.raise_for_status()
            body: dict[str, object] = answer.json()
            return body


@contextlib.asynccontextmanager
async def running_system(
    log: Path, flags: Sequence[str], environment: Mapping[str, str] = MappingProxyType({})
) -> AsyncIterator[RunningSystem]:
    """Start ``molink up`` with `flags`, wait until it can answer, and stop it at the end.

    `environment` is for settings of the services that are no flags of ``molink up``.

    Raises:
        RuntimeError: it ended or was not ready in time; the message carries its last lines.
    """
    task = asyncio.current_task()
    if task is not None and sys.platform != "win32":
        # a measurement that is ended from outside must not leave the system behind
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    port = free_port()
    command = [sys.executable, "-m", "molink", "up", "--port", str(port), "--no-sample", *flags]
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env={**os.environ, **environment},
        )
    try:
        await _until_ready(process, port, log)
        yield RunningSystem(port=port)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            try:
                await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
            except TimeoutError:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()


async def _until_ready(process: asyncio.subprocess.Process, port: int, log: Path) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _READY_TIMEOUT_S
    async with httpx.AsyncClient(timeout=5) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"http://127.0.0.1:{port}/ready")).status_code == 200:
                    return
            if process.returncode is not None or loop.time() > deadline:
                raise RuntimeError("the system did not become ready:\n" + _last_lines(log))
            await asyncio.sleep(0.2)


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
