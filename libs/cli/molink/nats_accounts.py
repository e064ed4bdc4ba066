"""Who may use a broker, and how it tells the pool of connections that have ended. Decisions only.

nats-server tells of every client that leaves, but only in its system account, which nobody may enter. So the pool is
an account of its own, and one subject of the system account is imported into it: whoever listens to
`subjects.BROKER_DISCONNECTS` hears it over the connection that it has anyway. A leaf node does the same for its own
clients, and its hub's subscribers hear those too, because the subscription crosses the link like any other.

deploy/nats*.conf say the same for containers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from molink_common import subjects

POOL_ACCOUNT = "POOL"
_SYSTEM_ACCOUNT = "SYS"
_DISCONNECTS = f"$SYS.ACCOUNT.{POOL_ACCOUNT}.DISCONNECT"

# An account needs a user. Whoever comes without a name is this one where no password is asked for.
ANYBODY = {"user": "molink-anybody", "password": "molink-anybody"}


def accounts_config(users: Sequence[dict[str, str]], *, open_to_all: bool) -> dict[str, Any]:
    """The pool's account with its users, and the system account that tells it who has left."""
    config: dict[str, Any] = {
        "system_account": _SYSTEM_ACCOUNT,
        "accounts": {
            _SYSTEM_ACCOUNT: {"exports": [{"stream": _DISCONNECTS, "accounts": [POOL_ACCOUNT]}]},
            POOL_ACCOUNT: {
                "users": [*users, ANYBODY] if open_to_all else list(users),
                "imports": [
                    {
                        "stream": {"account": _SYSTEM_ACCOUNT, "subject": _DISCONNECTS},
                        "to": subjects.BROKER_DISCONNECTS,
                    }
                ],
            },
        },
    }
    if open_to_all:
        config["no_auth_user"] = ANYBODY["user"]
    return config


def leaf_authorization(user: dict[str, str] | None) -> dict[str, Any]:
    """Leaf nodes join the pool's account; None lets any in."""
    return {**(user or {}), "account": POOL_ACCOUNT}
