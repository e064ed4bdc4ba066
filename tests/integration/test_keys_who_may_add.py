"""With the broker that machines from elsewhere may join, only its operator changes API keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from molink.embedded import free_port
from molink_common import subjects
from molink_common.bus import BusSettings, open_bus, serve
from molink_common.errors import RequestTimeout
from molink_common.messages import AskKeys, Done, Keys, Message, RevokeKey
from tests.integration.test_broker_disconnects import deployed, running


async def test_the_pools_own_user_asks_for_keys_and_cannot_change_them(tmp_path: Path) -> None:
    ports = {"0.0.0.0:4222": free_port(), "127.0.0.1:8222": free_port(), "0.0.0.0:7422": free_port()}
    join = deployed(tmp_path / "hub", "nats-join.conf", ports)
    environment = {
        "MOLINK_NATS_USER": "pool",
        "MOLINK_NATS_PASSWORD": "secret",
        "NATS_OPERATOR_PASSWORD": "other-secret",
    }

    async def tell(_: Message) -> Message:
        return Keys(revision="")

    async def change(_: Message) -> Message:
        return Done()

    with running(join, ports["0.0.0.0:4222"], environment) as url:
        pool = BusSettings(url=url, user="pool", password="secret")
        operator = BusSettings(url=url, user="operator", password="other-secret")
        async with (
            open_bus(pool, name="scheduler") as scheduler,
            open_bus(pool, name="w1") as worker,
            open_bus(operator, name="molink-keys") as terminal,
        ):
            await serve(scheduler, subjects.KEYS, tell, AskKeys)
            await serve(scheduler, subjects.CHANGE_KEYS, change, RevokeKey)
            await scheduler.flush()
            assert await worker.ask(subjects.KEYS, AskKeys(), Keys, timeout_s=5) == Keys(revision="")
            with pytest.raises(RequestTimeout):
                await worker.ask(subjects.CHANGE_KEYS, RevokeKey(key="key-1"), Done, timeout_s=0.3)
            assert await terminal.ask(subjects.CHANGE_KEYS, RevokeKey(key="key-1"), Done, timeout_s=5) == Done()
