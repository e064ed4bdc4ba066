"""The containers of a site are joined as `molink broker` joins one."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # it has no types of its own

from molink.embedded import find_nats_server
from molink.nats_config import BrokerPlan, pool_config, site_config

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


class _ComposeLoader(yaml.SafeLoader):  # type: ignore[misc]  # as above
    """Knows Compose's own tags."""


_ComposeLoader.add_constructor("!override", lambda loader, node: loader.construct_mapping(node, deep=True))
# S506: a loader of ours that knows no more than the safe one
SITE: dict[str, Any] = yaml.load((DEPLOY / "docker-compose.site.yml").read_text(), _ComposeLoader)
JOIN: dict[str, Any] = yaml.safe_load((DEPLOY / "docker-compose.join.yml").read_text())


def test_a_site_runs_a_broker_and_workers_that_use_it() -> None:
    services = SITE["services"]
    assert set(services) == {"nats", "stage-worker"}
    assert services["stage-worker"]["environment"]["MOLINK_NATS_URL"] == "nats://nats:4222"
    assert set(services["stage-worker"]["depends_on"]) == {"nats"}, "the scheduler is at another site"
    assert "ports" not in services["nats"], "connections go out only"


@pytest.mark.parametrize("name", ["MOLINK_HUB", "MOLINK_NATS_USER", "MOLINK_NATS_PASSWORD", "MOLINK_SITE"])
def test_what_a_site_needs_is_asked_for(name: str) -> None:
    assert "${" + name + ":?" in (DEPLOY / "docker-compose.site.yml").read_text()


def test_the_hub_publishes_its_door_for_leaf_nodes_only_when_others_may_join() -> None:
    assert any(port.endswith(":7422") for port in JOIN["services"]["nats"]["ports"])
    assert "leafnodes" not in (DEPLOY / "nats.conf").read_text()


def test_the_file_says_what_the_command_says() -> None:
    config = site_config(BrokerPlan(site="home", server_name="n", hub=("hub:7422",)))
    text = (DEPLOY / "nats-site.conf").read_text()
    remote = config["leafnodes"]["remotes"][0]
    for line in (
        f'ping_interval: "{config["ping_interval"]}"',
        f"ping_max: {config['ping_max']}",
        f"reconnect_error_reports: {config['reconnect_error_reports']}",
        f'reconnect: "{config["leafnodes"]["reconnect"]}"',
        f"account: {remote['account']}",
        f"compression: {remote['compression']}",
        f'first_info_timeout: "{remote["first_info_timeout"]}"',
    ):
        assert line in text


@pytest.mark.parametrize("name", ["nats.conf", "nats-site.conf", "nats-join.conf"])
def test_the_files_name_the_subjects_that_the_command_names(name: str) -> None:
    config = pool_config(host="h", port=1)
    text = (DEPLOY / name).read_text()
    (exported,) = config["accounts"]["SYS"]["exports"]
    (imported,) = config["accounts"]["POOL"]["imports"]
    assert f'exports: [{{ stream: "{exported["stream"]}", accounts: [POOL] }}]' in text
    assert f'subject: "{imported["stream"]["subject"]}" }}, to: "{imported["to"]}"' in text
    assert ("no_auth_user" in text) == (name == "nats.conf"), "the others are reached from elsewhere"


@pytest.mark.parametrize("name", ["nats.conf", "nats-site.conf", "nats-join.conf"])
def test_the_server_takes_the_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "limits.conf").write_text((DEPLOY / "nats-limits.conf").read_text())
    (tmp_path / name).write_text((DEPLOY / name).read_text())
    url = '"nats-leaf://pool:secret@hub:7422"'  # as docker-compose.site.yml puts it together
    environment = {
        "MOLINK_NATS_USER": "pool",
        "MOLINK_NATS_PASSWORD": "secret",
        "NATS_OPERATOR_PASSWORD": "secret2",
        "NATS_HUB_URL": url,
    }
    command = [str(find_nats_server()), "-c", str(tmp_path / name), "-t"]
    checked = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert checked.returncode == 0, checked.stderr
