"""Who starts a site's broker on a machine, who shares it, and when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from molink.embedded import free_port, is_listening
from molink.site_folder import RunningBroker, running_broker, site_folder
from molink_common.bus import BusSettings, open_bus

# a worker as far as its site's broker goes: it holds it until its standard input ends
USER = """
import sys
from pathlib import Path
from molink.site_worker import site_choice, use_site_broker
choice, _ = site_choice(sys.argv[2:], {})
with use_site_broker(choice, Path(sys.argv[1])) as url:
    print(url, flush=True)
    sys.stdin.read()
"""


class User:
    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process = process
        self.url = url

    async def leave(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        await self.process.wait()


async def start_user(cache: Path, hub_port: int) -> asyncio.subprocess.Process:
    flags = ["--site", "home", "--hub", f"nats://127.0.0.1:{hub_port}"]
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", USER, str(cache), *flags, stdin=pipe, stdout=pipe, stderr=pipe,
        env={**os.environ, "MOLINK_CACHE": str(cache)},
    )  # fmt: skip


@contextlib.asynccontextmanager
async def users(cache: Path, hub_port: int, count: int) -> AsyncIterator[list[User]]:
    """So many workers of one site, started at the same time."""
    async with asyncio.timeout(60):
        processes = [await start_user(cache, hub_port) for _ in range(count)]
        try:
            started = []
            for process in processes:
                assert process.stdout is not None
                url = (await process.stdout.readline()).decode().strip()
                assert url, "it did not start"
                started.append(User(process, url))
            yield started
        finally:
            for process in processes:
                if process.returncode is None:
                    process.kill()
                await process.communicate()


async def until_gone(cache: Path, broker: RunningBroker) -> None:
    """Neither it nor its server is left."""
    folder, port = site_folder(cache, "home"), int(broker.url.rpartition(":")[2])
    async with asyncio.timeout(20):
        # the end of a stranger's process tells nobody
        while running_broker(folder) == broker or is_listening(port):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def broker_of(cache: Path) -> RunningBroker:
    broker = running_broker(site_folder(cache, "home"))
    assert broker is not None
    return broker


async def test_workers_share_one_broker_that_ends_with_the_last_of_them(tmp_path: Path) -> None:
    hub_port = free_port()  # nobody listens there: a broker starts without its hub
    async with users(tmp_path, hub_port, 2) as (first, second):
        broker = broker_of(tmp_path)
        assert first.url == second.url == broker.url
        assert broker.joins == f"the hub at 127.0.0.1:{hub_port}"
        first.process.kill()
        await first.process.wait()
        async with open_bus(BusSettings(url=broker.url), name="test") as bus:
            await bus.flush()
        assert broker_of(tmp_path) == broker
        await second.leave()
        await until_gone(tmp_path, broker)


async def test_a_broker_that_dies_takes_its_server_along_and_the_next_worker_starts_another(tmp_path: Path) -> None:
    hub_port = free_port()
    async with users(tmp_path, hub_port, 1):
        broker = broker_of(tmp_path)
        os.kill(broker.pid, signal.SIGKILL)
        await until_gone(tmp_path, broker)
        async with users(tmp_path, hub_port, 1):
            next_broker = broker_of(tmp_path)
            assert next_broker.pid != broker.pid
    await until_gone(tmp_path, next_broker)


async def test_another_hub_for_the_same_site_is_refused(tmp_path: Path) -> None:
    async with users(tmp_path, free_port(), 1):
        broker = broker_of(tmp_path)
        process = await start_user(tmp_path, free_port())
        _, said = await process.communicate()
    await until_gone(tmp_path, broker)
    assert process.returncode == 1
    assert b"SettingsError: --hub: the broker of site home" in said


async def test_the_command_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    port = free_port()
    flags = ["--site", "home", "--port", str(port)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "molink", "broker", *flags,
        stderr=asyncio.subprocess.PIPE, env={**os.environ, "MOLINK_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert process.stderr is not None
    try:
        async with asyncio.timeout(30):
            assert f"nats://127.0.0.1:{port}".encode() in await process.stderr.readline()
            assert (site_folder(tmp_path, "home") / "nats.conf").stat().st_mode & 0o077 == 0
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    assert not is_listening(port)


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--site", "home", "--hub", "hub", "--cluster", "c"], 2, b"--hub and --cluster"),
        (["--hub", "hub"], 2, b"--site"),
    ],
)
async def test_wrong_flags_end_with_a_sentence(tmp_path: Path, flags: list[str], code: int, words: bytes) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "molink", "broker", *flags,
        stderr=asyncio.subprocess.PIPE, env={**os.environ, "MOLINK_CACHE": str(tmp_path)},
    )  # fmt: skip
    _, said = await process.communicate()
    assert process.returncode == code
    assert words in said
    assert b"Traceback" not in said
