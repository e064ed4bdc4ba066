"""Every broker that MoLink configures tells the pool of a client whose connection has ended, wherever it was."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from molink.embedded import EmbeddedServer, find_nats_server, free_port, is_listening, start_nats
from molink.nats_config import BrokerPlan, Credentials, LeafDoor, render, site_config
from molink_common import subjects
from molink_common.bus import BusSettings, Incoming, NatsBus, open_bus
from molink_common.errors import BusUnavailable

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
POOL = Credentials(user="pool", password="secret")

# A client in a process of its own, which can be killed; it says when it is connected.
CLIENT = """
import asyncio, sys
from molink_common.bus import BusSettings, open_bus

async def main(url, user, password):
    async with open_bus(BusSettings(url=url, user=user or None, password=password or None), name="worker-7"):
        print("connected", flush=True)
        await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


async def kill_a_client(url: str, credentials: Credentials | None = None) -> float:
    """When it was killed, by this process's clock."""
    user, password = ("", "") if credentials is None else (credentials.user, credentials.password)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, url, user, password, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), 20) == b"connected\n"
    killed_at_s = time.perf_counter()
    process.kill()
    await process.wait()
    return killed_at_s


@contextlib.asynccontextmanager
async def listening(url: str, credentials: Credentials | None = None) -> AsyncIterator[asyncio.Queue[bytes]]:
    """What a scheduler there hears."""
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def hear(incoming: Incoming) -> None:
        heard.put_nowait(incoming.data)

    user, password = (None, None) if credentials is None else (credentials.user, credentials.password)
    async with open_bus(BusSettings(url=url, user=user, password=password), name="scheduler") as bus:
        await bus.subscribe(subjects.BROKER_DISCONNECTS, hear)
        await bus.flush()
        yield heard


async def until_worker(heard: asyncio.Queue[bytes]) -> str:
    """Why the client's connection ended."""
    async with asyncio.timeout(10):
        while True:
            said = json.loads(await heard.get())
            if said["client"]["name"] == "worker-7":
                return str(said["reason"])


async def until_each_hears(here: NatsBus, there: NatsBus) -> None:
    """Brokers learn of each other's subscribers in their own time."""
    arrived = asyncio.Event()

    async def hear(_: Incoming) -> None:
        arrived.set()

    await there.subscribe("probe", hear)
    async with asyncio.timeout(10):
        while not arrived.is_set():
            await here.publish("probe", b"")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(arrived.wait(), 0.05)


@contextlib.contextmanager
def running(config: Path, port: int, environment: dict[str, str] | None = None) -> Iterator[str]:
    """A nats-server with this configuration; gives its address."""
    command = [str(find_nats_server()), "-c", str(config)]
    with config.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(command, env={**os.environ, **(environment or {})}, stdout=log, stderr=log)
    try:
        deadline_s = time.monotonic() + 10
        while not is_listening(port):
            assert process.poll() is None and time.monotonic() < deadline_s, config.with_suffix(".log").read_text()
            time.sleep(0.01)
        yield f"nats://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def site(folder: Path, plan: BrokerPlan) -> Iterator[str]:
    config = folder / f"{plan.server_name}.conf"
    config.write_text(render(site_config(plan)))
    with running(config, plan.port) as url:
        yield url


async def test_the_pools_own_broker_tells_of_a_killed_client_at_once(nats_server: EmbeddedServer) -> None:
    async with listening(nats_server.url) as heard:
        killed_at_s = await kill_a_client(nats_server.url)
        assert await until_worker(heard) == "Client Closed"
        assert time.perf_counter() - killed_at_s < 0.5, "milliseconds, on a machine with nothing else to do"


async def test_a_frozen_client_is_not_told_of(tmp_path: Path) -> None:
    server = start_nats(tmp_path)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, server.url, "", "", stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        await asyncio.wait_for(process.stdout.readline(), 20)
        async with listening(server.url) as heard:
            process.send_signal(signal.SIGSTOP)
            await kill_a_client(server.url)
            assert await until_worker(heard) == "Client Closed"
            assert heard.empty(), "only the one that was killed"
    finally:
        process.kill()
        await process.wait()
        server.stop()


@pytest.mark.parametrize("credentials", [POOL, None], ids=["password", "open"])
async def test_the_hub_hears_of_a_leafs_client_too(tmp_path: Path, credentials: Credentials | None) -> None:
    door = LeafDoor(host="127.0.0.1", port=free_port(), credentials=credentials)
    plan = BrokerPlan(
        site="home", server_name="leaf", port=free_port(), hub=(f"127.0.0.1:{door.port}",), credentials=credentials
    )
    hub = start_nats(tmp_path, leaf_door=door)
    try:
        with site(tmp_path, plan) as leaf_url:
            async with (
                listening(hub.url) as heard,
                connected(leaf_url, credentials) as here,
                connected(hub.url) as there,
            ):
                await until_each_hears(here, there)
                await kill_a_client(leaf_url, credentials)
                assert await until_worker(heard) == "Client Closed"
                await kill_a_client(hub.url)
                assert await until_worker(heard) == "Client Closed"
                assert heard.empty(), "each once"
    finally:
        hub.stop()


@contextlib.asynccontextmanager
async def connected(url: str, credentials: Credentials | None = None) -> AsyncIterator[NatsBus]:
    user, password = (None, None) if credentials is None else (credentials.user, credentials.password)
    async with open_bus(BusSettings(url=url, user=user, password=password), name="test") as bus:
        yield bus


async def test_every_broker_of_a_cluster_hears_of_every_client(tmp_path: Path) -> None:
    doors = {"a": free_port(), "b": free_port()}
    routes = tuple(f"127.0.0.1:{port}" for port in doors.values())
    plans = [
        BrokerPlan(
            site=name,
            server_name=name,
            port=free_port(),
            cluster="pool",
            cluster_port=port,
            routes=routes,
            peers_host="127.0.0.1",
            credentials=POOL,
        )
        for name, port in doors.items()
    ]
    with site(tmp_path, plans[0]) as a, site(tmp_path, plans[1]) as b:
        async with listening(a, POOL) as heard, connected(a, POOL) as here, connected(b, POOL) as there:
            await until_each_hears(here, there)
            await until_each_hears(there, here)
            await kill_a_client(b, POOL)
            assert await until_worker(heard) == "Client Closed"
            assert heard.empty(), "once"


async def test_the_brokers_of_the_containers_do_the_same(tmp_path: Path) -> None:
    ports = {"0.0.0.0:4222": free_port(), "127.0.0.1:8222": free_port(), "0.0.0.0:7422": free_port()}
    hub, leaf = tmp_path / "hub", tmp_path / "leaf"
    user = {
        "MOLINK_NATS_USER": POOL.user,
        "MOLINK_NATS_PASSWORD": POOL.password,
        "NATS_OPERATOR_PASSWORD": "secret2",
    }
    join = deployed(hub, "nats-join.conf", ports)
    away = {"0.0.0.0:4222": free_port(), "127.0.0.1:8222": free_port()}
    there = deployed(leaf, "nats-site.conf", away)
    address = f'"nats-leaf://{POOL.user}:{POOL.password}@127.0.0.1:{ports["0.0.0.0:7422"]}"'
    with (
        running(join, ports["0.0.0.0:4222"], user) as hub_url,
        running(there, away["0.0.0.0:4222"], {**user, "NATS_HUB_URL": address}) as leaf_url,
    ):
        for url in (hub_url, leaf_url):
            with pytest.raises(BusUnavailable, match="refuses this user"):
                async with open_bus(BusSettings(url=url, connect_timeout_s=0.3), name="nobody"):
                    pass
        async with (
            listening(hub_url, POOL) as heard,
            connected(leaf_url, POOL) as far,
            connected(hub_url, POOL) as near,
        ):
            await until_each_hears(far, near)
            for url in (hub_url, leaf_url):
                await kill_a_client(url, POOL)
                assert await until_worker(heard) == "Client Closed"


async def test_the_broker_of_the_containers_without_a_password_does_the_same(tmp_path: Path) -> None:
    ports = {"0.0.0.0:4222": free_port(), "127.0.0.1:8222": free_port()}
    with running(deployed(tmp_path / "nats", "nats.conf", ports), ports["0.0.0.0:4222"]) as url:
        async with listening(url) as heard:
            await kill_a_client(url)
            assert await until_worker(heard) == "Client Closed"


def deployed(folder: Path, name: str, ports: dict[str, int]) -> Path:
    """A configuration of the containers beside what it includes, on ports of this test."""
    folder.mkdir()
    for file in (name, "nats-limits.conf"):
        text = (DEPLOY / file).read_text()
        for address, port in ports.items():
            text = text.replace(address, f"127.0.0.1:{port}")
        (folder / file.replace("nats-limits", "limits")).write_text(text)
    return folder / name
