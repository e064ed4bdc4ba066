"""Real nats-servers joined as MoLink joins them: hub and leaf, two leaves, a cluster."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from molink import nats_config
from molink.embedded import EmbeddedServer, free_port, start_nats
from molink.nats_config import BrokerPlan, Credentials, LeafDoor
from molink.site_broker import BrokerFailed, run_broker
from molink_common.bus import BusSettings, Incoming, NatsBus, open_bus

POOL = Credentials(user="pool", password='p"a\\s s:@/$xé')
SUBJECT = "test.activations"


class Running:
    """A site's broker and what it said."""

    def __init__(self, plan: BrokerPlan, folder: Path) -> None:
        self.plan = plan
        self.folder = folder
        self.stop = asyncio.Event()
        self.ready = asyncio.Event()
        self.said: asyncio.Queue[str] = asyncio.Queue()

    async def until_said(self, words: str) -> str:
        async with asyncio.timeout(15):
            while words not in (sentence := await self.said.get()):
                pass
        return sentence


@contextlib.asynccontextmanager
async def broker(folder: Path, **given: Any) -> AsyncIterator[Running]:
    """A broker that serves clients; it has stopped when the block is left."""
    name = str(given.setdefault("site", "home"))
    plan = BrokerPlan(**{"port": free_port(), "server_name": f"site-{name}", "peers_host": "127.0.0.1", **given})
    running = Running(plan, folder / name)
    running.folder.mkdir()
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(
            run_broker(
                plan,
                folder=running.folder,
                say=running.said.put_nowait,
                ready=running.ready.set,
                stop=running.stop,
            )
        )
        await running.ready.wait()
        try:
            yield running
        finally:
            running.stop.set()


@contextlib.asynccontextmanager
async def client(url: str, credentials: Credentials | None = None) -> AsyncIterator[NatsBus]:
    user, password = (None, None) if credentials is None else (credentials.user, credentials.password)
    async with open_bus(BusSettings(url=url, user=user, password=password), name="test") as bus:
        yield bus


async def listen(bus: NatsBus, subject: str = SUBJECT) -> asyncio.Queue[bytes]:
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def take(incoming: Incoming) -> None:
        heard.put_nowait(bytes(incoming.data))

    await bus.subscribe(subject, take)
    await bus.flush()
    return heard


async def reaches(sender: NatsBus, heard: asyncio.Queue[bytes], data: bytes = b"x", subject: str = SUBJECT) -> bytes:
    """Publish until it arrives: brokers learn of each other's subscribers in their own time."""
    async with asyncio.timeout(15):
        while True:
            await sender.publish(subject, data)
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(heard.get(), 0.3)


async def until_heard(heard: asyncio.Queue[bytes], data: bytes) -> None:
    async with asyncio.timeout(15):
        while await heard.get() != data:
            pass


@pytest.fixture
def leaf_door() -> LeafDoor:
    return LeafDoor(host="127.0.0.1", port=free_port(), credentials=POOL)


@contextlib.contextmanager
def hub(folder: Path, leaf_door: LeafDoor) -> Iterator[EmbeddedServer]:
    server = start_nats(folder, leaf_door=leaf_door)
    try:
        yield server
    finally:
        server.process.send_signal(signal.SIGCONT)
        server.stop()


def at(door: LeafDoor) -> tuple[str, ...]:
    return (f"{door.host}:{door.port}",)


async def test_messages_pass_between_hub_and_leaf_in_both_directions(tmp_path: Path, leaf_door: LeafDoor) -> None:
    with hub(tmp_path, leaf_door) as server:
        async with (
            broker(tmp_path, hub=at(leaf_door), credentials=POOL) as leaf,
            client(server.url) as there,
            client(leaf.plan.client_url, POOL) as here,
        ):
            await leaf.until_said("connected with the hub")
            assert await reaches(here, await listen(there, "up"), subject="up") == b"x"
            frame = bytes(4 * 1024 * 1024)
            assert await reaches(there, await listen(here, "down"), frame, subject="down") == frame
            assert here.max_payload_bytes == nats_config.NATS_MAX_PAYLOAD_BYTES


async def test_a_site_goes_on_without_its_hub_and_finds_it_again(tmp_path: Path, leaf_door: LeafDoor) -> None:
    async with (
        broker(tmp_path, hub=at(leaf_door), credentials=POOL) as leaf,
        client(leaf.plan.client_url, POOL) as here,
        client(leaf.plan.client_url, POOL) as beside,
    ):
        await leaf.until_said("waiting for the hub")
        local = await listen(beside, "local")
        assert await reaches(here, local, subject="local") == b"x"
        with hub(tmp_path, leaf_door) as server:
            await leaf.until_said("connected with the hub")
            async with client(server.url) as there:
                assert await reaches(here, await listen(there)) == b"x"
        await leaf.until_said("lost the hub")
        assert await reaches(here, local, subject="local") == b"x"
        with hub(tmp_path, leaf_door) as server:
            await leaf.until_said("connected with the hub")
            async with client(server.url) as there:
                assert await reaches(here, await listen(there)) == b"x"


async def test_two_leaves_talk_through_their_hub(tmp_path: Path, leaf_door: LeafDoor) -> None:
    with hub(tmp_path, leaf_door):
        async with (
            broker(tmp_path, site="a", hub=at(leaf_door), credentials=POOL) as a,
            broker(tmp_path, site="b", hub=at(leaf_door), credentials=POOL) as b,
            client(a.plan.client_url, POOL) as at_a,
            client(b.plan.client_url, POOL) as at_b,
        ):
            assert await reaches(at_a, await listen(at_b, "ab"), subject="ab") == b"x"
            assert await reaches(at_b, await listen(at_a, "ba"), subject="ba") == b"x"


async def test_a_hub_that_falls_silent_is_noticed_by_pings(
    tmp_path: Path, leaf_door: LeafDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_config, "_PING_INTERVAL", "100ms")
    with hub(tmp_path, leaf_door) as server:
        async with broker(tmp_path, hub=at(leaf_door), credentials=POOL) as leaf:
            await leaf.until_said("connected with the hub")
            server.process.send_signal(signal.SIGSTOP)
            assert "Stale Connection" in await leaf.until_said("lost the hub")
            server.process.send_signal(signal.SIGCONT)
            await leaf.until_said("connected with the hub")


async def test_a_wrong_password_and_a_wrong_port_are_named(
    tmp_path: Path, leaf_door: LeafDoor, nats_server: EmbeddedServer
) -> None:
    with hub(tmp_path, leaf_door):
        wrong = Credentials(user="pool", password="guessed")
        async with broker(tmp_path, site="a", hub=at(leaf_door), credentials=wrong) as leaf:
            await leaf.until_said("set --nats-user and --nats-password")
    async with broker(tmp_path, site="b", hub=(f"127.0.0.1:{nats_server.port}",)) as leaf:
        await leaf.until_said("is a port for clients")


async def test_a_cluster_carries_messages_from_site_to_site(tmp_path: Path) -> None:
    ports = {"a": free_port(), "b": free_port()}
    routes = tuple(f"127.0.0.1:{port}" for port in ports.values())
    given = {"cluster": "pool", "routes": routes, "credentials": POOL}
    async with broker(tmp_path, site="a", cluster_port=ports["a"], **given) as a:
        await a.until_said("waiting for the brokers")
        async with (
            broker(tmp_path, site="b", cluster_port=ports["b"], **given) as b,
            client(a.plan.client_url, POOL) as at_a,
            client(b.plan.client_url, POOL) as at_b,
        ):
            await a.until_said("connected with the broker")
            assert await reaches(at_a, await listen(at_b, "ab"), subject="ab") == b"x"
            assert await reaches(at_b, await listen(at_a, "ba"), subject="ba") == b"x"


async def test_a_broker_can_be_a_hub(tmp_path: Path) -> None:
    leaf_port = free_port()
    async with (
        broker(tmp_path, site="hub", leaf_port=leaf_port, credentials=POOL) as middle,
        broker(tmp_path, site="a", hub=(f"127.0.0.1:{leaf_port}",), credentials=POOL) as leaf,
        client(middle.plan.client_url, POOL) as there,
        client(leaf.plan.client_url, POOL) as here,
    ):
        assert await reaches(here, await listen(there)) == b"x"


async def test_a_taken_port_is_refused_by_its_flag(tmp_path: Path, nats_server: EmbeddedServer) -> None:
    with pytest.raises(ExceptionGroup) as failed:
        async with broker(tmp_path, port=nats_server.port):
            pass
    assert failed.group_contains(BrokerFailed, match=rf"port {nats_server.port} .* choose another --port")


async def test_a_server_that_dies_is_started_again_on_the_same_port(tmp_path: Path) -> None:
    async with broker(tmp_path) as alone:
        (server,) = children_named(f"{alone.folder}/nats.conf")
        os.kill(server, signal.SIGKILL)
        await alone.until_said("starting it again")
        async with client(alone.plan.client_url) as after:
            assert await reaches(after, await listen(after)) == b"x"


def children_named(words: str) -> list[int]:
    """Process ids whose command holds these words."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if words.encode() in command.read_bytes():
                found.append(int(command.parent.name))
    return found


class CountingWire:
    """A wire to the hub that counts the bytes on it, in both directions together."""

    def __init__(self, hub_port: int) -> None:
        self._hub_port = hub_port
        self.num_bytes = 0
        self.port = 0

    @contextlib.asynccontextmanager
    async def laid(self) -> AsyncIterator[CountingWire]:
        async with asyncio.TaskGroup() as group:
            connections: list[asyncio.Task[None]] = []

            def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                connections.append(group.create_task(self._carry(reader, writer)))

            server = await asyncio.start_server(accept, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            try:
                yield self
            finally:
                server.close()
                for connection in connections:
                    connection.cancel()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hub_reader, hub_writer = await asyncio.open_connection("127.0.0.1", self._hub_port)
        try:
            with contextlib.suppress(ConnectionError):  # a server that stops resets it
                await asyncio.gather(self._pump(reader, hub_writer), self._pump(hub_reader, writer))
        finally:
            writer.close()
            hub_writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            self.num_bytes += len(data)
            writer.write(data)
            await writer.drain()


async def test_what_is_local_stays_and_what_is_not_crosses_once(tmp_path: Path, leaf_door: LeafDoor) -> None:
    frame = bytes(1 << 20)
    with hub(tmp_path, leaf_door) as server:
        async with (
            CountingWire(leaf_door.port).laid() as wire,
            broker(tmp_path, hub=(f"127.0.0.1:{wire.port}",), credentials=POOL) as leaf,
            client(server.url) as there,
            client(server.url) as there_too,
            client(leaf.plan.client_url, POOL) as here,
            client(leaf.plan.client_url, POOL) as beside,
        ):
            await leaf.until_said("connected with the hub")
            assert await reaches(here, await listen(beside, "local"), frame, subject="local") == frame
            assert wire.num_bytes < len(frame) // 10
            first, second = await listen(there, "far"), await listen(there_too, "far")
            await reaches(here, first, subject="far")  # by now the leaf knows that somebody listens there
            before = wire.num_bytes
            await here.publish("far", frame)
            await until_heard(first, frame)
            await until_heard(second, frame)
            assert len(frame) <= wire.num_bytes - before < 1.1 * len(frame)
