"""`molink up` as a hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from molink.app import app
from molink.bring_up import _start_servers
from molink.embedded import free_port, is_listening
from molink.leash import Leash
from molink.nats_config import Credentials, LeafDoor
from molink.plan import UpOptions
from molink.supervisor import supervise


async def test_it_takes_leaf_nodes_when_told_to(tmp_path: Path) -> None:
    door = LeafDoor(host="127.0.0.1", port=free_port(), credentials=Credentials(user="pool", password="secret"))
    options = UpOptions(leaf_door=door, redis_url="redis://elsewhere")
    said: list[str] = []
    with Leash() as leash:
        async with supervise(say=said.append, leash=leash) as supervisor:
            nats_url, _ = await _start_servers(options, supervisor, tmp_path, Console(quiet=True))
            assert is_listening(door.port)
    config = json.loads((tmp_path / "nats.conf").read_text())
    assert config["listen"] == nats_url.removeprefix("nats://")
    assert config["leafnodes"]["authorization"] == {
        "user": "pool",
        "password": "secret",
        "account": "POOL",
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--leaf-port", "7422"], "--leaf-password"),
        (["--leaf-port", "7422", "--leaf-host", "127.0.0.1", "--nats", "nats://elsewhere"], "given with --nats"),
    ],
)
def test_a_door_without_a_lock_or_without_a_house_is_refused(flags: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["up", *flags], env={"MOLINK_NATS_USER": "", "MOLINK_NATS_PASSWORD": ""})
    assert result.exit_code == 2
    assert words in result.output
