"""The configuration of each NATS server of a topology. Decisions only."""

from __future__ import annotations

from collections.abc import Callable

from bench.netlab.topology import NatsRole, Topology
from molink.embedded import NATS_MAX_PAYLOAD_BYTES

CLIENT_PORT = 4222
LEAF_PORT = 7422
CLUSTER_PORT = 6222
_COMMON = """\
server_name: "{host}"
listen: "0.0.0.0:{port}"
# clients must not be told of addresses that do not lead over the links
client_advertise: "{address}:{port}"
max_payload: {max_payload}
# a slow link takes long to drain; the default of 10 s would cut its subscriber off and lose what is under way
write_deadline: "60s"
max_pending: 536870912
"""


def nats_config(topology: Topology, host: str, address_of: Callable[[str], str]) -> str:
    """What the server on `host` is started with; `address_of` gives the address of a host on the links."""
    server = topology.host(host).nats
    assert server is not None, f"a NATS server runs on {host}"
    text = _COMMON.format(host=host, port=CLIENT_PORT, address=address_of(host), max_payload=NATS_MAX_PAYLOAD_BYTES)
    servers = [one for one in topology.hosts if one.nats is not None]
    if any(one.nats is not None and one.nats.hub == host for one in servers):
        text += f'leafnodes {{ listen: "0.0.0.0:{LEAF_PORT}", advertise: "{address_of(host)}:{LEAF_PORT}" }}\n'
    if server.hub is not None:
        text += (
            f'leafnodes {{ remotes: [ {{ url: "nats://{address_of(server.hub)}:{LEAF_PORT}" }} ], reconnect: "1s" }}\n'
        )
    if server.role is NatsRole.CLUSTER:
        members = [one.name for one in servers if one.nats is not None and one.nats.role is NatsRole.CLUSTER]
        routes = ", ".join(f'"nats://{address_of(name)}:{CLUSTER_PORT}"' for name in members if name != host)
        text += (
            f'cluster {{ name: "molink", listen: "0.0.0.0:{CLUSTER_PORT}", '
            f'advertise: "{address_of(host)}:{CLUSTER_PORT}", routes: [ {routes} ] }}\n'
        )
    return text
