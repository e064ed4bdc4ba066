"""A system for the clients: started, with one API key added as an operator adds it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from bench.system import running_system

_NATS_URL = re.compile(r"molink keys add NAME --nats-url (\S+)")
_PRINTED_TIMEOUT_S = 60.0
_KEY_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where a client asks, and with which key."""

    url: str
    """Without /v1."""
    api_key: str


@contextlib.asynccontextmanager
async def started_server(model: str) -> AsyncIterator[Server]:
    """`molink up` for as long as the context lasts; whoever has no key is refused.

    Raises:
        RuntimeError: it did not become ready, or the key could not be added.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "up.log"
        async with running_system(log, ["--model", model]) as system:
            yield Server(url=system.url, api_key=await _new_key(await asyncio.to_thread(_nats_url, log)))


def _nats_url(log: Path) -> str:
    """What `molink up` prints at last, for `molink keys`."""
    deadline = time.monotonic() + _PRINTED_TIMEOUT_S
    while (found := _NATS_URL.search(log.read_text(errors="replace"))) is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"`molink up` printed no NATS address:\n{log.read_text(errors='replace')}")
        time.sleep(0.1)  # a file has no way to tell that it grew
    return found[1]


async def _new_key(nats_url: str) -> str:
    command = [sys.executable, "-m", "molink", "keys", "add", "clients", "--nats-url", nats_url]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        secret, said = await asyncio.wait_for(process.communicate(), _KEY_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        raise
    if process.returncode != 0:
        raise RuntimeError(f"no key could be added: {said.decode(errors='replace')}")
    return secret.decode().strip()
