"""What a nats-server's log says of its links to other brokers, as sentences for a person. Decisions only.

    [8537] 2026/11/22 17:29:48.5 [INF] 10.0.0.1:7422 - lid:5 - Leafnode connection created for account: $G
    [8537] 2026/11/22 17:29:48.5 [ERR] 10.0.0.1:7422 - lid:5 - attempted to connect to wrong port

A connection is created before the other side has looked at it, and one that is refused is tried again at once. So
a link counts as up only when its connection lasts (`LINK_SETTLES_S`), and a problem is told once until then.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto

from molink.nats_config import LEAF_PORT, BrokerPlan

LINK_SETTLES_S = 0.5

_LINE = re.compile(
    r"\[\d+\] \S+ \S+ \[(?P<level>\w{3})\] (?:(?P<address>\S+) - (?P<link>[lr]id:\d+)(?: - | ))?(?P<text>.*)"
)
_AWAY = re.compile(r"Error trying to connect (?:as leafnode|to route).*\(attempt \d+\): (?P<why>.*)")
_CLOSED = re.compile(r"(?:Leafnode|Router) connection closed: (?P<why>[^-]*)")
_CREATED = re.compile(r"(?:Leafnode|Route) connection created")

_KNOWN_PROBLEMS = (
    (
        "wrong port",
        f"{{peer}} is a port for clients; a hub takes leaf nodes on another, by default {LEAF_PORT}: set --hub",
    ),
    (
        "Authorization Violation",
        "{peer} refuses this user and password: set --nats-user and --nats-password as they are there",
    ),
    ("authentication error", "{host} came with another user or password and was refused"),
    (
        "Loop detected",
        "this broker and the hub are joined in two ways, so messages would go round in circles: join one hub only, "
        "or use cluster routes (trying again in 30 s)",
    ),
    ("does not match", "{peer} belongs to another cluster: give every broker the same --cluster"),
    ("cluster name from remote", "{peer} belongs to another cluster: give every broker the same --cluster"),
)


class Kind(Enum):
    """What happened."""

    READY = auto()
    """The server takes clients."""
    UP = auto()
    """A link to another broker was opened."""
    DOWN = auto()
    """A link was closed; `text` says why."""
    PROBLEM = auto()
    """Something a person should know; `text` is the sentence."""


@dataclass(frozen=True, slots=True)
class Notice:
    """One line that matters."""

    kind: Kind
    link: str = ""
    """Which connection, as ``lid:5``."""
    peer: str = ""
    """The other side's address."""
    text: str = ""


def notice_of(line: str, plan: BrokerPlan) -> Notice | None:
    """What a line means for the broker that runs `plan`; None: nothing that a person must know."""
    match = _LINE.match(line.strip())
    if match is None:
        return None
    level, link, peer, text = match["level"], match["link"] or "", match["address"] or "", match["text"].strip()
    if text == "Server is ready":
        return Notice(Kind.READY)
    if _CREATED.match(text):
        return Notice(Kind.UP, link, peer)
    if closed := _CLOSED.match(text):
        return Notice(Kind.DOWN, link, peer, closed["why"].strip())
    if level not in ("WRN", "ERR", "FTL") or text.startswith(("Plaintext passwords", "Error flushing")):
        return None
    return Notice(Kind.PROBLEM, link, peer, _explained(text, peer, plan))


def _explained(text: str, peer: str, plan: BrokerPlan) -> str:
    """A known problem with its fix; any other as the server says it."""
    if away := _AWAY.match(text):
        why = away["why"].rpartition(": ")[2]
        if plan.hub:
            return (
                f"waiting for {plan.joins} ({why}); if this lasts, check --hub, and that the hub takes leaf nodes: "
                "molink up --leaf-port, molink broker --leaf-port"
            )
        return f"waiting for the brokers at {', '.join(plan.routes)} ({why}); if this lasts, check --routes"
    host = peer.rpartition(":")[0]  # the port of one who dials in changes each time
    return next((sentence.format(peer=peer, host=host) for words, sentence in _KNOWN_PROBLEMS if words in text), text)


class LinkStory:
    """Turns notices into sentences, each told when it becomes true and not again while it stays so."""

    def __init__(self, plan: BrokerPlan) -> None:
        self._plan = plan
        self._up: dict[str, str] = {}
        self._told: str | None = None

    def problem(self, text: str) -> str | None:
        """The sentence, unless it is the one that was told last."""
        if text == self._told:
            return None
        self._told = text
        return text

    def settled(self, link: str, peer: str) -> str:
        """The link has lasted."""
        self._up[link] = peer
        self._told = None
        return f"connected with {self._named(peer)}"

    def closed(self, link: str, why: str) -> str | None:
        """The link is gone; None if it never settled."""
        peer = self._up.pop(link, None)
        if peer is None:
            return None
        return f"lost {self._named(peer)} ({why}); local traffic goes on, connecting again"

    def _named(self, peer: str) -> str:
        port = peer.rpartition(":")[2]
        if any(address.rpartition(":")[2] == port for address in self._plan.hub):
            return f"the hub at {peer}"
        return f"the broker at {peer}"
