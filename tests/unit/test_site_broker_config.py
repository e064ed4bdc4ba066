"""What a site's nats-server is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from molink.nats_accounts import ANYBODY
from molink.nats_config import (
    LIMITS,
    NATS_MAX_PAYLOAD_BYTES,
    BrokerPlan,
    Credentials,
    LeafDoor,
    peers,
    pool_config,
    render,
    site_config,
)
from molink_common import subjects
from molink_common.errors import SettingsError

POOL = Credentials(user="pool", password='p"a\\s s:@/$x')


def leaf(**changes: Any) -> BrokerPlan:
    return BrokerPlan(**{"site": "home", "server_name": "site-home-1", "hub": ("hub:7422",), **changes})


def member(**changes: Any) -> BrokerPlan:
    given = {"site": "home", "server_name": "n", "cluster": "pool", "cluster_port": 6222, "routes": ("other:6222",)}
    return BrokerPlan(**{**given, **changes})


def test_a_leaf_dials_out_and_opens_nothing_but_its_own_port() -> None:
    config = site_config(leaf())
    assert config["listen"] == "127.0.0.1:4222"
    assert config["leafnodes"]["remotes"][0]["urls"] == ["nats-leaf://hub:7422"]
    assert "listen" not in config["leafnodes"]
    assert "cluster" not in config
    assert config["no_auth_user"] == ANYBODY["user"]


@pytest.mark.parametrize("config", [site_config(leaf()), site_config(member()), pool_config(host="h", port=1)])
def test_every_broker_has_the_limits_for_slow_links(config: dict[str, Any]) -> None:
    assert config.items() >= LIMITS.items()
    assert LIMITS == {
        "max_payload": NATS_MAX_PAYLOAD_BYTES,
        "write_deadline": "60s",
        "max_pending": 512 * 1024 * 1024,
    }


def test_nothing_is_compressed_between_brokers() -> None:
    config = site_config(leaf(leaf_port=7422))
    assert config["leafnodes"]["compression"] == "off"
    assert [remote["compression"] for remote in config["leafnodes"]["remotes"]] == ["off"]
    assert site_config(member())["cluster"]["compression"] == "off"


def test_a_cut_link_is_noticed_in_seconds() -> None:
    config = site_config(leaf())
    assert (config["ping_interval"], config["ping_max"], config["leafnodes"]["reconnect"]) == ("1s", 5, "200ms")
    cluster = site_config(member())["cluster"]
    assert (cluster["ping_interval"], cluster["ping_max"]) == ("1s", 5)


def test_clients_of_a_cluster_are_not_sent_to_another_site() -> None:
    assert site_config(member())["cluster"]["no_advertise"] is True


def test_one_user_and_password_open_every_door() -> None:
    config = site_config(member(credentials=POOL, leaf_port=7422))
    expected = {"user": "pool", "password": POOL.password}
    assert config["accounts"]["POOL"]["users"] == [expected]
    assert "no_auth_user" not in config, "nobody comes in without them"
    assert config["cluster"]["authorization"] == expected
    assert config["leafnodes"]["authorization"] == {**expected, "account": "POOL"}
    assert config["cluster"]["routes"] == ["nats-route://pool:p%22a%5Cs%20s%3A%40%2F%24x@other:6222"]
    assert json.loads(render(config)) == config
    hub = site_config(leaf(credentials=POOL))["leafnodes"]["remotes"][0]["urls"]
    assert hub == ["nats-leaf://pool:p%22a%5Cs%20s%3A%40%2F%24x@hub:7422"]


def test_a_pools_broker_takes_leaf_nodes_only_when_told_to() -> None:
    assert "leafnodes" not in pool_config(host="127.0.0.1", port=4222)
    door = LeafDoor(host="0.0.0.0", port=7422, credentials=POOL)
    config = pool_config(host="127.0.0.1", port=4222, leaf_door=door)
    assert config["leafnodes"]["listen"] == "0.0.0.0:7422"
    assert config["leafnodes"]["authorization"] == {**POOL.as_config(), "account": "POOL"}
    assert config["accounts"]["POOL"]["users"] == [POOL.as_config(), ANYBODY]
    assert config["no_auth_user"] == ANYBODY["user"], "the pool's own clients stay on loopback and need none"


@pytest.mark.parametrize("config", [site_config(leaf()), site_config(member()), pool_config(host="h", port=1)])
def test_every_broker_tells_the_pool_who_has_left(config: dict[str, Any]) -> None:
    (imported,) = config["accounts"]["POOL"]["imports"]
    assert imported["to"] == subjects.BROKER_DISCONNECTS
    (exported,) = config["accounts"][config["system_account"]]["exports"]
    assert exported["stream"] == imported["stream"]["subject"] == "$SYS.ACCOUNT.POOL.DISCONNECT"
    assert "users" not in config["accounts"][config["system_account"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nats://hub:7000", ("hub:7000",)),
        ("hub", ("hub:7422",)),
        ("nats-leaf://10.0.0.1, other:1", ("10.0.0.1:7422", "other:1")),
        ("nats://[fd00::1]:7", ("[fd00::1]:7",)),
        ("", ()),
    ],
)
def test_addresses_of_brokers(text: str, expected: tuple[str, ...]) -> None:
    assert peers(text, flag="--hub", default_port=7422) == expected


@pytest.mark.parametrize("text", ["http://hub", "nats://hub:port", "nats://:7422", "nats://hub/x", "tls://hub"])
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--hub .*nats://other-machine:7422"):
        peers(text, flag="--hub", default_port=7422)


def test_an_address_holds_no_password() -> None:
    with pytest.raises(SettingsError, match=r"--nats-password") as refused:
        peers("nats://pool:secret@hub", flag="--hub", default_port=7422)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"site": "a/b"}, "--site"),
        ({"cluster": "pool", "cluster_port": 6222}, "--hub and --cluster"),
        ({"hub": (), "routes": ("a:1",)}, "need --cluster"),
        ({"hub": (), "cluster": "pool"}, "needs --cluster-port"),
        ({"leaf_port": 4222}, "must differ"),
    ],
)
def test_what_does_not_go_together_is_refused_by_its_flag(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        leaf(**changes)


def test_each_door_can_be_moved_by_a_flag() -> None:
    plan = member(leaf_port=7422, peers_host="10.0.0.1")
    assert plan.doors == {
        "--port": ("127.0.0.1", 4222),
        "--leaf-port": ("10.0.0.1", 7422),
        "--cluster-port": ("10.0.0.1", 6222),
    }


def test_local_clients_reach_a_broker_that_listens_everywhere() -> None:
    assert leaf(host="0.0.0.0", port=5).client_url == "nats://127.0.0.1:5"
