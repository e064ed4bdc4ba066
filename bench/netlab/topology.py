"""Which hosts there are, how they are joined, and which part of the system runs where. Values only.

A `Topology` is valid from birth: what cannot work is refused with a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations

from molink_common.errors import SettingsError

_HOST_NAME = re.compile(r"[a-z][a-z0-9]{0,9}")
_MOST_HOSTS = 60
_QUEUE_S = 0.1
_LEAST_QUEUE_BYTES = 16 * 1024
_FAST_BIT_PER_S = 500e6
_USUAL_MTU_BYTES = 1500
_JUMBO_MTU_BYTES = 9000


class TopologyError(SettingsError):
    """The laboratory as described cannot be built. The message says what does not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """A link, alike in both directions. Rates count the bytes of IP packets."""

    rate_bit_per_s: float | None = None
    """None: unlimited."""
    round_trip_s: float = 0.0
    """Half of it in each direction, beside the time in the queue."""
    queue_bytes: int | None = None
    """What may wait for the transmitter before packets are dropped; None: `queue_limit_bytes` chooses."""
    loss: float = 0.0
    """Share of packets lost at random in each direction."""

    def __post_init__(self) -> None:
        if self.rate_bit_per_s is not None and self.rate_bit_per_s < 1000:
            raise TopologyError(f"a link of {self.rate_bit_per_s:g} bit/s carries nothing; None is unlimited")
        if not 0 <= self.round_trip_s <= 10:
            raise TopologyError(f"a round trip of {self.round_trip_s:g} s; it must be from 0 to 10 s")
        if not 0 <= self.loss < 1:
            raise TopologyError(f"a loss of {self.loss:g}; it is a share, from 0 to below 1")
        if self.queue_bytes is not None and self.queue_bytes < _USUAL_MTU_BYTES:
            raise TopologyError(f"a queue of {self.queue_bytes} bytes holds no packet")

    @property
    def queue_limit_bytes(self) -> int | None:
        """The queue: as given, else 100 ms or one bandwidth-delay product of the rate, whichever is more.

        None for an unlimited link, where nothing waits.
        """
        if self.rate_bit_per_s is None or self.queue_bytes is not None:
            return self.queue_bytes
        return max(_LEAST_QUEUE_BYTES, int(max(_QUEUE_S, self.round_trip_s) * self.rate_bit_per_s / 8))

    @property
    def mtu_bytes(self) -> int:
        """Fast links carry larger packets, so that emulating them in user space costs little."""
        is_fast = self.rate_bit_per_s is None or self.rate_bit_per_s >= _FAST_BIT_PER_S
        return _JUMBO_MTU_BYTES if is_fast else _USUAL_MTU_BYTES


class NatsRole(StrEnum):
    """How a NATS server is joined to the others."""

    HUB = "hub"
    LEAF = "leaf"
    CLUSTER = "cluster"


@dataclass(frozen=True, slots=True, kw_only=True)
class NatsServer:
    """A server on a host. A leaf connects to the server on host `hub`; members of the cluster all to each other."""

    role: NatsRole
    hub: str | None = None

    def __post_init__(self) -> None:
        if (self.role is NatsRole.LEAF) != (self.hub is not None):
            raise TopologyError("a leaf, and only a leaf, names the host whose server it joins: `leaf of NAME`")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A machine of its own: a network namespace."""

    name: str
    nats: NatsServer | None = None

    def __post_init__(self) -> None:
        if not _HOST_NAME.fullmatch(self.name):
            raise TopologyError(f"host name {self.name!r}: lower case letters and digits, at most ten, a letter first")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlace:
    """A stage worker on a host. `nats` names the host whose server it connects to."""

    host: str
    nats: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The whole laboratory. Workers stand in the order of their stages: the first is the head."""

    hosts: tuple[Host, ...]
    links: Mapping[frozenset[str], LinkSpec | None]
    """By the pair of hosts that it joins; None is a LAN: a plain pair of virtual Ethernet devices."""
    services: str
    """The host of Redis, scheduler and gateway."""
    workers: tuple[WorkerPlace, ...]
    congestion_control: str = "cubic"
    """Of TCP on every host."""

    def __post_init__(self) -> None:
        names = [host.name for host in self.hosts]
        if len(set(names)) != len(names) or not 1 <= len(names) <= _MOST_HOSTS:
            raise TopologyError(f"from 1 to {_MOST_HOSTS} hosts of different names, not {names}")
        for pair in self.links:
            if len(pair) != 2 or not pair <= set(names):
                raise TopologyError(f"a link joins two hosts that exist, not {sorted(pair)}")
        self._check_nats()
        if self.services not in names:
            raise TopologyError(f"services: there is no host {self.services!r}")
        for number, worker in enumerate(self.workers):
            if worker.host not in names:
                raise TopologyError(f"worker {number}: there is no host {worker.host!r}")
            if self.host(worker.nats).nats is None:
                raise TopologyError(f"worker {number}: no NATS server runs on host {worker.nats!r}")

    def _check_nats(self) -> None:
        servers = {host.name: host.nats for host in self.hosts if host.nats is not None}
        centre = [name for name, server in servers.items() if server.role is not NatsRole.LEAF]
        hubs = [name for name in centre if servers[name].role is NatsRole.HUB]
        if not centre or (hubs and len(centre) > 1) or (not hubs and len(centre) < 2):
            raise TopologyError(
                "one host must have the NATS hub, or two or more the members of a cluster; "
                f"here are {len(hubs)} hubs and {len(centre) - len(hubs)} members"
            )
        for name, server in servers.items():
            if server.hub is not None and server.hub not in centre:
                raise TopologyError(f"the NATS server on {name} is a leaf of {server.hub}, which has none to join")

    @property
    def is_mesh_of_one_kind(self) -> bool:
        """Whether any two hosts are joined, all in the same way, and each has a NATS server: no place is special."""
        pairs = {frozenset(pair) for pair in combinations((host.name for host in self.hosts), 2)}
        has_servers = all(host.nats is not None for host in self.hosts)
        return has_servers and set(self.links) == pairs and len(set(self.links.values())) == 1

    def host(self, name: str) -> Host:
        """The host of that name.

        Raises:
            TopologyError: there is none.
        """
        for host in self.hosts:
            if host.name == name:
                return host
        raise TopologyError(f"there is no host {name!r}")

    def link(self, a: str, b: str) -> LinkSpec | None:
        """How two hosts are joined; None is a LAN.

        Raises:
            TopologyError: they are not.
        """
        pair = frozenset((a, b))
        if pair not in self.links:
            raise TopologyError(f"no link joins {a!r} and {b!r}")
        return self.links[pair]

    def neighbours(self, name: str) -> Iterator[str]:
        """The hosts at the other ends of a host's links, in the order of hosts."""
        return (host.name for host in self.hosts if frozenset((name, host.name)) in self.links and host.name != name)

    def nearest_nats(self, name: str) -> str:
        """The host whose server the parts on host `name` use: its own, else the hub or first cluster member."""
        if self.host(name).nats is not None:
            return name
        return next(host.name for host in self.hosts if host.nats is not None and host.nats.role is not NatsRole.LEAF)


def two_hosts(link: LinkSpec | None, *, tail_site_has_leaf: bool = False) -> Topology:
    """Host a: NATS hub, services, head. Host b: tail, connected over the link, or through a leaf server of its own."""
    leaf = NatsServer(role=NatsRole.LEAF, hub="a") if tail_site_has_leaf else None
    return Topology(
        hosts=(Host(name="a", nats=NatsServer(role=NatsRole.HUB)), Host(name="b", nats=leaf)),
        links={frozenset("ab"): link},
        services="a",
        workers=(WorkerPlace(host="a", nats="a"), WorkerPlace(host="b", nats="b" if leaf else "a")),
    )


def three_hosts(link: LinkSpec | None) -> Topology:
    """Hosts a, b, c, each with a worker and a member of a NATS cluster; a link of its own between any two.

    What b sends to c goes b → its own server → c's server → c: over one link, once.
    """
    names = ("a", "b", "c")
    return Topology(
        hosts=tuple(Host(name=name, nats=NatsServer(role=NatsRole.CLUSTER)) for name in names),
        links={frozenset(pair): link for pair in ("ab", "ac", "bc")},
        services="a",
        workers=tuple(WorkerPlace(host=name, nats=name) for name in names),
    )
