"""The configuration of each NATS server of a topology: that of the product's own site brokers. Decisions only."""

from __future__ import annotations

from collections.abc import Callable

from bench.netlab.topology import NatsRole, Topology
from molink.nats_config import CLIENT_PORT, CLUSTER_PORT, LEAF_PORT, BrokerPlan, render, site_config


def nats_config(topology: Topology, host: str, address_of: Callable[[str], str]) -> str:
    """What the server on `host` is started with; `address_of` gives the address of a host on the links."""
    # clients must not be told of addresses that do not lead over the links
    advertised = {"client_advertise": f"{address_of(host)}:{CLIENT_PORT}"}
    return render(site_config(_plan(topology, host, address_of)) | advertised)


def _plan(topology: Topology, host: str, address_of: Callable[[str], str]) -> BrokerPlan:
    servers = {one.name: one.nats for one in topology.hosts if one.nats is not None}
    leaf_port = LEAF_PORT if any(server.hub == host for server in servers.values()) else None
    hub = servers[host].hub
    if hub is not None:
        joined = (f"{address_of(hub)}:{LEAF_PORT}",)
        return BrokerPlan(site=host, server_name=host, host="0.0.0.0", leaf_port=leaf_port, hub=joined)
    if servers[host].role is NatsRole.HUB:
        return BrokerPlan(site=host, server_name=host, host="0.0.0.0", leaf_port=leaf_port)
    others = [name for name, server in servers.items() if server.role is NatsRole.CLUSTER and name != host]
    return BrokerPlan(
        site=host,
        server_name=host,
        host="0.0.0.0",
        leaf_port=leaf_port,
        cluster="molink",
        cluster_port=CLUSTER_PORT,
        advertise=f"{address_of(host)}:{CLUSTER_PORT}",
        routes=tuple(f"{address_of(name)}:{CLUSTER_PORT}" for name in others),
    )
