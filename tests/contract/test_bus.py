"""What the parts rely on in NATS, against a real server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from molink.embedded import find_nats_server, free_port
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
    await bus.publish("ordered", memoryview(b"3"))
    await asyncio.wait_for(done.wait(), 2)
    await subscription.close()
    assert seen == [b"1", b"2", b"3"]


async def test_a_message_over_the_limit_is_refused_here(bus: NatsBus) -> None:
    with pytest.raises(BusUnavailable, match="max_payload"):
        await bus.publish("large", bytes(bus.max_payload_bytes + 1))


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
