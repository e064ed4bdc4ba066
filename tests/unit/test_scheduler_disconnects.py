"""What follows from what the broker tells of a connection that has ended."""

from __future__ import annotations

import json
from typing import Any

import pytest

from molink_scheduler.disconnects import worker_gone


def advisory(reason: str = "Client Closed", **client: Any) -> bytes:
    """As nats-server writes it, less what nobody reads."""
    return json.dumps(
        {
            "type": "io.nats.server.advisory.v1.client_disconnect",
            "server": {"name": "leaf"},
            "client": {"acc": "POOL", "kind": "Client", **client},
            "reason": reason,
        }
    ).encode()


@pytest.mark.parametrize("reason", ["Client Closed", "Read Error", "Write Error"])
def test_a_process_that_ended_is_named(reason: str) -> None:
    assert worker_gone(advisory(reason, name="worker-host-1a2b")) == "worker-host-1a2b"


@pytest.mark.parametrize("reason", ["Stale Connection", "Slow Consumer (Write Deadline)", "Server Shutdown", "", None])
def test_who_may_still_live_is_left_to_its_heartbeats(reason: Any) -> None:
    assert worker_gone(advisory(reason, name="worker-host-1a2b")) is None


def test_the_connection_for_bulk_is_no_worker() -> None:
    assert worker_gone(advisory(name="worker-host-1a2b-bulk")) is None


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"{}", b'{"client": null}', b"\xff", advisory(), advisory(name=7)]
)
def test_what_is_no_advisory_of_a_named_client_says_nothing(data: bytes) -> None:
    assert worker_gone(data) is None
