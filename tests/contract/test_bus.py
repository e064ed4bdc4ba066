"""What the parts rely on in NATS, against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from molink.embedded import EmbeddedServer, find_nats_server, free_port, start_nats
from molink_common import subjects
from molink_common.bus import BusSettings, Incoming, NatsBus, open_bus, serve
from molink_common.errors import BusUnavailable, NobodyListens, ProtocolError, RequestTimeout
from molink_common.messages import Done, Failed, Message, ReleaseStage


async def test_a_request_is_answered_with_the_typed_reply(bus: NatsBus) -> None:
    async def answer(message: ReleaseStage) -> Message:
        return Done() if message.pipeline == 1 else Failed(message="no such pipeline")

    subscription = await serve(bus, subjects.control("w1"), answer, ReleaseStage)
    ok = await bus.ask(subjects.control("w1"), ReleaseStage(pipeline=1), Done, Failed, timeout_s=2)
    bad = await bus.ask(subjects.control("w1"), ReleaseStage(pipeline=2), Done, Failed, timeout_s=2)
    await subscription.close()
    assert ok == Done()
    assert bad == Failed(message="no such pipeline")


async def test_a_request_to_nobody_fails_at_once(bus: NatsBus) -> None:
    with pytest.raises(NobodyListens):
        await bus.ask(subjects.control("nobody"), ReleaseStage(pipeline=1), Done, timeout_s=5)


async def test_a_flush_goes_behind_all_that_was_sent_before(bus: NatsBus, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    transport = bus._client._transport
    write, writelines = transport.write, transport.writelines

    def note(data: bytes) -> None:
        written.append(data)
        write(data)

    def note_all(pieces: list[bytes]) -> None:
        written.extend(pieces)
        writelines(pieces)

    monkeypatch.setattr(transport, "write", note)
    monkeypatch.setattr(transport, "writelines", note_all)
    await bus.publish("first", b"hello")
    await bus.flush()
    assert [line.split()[0] for line in written] == [b"PUB", b"PING"]


async def test_a_silent_listener_is_a_timeout(bus: NatsBus) -> None:
    async def listen(_: Incoming) -> None:
        return None

    subscription = await bus.subscribe("silent", listen)
    with pytest.raises(RequestTimeout):
        await bus.request("silent", b"?", timeout_s=0.1)
    await subscription.close()


async def test_garbage_is_answered_and_does_not_end_the_service(bus: NatsBus) -> None:
    async def answer(_: ReleaseStage) -> Message:
        return Done()

    subscription = await serve(bus, "garbage", answer, ReleaseStage)
    for garbage in (b"", b"{", b"[1]", b'{"v":1,"type":"x"}', b'{"v":9,"type":"release_stage"}', b"\xff\xfe"):
        reply = await bus.request("garbage", garbage, timeout_s=2)
        assert b"failed" in reply
    assert await bus.ask("garbage", ReleaseStage(pipeline=1), Done, timeout_s=2) == Done()
    with pytest.raises(ProtocolError):
        await bus.ask("garbage", ReleaseStage(pipeline=1), Failed, timeout_s=2)
    await subscription.close()


async def test_messages_arrive_in_order_and_any_buffer_can_be_sent(bus: NatsBus) -> None:
    seen: list[bytes] = []
    done = asyncio.Event()

    async def collect(incoming: Incoming) -> None:
        seen.append(bytes(incoming.data))
        if len(seen) == 3:
            done.set()

    subscription = await bus.subscribe("ordered", collect)
    await bus.publish("ordered", b"1")
    await bus.publish("ordered", bytearray(b"2"))
    assert bus.publish_at_once("ordered", memoryview(b"3"))
    await asyncio.wait_for(done.wait(), 2)
    await subscription.close()
    assert seen == [b"1", b"2", b"3"]


async def test_a_message_over_the_limit_is_refused_here(bus: NatsBus) -> None:
    with pytest.raises(BusUnavailable, match="max_payload"):
        await bus.publish("large", bytes(bus.max_payload_bytes + 1))
    with pytest.raises(BusUnavailable, match="max_payload"):
        bus.publish_at_once("large", bytes(bus.max_payload_bytes + 1))


async def test_no_server_is_an_error_that_names_the_setting() -> None:
    settings = BusSettings(url="nats://user:secret@127.0.0.1:9", connect_timeout_s=0.3)
    with pytest.raises(BusUnavailable, match="--nats-url") as caught:
        async with open_bus(settings, name="x"):
            pass
    assert "secret" not in str(caught.value)


async def test_a_wrong_password_is_told_from_a_server_that_is_away(tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "auth.conf"
    config.write_text(f'listen: "127.0.0.1:{port}"\nauthorization {{ user: a, password: b }}\n')
    server = await asyncio.create_subprocess_exec(
        find_nats_server(), "-c", config, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with open_bus(BusSettings(url=f"nats://127.0.0.1:{port}", user="a", password="b"), name="x") as bus:
            assert bus.is_connected
        wrong = BusSettings(url=f"nats://127.0.0.1:{port}", user="a", password="c", connect_timeout_s=0.3)
        with pytest.raises(BusUnavailable, match="refuses this user"):
            async with open_bus(wrong, name="x"):
                pass
    finally:
        server.kill()
        await server.wait()


async def test_a_restarted_broker_is_found_again_at_once(tmp_path: Path) -> None:
    server = start_nats(tmp_path)
    back = asyncio.Event()
    try:
        async with open_bus(BusSettings(url=server.url), name="x", on_reconnect=back.set) as bus:
            server.process.kill()
            server.process.wait()
            async with asyncio.timeout(5):
                while bus.is_connected:  # noqa: ASYNC110  the library tells nobody before it has closed the connection
                    await asyncio.sleep(0.01)
            with pytest.raises(BusUnavailable):
                await bus.publish("x", b"")
            with pytest.raises(BusUnavailable):
                bus.publish_at_once("x", b"")
            server = start_nats(tmp_path, server.port)
            is_back_s = time.perf_counter()
            await asyncio.wait_for(back.wait(), 5)
            assert time.perf_counter() - is_back_s < 0.5, "it tries ten times a second"
            await bus.publish("x", b"")
    finally:
        server.stop()


async def test_a_cut_connection_is_given_up_with_all_that_waits_in_it(nats_server: EmbeddedServer) -> None:
    back = asyncio.Event()
    async with (
        cuttable(nats_server.port) as (port, cut),
        open_bus(BusSettings(url=f"nats://127.0.0.1:{port}"), name="x", on_reconnect=back.set) as bus,
    ):
        bus._client.options["ping_interval"] = 0.05
        cut.set()

        async def fill() -> None:
            with contextlib.suppress(BusUnavailable):
                for _ in range(16):
                    await bus.publish("x", bytes(4 * 1024 * 1024))

        async with asyncio.TaskGroup() as group:
            filling = group.create_task(fill())
            await asyncio.wait_for(back.wait(), 10)
            filling.cancel()
        await bus.publish("x", b"")
        await bus.flush()


async def test_what_would_have_to_wait_is_not_sent_at_once(nats_server: EmbeddedServer) -> None:
    async with (
        cuttable(nats_server.port) as (port, cut),
        open_bus(BusSettings(url=f"nats://127.0.0.1:{port}"), name="x") as bus,
    ):
        cut.set()
        sent = 0
        while bus.publish_at_once("x", bytes(1024 * 1024)):
            sent += 1
            assert sent < 64, "no socket holds so much"
        out_msgs = bus._client.stats["out_msgs"]
        assert not bus.publish_at_once("x", b"small")
        assert bus._client.stats["out_msgs"] == out_msgs == sent


@contextlib.asynccontextmanager
async def cuttable(to_port: int) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """A way to a server. Setting the event cuts the connections of that moment: they stay open and carry nothing."""
    cut = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        tasks: list[asyncio.Task[None]] = []

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            tasks.append(group.create_task(carry(reader, writer, is_cut=cut if not tasks else None)))

        async def carry(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_cut: asyncio.Event | None
        ) -> None:
            there, back = await asyncio.open_connection("127.0.0.1", to_port)
            try:
                await asyncio.gather(pump(reader, back, is_cut), pump(there, writer, is_cut))
            finally:
                writer.transport.abort()
                back.transport.abort()

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, is_cut: asyncio.Event | None) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(1 << 16):
                    if is_cut is not None and is_cut.is_set():
                        await asyncio.Event().wait()
                    sink.write(data)
                    await sink.drain()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1], cut
        finally:
            server.close()
            for task in tasks:
                task.cancel()
