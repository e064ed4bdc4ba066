"""What nats-server is told: one configuration for the broker of a pool, for a hub and for a site. Decisions only.

A site's broker joins the others in one of two ways:

- as a **leaf node** of a hub: it dials out, so it works from behind NAT; whatever is for another site crosses to
  the hub and from there to the other leaf. The hub opens a port for leaf nodes.
- by **cluster routes**: every broker dials every other one, and a message goes straight from site to site.

A configuration is written as JSON, which nats-server reads: quoting is then nobody's business but `json`'s.
Every option is known to nats-server from 2.11 on.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from molink.nats_accounts import POOL_ACCOUNT, accounts_config, leaf_authorization
from molink_common.errors import SettingsError

NATS_MAX_PAYLOAD_BYTES = 8 * 1024 * 1024
CLIENT_PORT = 4222
LEAF_PORT = 7422
CLUSTER_PORT = 6222

LIMITS: dict[str, Any] = {
    "max_payload": NATS_MAX_PAYLOAD_BYTES,
    # A slow link takes long to drain; the default of 10 s would cut its subscriber off and lose what is under way.
    "write_deadline": "60s",
    "max_pending": 512 * 1024 * 1024,
}

# Between brokers. The default for leaf nodes is s2_auto, which compresses the harder the slower the link is, and a
# full link looks slow. Activations in bf16 hardly shrink, so this would spend the time of a core, and delay every
# decode token, for nothing.
_UNCOMPRESSED = "off"

# A cut link is noticed after _PING_MAX pings went unanswered and one more is due: five to six seconds, as long as
# the scheduler waits for a heartbeat, so that no worker is cut off here that is not fenced there already. A ping
# waits behind what the link still holds, so less would cut links that are only full.
_PING_INTERVAL = "1s"
_PING_MAX = 5

_RECONNECT = "200ms"
_REPORT_EVERY = 300
"""Attempts for each line in the log: once a minute."""
_ROUTE_RETRIES = 600
"""Tries, one a second, for a broker that another one told of. Those in ``--routes`` are tried for ever."""

_SITE = re.compile(r"[A-Za-z0-9_-]{1,32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """A user and password: for clients, for leaf nodes and routes that are taken, and for the hub."""

    user: str
    password: str

    def __post_init__(self) -> None:
        if not self.user or not self.password:
            raise SettingsError("--nats-user and --nats-password: both must hold something")
        if any(ord(character) < 0x20 for character in self.user + self.password):
            raise SettingsError("--nats-user and --nats-password: control characters cannot be part of them")

    def as_config(self) -> dict[str, str]:
        """As nats-server's `authorization` wants it."""
        return {"user": self.user, "password": self.password}


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafDoor:
    """Where a hub takes leaf nodes; with credentials of their own, the hub's other clients need none."""

    host: str
    port: int
    credentials: Credentials | None = None

    def as_config(self) -> dict[str, Any]:
        """The `leafnodes` part of a hub."""
        return {
            "listen": _address(self.host, self.port),
            "compression": _UNCOMPRESSED,
            # a leaf keeps to the address that it was given: the hub's own view of it may lie behind NAT
            "no_advertise": True,
            "authorization": leaf_authorization(_user(self.credentials)),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerPlan:
    """One site's broker."""

    site: str
    server_name: str
    """Unique among all brokers: a hub takes a second one of the same name for the first one come back."""
    host: str = "127.0.0.1"
    """Where clients are served."""
    port: int = CLIENT_PORT
    hub: tuple[str, ...] = ()
    """``host:port`` of the hub's door for leaf nodes; several for one hub that is a cluster itself."""
    cluster: str | None = None
    routes: tuple[str, ...] = ()
    """``host:port`` of the other brokers' doors for routes."""
    peers_host: str = "0.0.0.0"
    """Where leaf nodes and routes are taken."""
    leaf_port: int | None = None
    cluster_port: int | None = None
    advertise: str | None = None
    """``host:port`` by which other brokers reach this one's door for routes, where it cannot know itself."""
    credentials: Credentials | None = None

    def __post_init__(self) -> None:
        if not _SITE.fullmatch(self.site):
            raise SettingsError(f"--site {self.site!r}: 1 to 32 letters, digits, - and _")
        if self.hub and self.cluster is not None:
            raise SettingsError("--hub and --cluster exclude each other: a broker joins as a leaf or by routes")
        if self.cluster is None and (self.routes or self.cluster_port is not None or self.advertise is not None):
            raise SettingsError("--routes, --cluster-port and --advertise need --cluster NAME, the same everywhere")
        if self.cluster is not None and self.cluster_port is None:
            raise SettingsError("--cluster needs --cluster-port: other brokers must be able to reach this one")
        taken = [port for port in (self.port, self.leaf_port, self.cluster_port) if port is not None]
        if len(set(taken)) != len(taken):
            raise SettingsError("--port, --leaf-port and --cluster-port must differ")

    @property
    def client_url(self) -> str:
        """Where clients of this machine reach it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"nats://{_address(host, self.port)}"

    @property
    def joins(self) -> str:
        """What it joins, for a person and for comparing."""
        if self.hub:
            return f"the hub at {', '.join(self.hub)}"
        return f"the cluster {self.cluster}" if self.cluster is not None else "nothing"

    @property
    def doors(self) -> dict[str, tuple[str, int]]:
        """Every address that it listens on, by the flag that moves it."""
        doors = {"--port": (self.host, self.port)}
        if self.leaf_port is not None:
            doors["--leaf-port"] = (self.peers_host, self.leaf_port)
        if self.cluster_port is not None:
            doors["--cluster-port"] = (self.peers_host, self.cluster_port)
        return doors


def pool_config(*, host: str, port: int, leaf_door: LeafDoor | None = None) -> dict[str, Any]:
    """The one broker of a pool, which takes leaf nodes if it has a door for them."""
    # who comes with the user of the leaf nodes is no stranger, though clients of this machine need none
    known = [] if leaf_door is None or leaf_door.credentials is None else [leaf_door.credentials.as_config()]
    config = {"listen": _address(host, port), **LIMITS, **accounts_config(known, open_to_all=True)}
    if leaf_door is not None:
        config["leafnodes"] = leaf_door.as_config()
    return config


def site_config(plan: BrokerPlan) -> dict[str, Any]:
    """The broker of a site."""
    config: dict[str, Any] = {
        "server_name": plan.server_name,
        "listen": _address(plan.host, plan.port),
        **LIMITS,
        "connect_error_reports": _REPORT_EVERY,
        "reconnect_error_reports": _REPORT_EVERY,
        **accounts_config(
            [] if plan.credentials is None else [plan.credentials.as_config()], open_to_all=plan.credentials is None
        ),
    }
    leafnodes: dict[str, Any] = {}
    if plan.leaf_port is not None:
        door = LeafDoor(host=plan.peers_host, port=plan.leaf_port, credentials=plan.credentials)
        leafnodes |= door.as_config()
    if plan.hub:
        # leaf nodes have no pings of their own: these are the clients' as well
        config |= {"ping_interval": _PING_INTERVAL, "ping_max": _PING_MAX}
        leafnodes["reconnect"] = _RECONNECT
        urls = [_with_credentials("nats-leaf", address, plan.credentials) for address in plan.hub]
        # the hub's first word may wait behind what the link still holds; the default is one second
        leafnodes["remotes"] = [
            {"urls": urls, "account": POOL_ACCOUNT, "compression": _UNCOMPRESSED, "first_info_timeout": "5s"}
        ]
    if leafnodes:
        config["leafnodes"] = leafnodes
    if plan.cluster is not None:
        config["cluster"] = _cluster(plan)
    return config


def _cluster(plan: BrokerPlan) -> dict[str, Any]:
    assert plan.cluster_port is not None
    cluster: dict[str, Any] = {
        "name": plan.cluster,
        "listen": _address(plan.peers_host, plan.cluster_port),
        "routes": [_with_credentials("nats-route", address, plan.credentials) for address in plan.routes],
        "compression": _UNCOMPRESSED,
        # several connections between two brokers serve many busy accounts; here one is busy
        "pool_size": -1,
        "ping_interval": _PING_INTERVAL,
        "ping_max": _PING_MAX,
        "connect_retries": _ROUTE_RETRIES,
        # a client that lost its own broker must wait for it, not go to that of another site over the slow link
        "no_advertise": True,
    }
    if plan.advertise is not None:
        cluster["advertise"] = plan.advertise
    if plan.credentials is not None:
        cluster["authorization"] = plan.credentials.as_config()
    return cluster


def render(config: dict[str, Any]) -> str:
    """The text of a configuration file."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def peers(text: str, *, flag: str, default_port: int) -> tuple[str, ...]:
    """``nats://hub``, ``hub:7422`` or several with commas → (``hub:7422``, …).

    Raises:
        SettingsError: one of them is no such address.
    """
    return tuple(_peer(part.strip(), flag, default_port) for part in text.split(",") if part.strip())


def _peer(text: str, flag: str, default_port: int) -> str:
    example = f"{flag} nats://other-machine:{default_port}"
    try:
        parts = urlsplit(text if "://" in text else f"nats://{text}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise SettingsError(f"{flag} {text!r} is no address ({error}); give one as {example}") from error
    if parts.username is not None or parts.password is not None:
        raise SettingsError(f"{flag}: leave user and password to --nats-user and --nats-password")
    if parts.scheme not in ("nats", "nats-leaf", "nats-route") or not host or parts.path.strip("/"):
        raise SettingsError(f"{flag} {text!r} is no address of a broker; give one as {example}")
    return _address(host, default_port if port is None else port)


def _user(credentials: Credentials | None) -> dict[str, str] | None:
    return None if credentials is None else credentials.as_config()


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _with_credentials(scheme: str, address: str, credentials: Credentials | None) -> str:
    if credentials is None:
        return f"{scheme}://{address}"
    return f"{scheme}://{quote(credentials.user, safe='')}:{quote(credentials.password, safe='')}@{address}"
