"""`molink broker`: one site's nats-server in the foreground, and the signals that end it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated

import typer

from molink.nats_config import CLIENT_PORT, CLUSTER_PORT, LEAF_PORT, BrokerPlan, Credentials, peers
from molink.site_broker import run_broker
from molink.site_folder import RunningBroker, announce, hold_site, site_folder, wait_until_unused
from molink_common.errors import SettingsError
from molink_common.folders import cache_folder
from molink_common.identity import new_peer_id

Port = Annotated[int, typer.Option(min=1, max=65535, help="Port for workers and other clients.")]


def broker(
    *,
    site: Annotated[str, typer.Option(help="Name of this site, as workers give it with --site.")],
    hub: Annotated[
        str | None, typer.Option(help=f"Join this hub as a leaf node; its port for leaf nodes ({LEAF_PORT}).")
    ] = None,
    cluster: Annotated[str | None, typer.Option(help="Join this cluster: brokers that all reach each other.")] = None,
    routes: Annotated[
        str, typer.Option(help=f"The cluster's other brokers, with commas; their port for routes ({CLUSTER_PORT}).")
    ] = "",
    host: Annotated[str, typer.Option(help="Address for clients; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Port = CLIENT_PORT,
    leaf_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Be a hub: take leaf nodes on this port. Default: none.")
    ] = None,
    cluster_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help=f"Take routes on this port. Default: {CLUSTER_PORT}.")
    ] = None,
    peers_host: Annotated[str, typer.Option(help="Address for leaf nodes and routes.")] = "0.0.0.0",
    advertise: Annotated[
        str | None, typer.Option(help="host:port of --cluster-port as others reach it, where that differs.")
    ] = None,
    nats_user: Annotated[
        str | None, typer.Option(envvar="MOLINK_NATS_USER", help="User: for clients, other brokers and the hub.")
    ] = None,
    nats_password: Annotated[
        str | None, typer.Option(envvar="MOLINK_NATS_PASSWORD", help="Password that goes with it.")
    ] = None,
    while_used: Annotated[bool, typer.Option("--while-used", hidden=True)] = False,
) -> None:
    """Run a site's own NATS server: an activation crosses the slow link once, and stages here talk locally."""
    plan = BrokerPlan(
        site=site,
        server_name=new_peer_id(f"site-{site}"),
        host=host,
        port=port,
        hub=peers(hub or "", flag="--hub", default_port=LEAF_PORT),
        cluster=cluster,
        routes=peers(routes, flag="--routes", default_port=CLUSTER_PORT),
        peers_host=peers_host,
        leaf_port=leaf_port,
        cluster_port=CLUSTER_PORT if cluster is not None and cluster_port is None else cluster_port,
        advertise=advertise,
        credentials=credentials_of(nats_user, nats_password),
    )
    asyncio.run(_serve(plan, while_used=while_used))


def credentials_of(user: str | None, password: str | None) -> Credentials | None:
    """Both or none.

    Raises:
        SettingsError: one without the other.
    """
    if (user is None) != (password is None):
        raise SettingsError("--nats-user and --nats-password belong together: give both or none")
    return None if user is None or password is None else Credentials(user=user, password=password)


async def _serve(plan: BrokerPlan, *, while_used: bool) -> None:
    folder = site_folder(cache_folder(), plan.site)
    with hold_site(folder, plan.site) as file:

        def ready() -> None:
            announce(file, RunningBroker(pid=os.getpid(), url=plan.client_url, joins=plan.joins))
            _say_ready(plan)
            if while_used:  # whoever started us waits for this line
                print(plan.client_url, flush=True)

        async with _stop_event() as stop:
            if while_used:
                _stop_when_unused(folder, asyncio.get_running_loop(), stop)
            await run_broker(plan, folder=folder, say=_say, ready=ready, stop=stop)
            _say("stopped")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _say_ready(plan: BrokerPlan) -> None:
    _say(f"broker of site {plan.site}: {plan.client_url}, joins {plan.joins}")
    for flag, (host, port) in plan.doors.items():
        if plan.credentials is None and host not in ("127.0.0.1", "::1", "localhost"):
            _say(f"  {flag} {port} on {host} is open to whoever reaches it: set --nats-user and --nats-password")


def _stop_when_unused(folder: Path, loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Set `stop` once the last user is gone.

    The wait is a lock of the operating system, which no event loop can await and nothing can cancel. So it has a
    thread of its own, which the end of this process ends; with it the lock is given back, and not before: a worker
    that comes while we stop waits for us and then starts a new broker.
    """

    def wait() -> None:
        kept.append(wait_until_unused(folder))
        with contextlib.suppress(RuntimeError):  # stopped by a signal, the loop is gone already
            loop.call_soon_threadsafe(stop.set)

    kept: list[object] = []
    threading.Thread(target=wait, name="until unused", daemon=True).start()


@contextlib.asynccontextmanager
async def _stop_event() -> AsyncIterator[asyncio.Event]:
    """Set by SIGINT, SIGTERM and SIGHUP."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    on_signal: Callable[[], None] = stop.set
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and sys.platform != "win32":
            loop.add_signal_handler(getattr(signal, name), on_signal)
    yield stop
