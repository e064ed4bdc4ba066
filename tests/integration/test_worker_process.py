"""The worker as a process of its own."""

from __future__ import annotations

import asyncio
import signal
import sys

from molink.embedded import EmbeddedServer
from molink_common import messages, subjects
from molink_common.bus import Incoming, NatsBus
from molink_common.messages import Heartbeat


async def test_it_waits_for_a_scheduler_and_ends_when_told_to(bus: NatsBus, nats_server: EmbeddedServer) -> None:
    beats: asyncio.Queue[Heartbeat] = asyncio.Queue()

    async def listen(incoming: Incoming) -> None:
        beats.put_nowait(messages.decode(incoming.data, Heartbeat))

    subscription = await bus.subscribe(subjects.heartbeat("alone"), listen)
    flags = ["--nats-url", nats_server.url, "--worker-id", "alone", "--device", "cpu", "--memory", "1GiB"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "molink_stage_worker", *flags, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(60):
            while "no scheduler listens" not in ((beat := await beats.get()).preparing or ""):
                assert not beat.leaving
            assert (beat.memory_bytes, beat.device, beat.card, beat.stage) == (1 << 30, "cpu", None, None)
            assert beat.parameters_per_s is not None
            process.send_signal(signal.SIGTERM)
            while not (await beats.get()).leaving:
                pass
            assert await process.wait() == 0
            assert process.stderr is not None
            assert b"Traceback" not in await process.stderr.read()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await subscription.close()


async def test_a_wrong_setting_ends_it_with_a_sentence() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "molink_stage_worker", "--memory", "lots", stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        _, said = await process.communicate()
    assert process.returncode == 2
    assert b"--memory" in said
    assert b"Traceback" not in said
