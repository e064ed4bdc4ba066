"""What a laboratory is made of: names, addresses and routes, from its number and its topology. Decisions only.

Each host has one address on all its links, so that a service is reached by the same address from everywhere, and one
on the management network, which joins it with the outside and with no other host: hosts have no route to each
other's management addresses, so what they send to each other crosses the links.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from bench.netlab.topology import Topology

MANAGEMENT_DEVICE = "mgmt"
MOST_LABS = 250
PREFIX = "ml-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """How one host reaches another: over its link with the neighbour `through`, which may be the other itself."""

    to: str
    through: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LabPlan:
    """Names and addresses in laboratory `number` of this machine."""

    number: int
    topology: Topology

    def _index(self, host: str) -> int:
        return [one.name for one in self.topology.hosts].index(host)

    def namespace(self, host: str) -> str:
        """The network namespace that is the host."""
        return f"{namespace_prefix(self.number)}{host}"

    def outer_device(self, host: str) -> str:
        """The outside end of the host's management network; its inner end is ``mgmt``."""
        return f"{device_prefix(self.number)}{self._index(host)}"

    def outer_address(self, host: str) -> str:
        """Of the outside end."""
        return f"198.18.{self.number}.{4 * self._index(host) + 1}"

    def management_address(self, host: str) -> str:
        """Where the outside reaches the host. The range is RFC 2544's, for measurements."""
        return f"198.18.{self.number}.{4 * self._index(host) + 2}"

    def link_address(self, host: str) -> str:
        """Where other hosts reach the host."""
        return f"10.77.0.{self._index(host) + 1}"

    def device(self, peer: str) -> str:
        """The name of a host's device on the link to `peer`."""
        return f"to-{peer}"

    def routes(self, host: str) -> list[Route]:
        """Ways to every host that can be reached, each over the fewest links."""
        found: list[Route] = []
        first_hop = {host: host}
        waiting = deque([host])
        while waiting:
            here = waiting.popleft()
            for there in self.topology.neighbours(here):
                if there in first_hop:
                    continue
                first_hop[there] = there if here == host else first_hop[here]
                waiting.append(there)
                found.append(Route(to=there, through=first_hop[there]))
        return found


def namespace_prefix(number: int) -> str:
    """How the names of a laboratory's namespaces begin."""
    return f"{PREFIX}{number}-"


def device_prefix(number: int) -> str:
    """How the names of a laboratory's devices outside its namespaces begin."""
    return f"{PREFIX}{number}h"
