"""Whether the service in this container is alive: exit code 0 or 1, and one line that says why.

    gateway       its HTTP server answers. 503 is an answer: a gateway without a pipeline is not ready, but alive.
    scheduler     a scheduler answers on the bus (of several, the one that is active).
    stage-worker  a heartbeat of this container's own worker passes by on the bus.

It is a process of its own and reads the same environment as the service, so it sees what a peer would see.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence

from molink_common import subjects
from molink_common.bus import BusSettings, Incoming, open_bus
from molink_common.errors import MolinkError
from molink_common.identity import subject_token
from molink_common.messages import AskState, ClusterState
from molink_common.settings import ServiceSettings, read_settings, variable_of

GATEWAY_PORT = 8000
TIMEOUT_S = 4.0
"""A heartbeat comes every second, so four seconds without one mean that three were missed."""


class Unhealthy(MolinkError):
    """The service does not do what shows that it lives. The message says what was expected."""


def check_gateway(port: int = GATEWAY_PORT, timeout_s: float = TIMEOUT_S) -> str:
    """One HTTP request to this container's own gateway.

    Raises:
        Unhealthy: no HTTP answer in time.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise Unhealthy(f"no HTTP answer on port {port}: {error!r}") from error
    finally:
        connection.close()
    return f"HTTP {status}"


async def check_scheduler(settings: BusSettings, timeout_s: float = TIMEOUT_S) -> str:
    """One question to the scheduler.

    Raises:
        MolinkError: the bus is away, nobody listens, or no answer came in time.
    """
    async with open_bus(settings, name="healthcheck") as bus:
        state = await bus.ask(subjects.STATUS, AskState(), ClusterState, timeout_s=timeout_s)
    return state.reason


async def check_worker(settings: BusSettings, host: str, timeout_s: float = TIMEOUT_S) -> str:
    """Wait for one heartbeat of the worker whose id carries this host's name.

    Raises:
        MolinkError: the bus is away, or no heartbeat came in time.
    """
    heard: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def listen(incoming: Incoming) -> None:
        if is_heartbeat_of(incoming.subject, host) and not heard.done():
            heard.set_result(incoming.subject)

    async with open_bus(settings, name="healthcheck") as bus:
        await bus.subscribe(subjects.ALL_HEARTBEATS, listen)
        try:
            return await asyncio.wait_for(heard, timeout_s)
        except TimeoutError:
            raise Unhealthy(f"no heartbeat of a worker on {host} within {timeout_s:g} s") from None


def is_heartbeat_of(subject: str, host: str) -> bool:
    """Whether a heartbeat's subject names a worker on `host` (a worker's id is worker-<host>-<random>)."""
    before, _, after = subjects.ALL_HEARTBEATS.partition("*")
    worker = subject.removeprefix(before).removesuffix(after)
    return f"-{subject_token(host)}-" in worker


def bus_settings_of(environment: Mapping[str, str]) -> BusSettings:
    """The settings that every service shares, and no others: a health check need not know the rest."""
    shared = {variable_of(field) for field in ServiceSettings.model_fields}
    own = {name: value for name, value in environment.items() if name in shared}
    own[variable_of("nats_connect_timeout_s")] = f"{TIMEOUT_S:g}"
    return read_settings(ServiceSettings, [], own, program="healthcheck").bus_settings()


def main(arguments: Sequence[str]) -> int:
    """Check the service that the one argument names."""
    # Docker keeps what is printed here: one line, without what the bus says of its connection
    logging.disable()
    try:
        match list(arguments):
            case ["gateway"]:
                print(check_gateway())
            case ["scheduler"]:
                print(asyncio.run(check_scheduler(bus_settings_of(os.environ))))
            case ["stage-worker"]:
                print(asyncio.run(check_worker(bus_settings_of(os.environ), socket.gethostname())))
            case _:
                print("usage: healthcheck.py gateway|scheduler|stage-worker", file=sys.stderr)
                return 1
    except MolinkError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
