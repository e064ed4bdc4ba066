"""What the broker tells of a connection that has ended: whose it was, if a worker's end may be the reason.

The broker's own words (`subjects.BROKER_DISCONNECTS`; see nats-server's "Client Disconnect" advisory): JSON with the
name that the client gave itself and the reason. A worker's first connection carries its id; that of its second one,
for bulk, tells nothing more.
"""

from __future__ import annotations

import orjson

from molink_common.logs import get_logger

log = get_logger("scheduler.disconnects")

BULK_SUFFIX = "-bulk"

_ENDED = frozenset({"Client Closed", "Read Error", "Write Error"})
"""The other side is gone. Which one it is depends on what was under way to a process when it was killed. With any
other reason (it was too slow, did not answer, was refused) the process may well live: its heartbeats decide."""


def worker_gone(advisory: bytes) -> str | None:
    """The name of the client that is gone for good; None: nothing follows from it."""
    try:
        said = orjson.loads(advisory)
        name, reason = said["client"]["name"], said["reason"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        # clients without a name are no workers; anything else is no advisory
        log.debug("a disconnect that does not parse or has no name")
        return None
    if not isinstance(name, str) or reason not in _ENDED or name.endswith(BULK_SUFFIX):
        return None
    return name
