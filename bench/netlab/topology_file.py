"""Reads a topology from a TOML file; whatever it does not know is refused.

services = "a"                      # the host of Redis, scheduler and gateway
congestion_control = "cubic"        # optional

[hosts.a]
nats = "hub"                        # or "cluster", "leaf of NAME"; left out: no server on this host
[hosts.b]

[[links]]
between = ["a", "b"]                # nothing more: a LAN
rate_mbit_per_s = 100               # left out: unlimited
round_trip_ms = 30
queue_ms = 100                      # of the rate; or queue_bytes; left out: 100 ms or a bandwidth-delay product
loss_percent = 0

[[workers]]                         # in the order of their stages, the head first
host = "a"
nats = "a"                          # whose server it connects to; left out: its own host's, else the hub
flags = ["--max-running", "32"]
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.netlab.topology import Host, LinkSpec, NatsRole, NatsServer, Topology, TopologyError, WorkerPlace

_SHAPE = ("rate_mbit_per_s", "round_trip_ms", "queue_ms", "queue_bytes", "loss_percent")


def read_topology(path: Path) -> Topology:
    """The topology that a file describes.

    Raises:
        TopologyError: with the file's name and what is wrong in it.
        OSError: it cannot be read.
    """
    try:
        return parse_topology(path.read_text())
    except TopologyError as error:
        raise TopologyError(f"{path}: {error}") from error


def parse_topology(text: str) -> Topology:
    """The topology that a TOML text describes.

    Raises:
        TopologyError
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TopologyError(f"this is no TOML: {error}") from error
    _refuse_unknown("the file", table, ("services", "congestion_control", "hosts", "links", "workers"))
    hosts = tuple(_host(name, _is("hosts." + name, body, dict)) for name, body in _take(table, "hosts", dict).items())
    links: dict[frozenset[str], LinkSpec | None] = {}
    for body in _take(table, "links", list, []):
        pair, spec = _link(_is("links", body, dict))
        if pair in links:
            raise TopologyError(f"links: {sorted(pair)} are joined twice")
        links[pair] = spec
    workers = [_worker(_is("workers", body, dict), hosts) for body in _take(table, "workers", list, [])]
    return Topology(
        hosts=hosts,
        links=links,
        services=_take(table, "services", str),
        workers=tuple(workers),
        congestion_control=_take(table, "congestion_control", str, "cubic"),
    )


def _host(name: str, body: Mapping[str, Any]) -> Host:
    _refuse_unknown(f"hosts.{name}", body, ("nats",))
    nats = _take(body, "nats", str, "")
    match nats.split():
        case []:
            return Host(name=name)
        case ["hub" | "cluster" as role]:
            return Host(name=name, nats=NatsServer(role=NatsRole(role)))
        case ["leaf", "of", hub]:
            return Host(name=name, nats=NatsServer(role=NatsRole.LEAF, hub=hub))
    raise TopologyError(f"hosts.{name}.nats is {nats!r}; it must be `hub`, `cluster` or `leaf of NAME`")


def _link(body: Mapping[str, Any]) -> tuple[frozenset[str], LinkSpec | None]:
    _refuse_unknown("links", body, ("between", *_SHAPE))
    pair = frozenset(_is("links.between", one, str) for one in _take(body, "between", list))
    if not set(body) & set(_SHAPE):
        return pair, None
    rate_mbit = _take(body, "rate_mbit_per_s", float, 0.0)
    queue_ms, queue_bytes = _take(body, "queue_ms", float, 0.0), _take(body, "queue_bytes", int, 0)
    if (queue_ms or queue_bytes) and not rate_mbit:
        raise TopologyError("links: a queue without rate_mbit_per_s; nothing waits on an unlimited link")
    if queue_ms and queue_bytes:
        raise TopologyError("links: queue_ms or queue_bytes, not both")
    spec = LinkSpec(
        rate_bit_per_s=rate_mbit * 1e6 or None,
        round_trip_s=_take(body, "round_trip_ms", float, 0.0) / 1e3,
        queue_bytes=queue_bytes or int(queue_ms * rate_mbit * 1e3 / 8) or None,
        loss=_take(body, "loss_percent", float, 0.0) / 100,
    )
    return pair, spec


def _worker(body: Mapping[str, Any], hosts: tuple[Host, ...]) -> WorkerPlace:
    _refuse_unknown("workers", body, ("host", "nats", "flags"))
    host = _take(body, "host", str)
    servers = {one.name: one.nats.role for one in hosts if one.nats is not None}
    centre = next((name for name, role in servers.items() if role is not NatsRole.LEAF), "")
    flags = tuple(_is("workers.flags", flag, str) for flag in _take(body, "flags", list, []))
    return WorkerPlace(host=host, nats=_take(body, "nats", str, host if host in servers else centre), flags=flags)


def _refuse_unknown(where: str, body: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if unknown := sorted(set(body) - set(known)):
        raise TopologyError(f"{where}: unknown {', '.join(unknown)}; known are {', '.join(known)}")


def _take(body: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    if key not in body:
        if default is None:
            raise TopologyError(f"{key} is missing")
        return default
    return _is(key, body[key], kind)


def _is(where: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TopologyError(f"{where} is {value!r}; it must be a {kind.__name__}")
    return value
