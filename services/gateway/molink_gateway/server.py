"""The gateway as a whole: its parts, its HTTP server, its end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from molink_common.bus import open_bus
from molink_common.errors import MolinkError
from molink_common.identity import new_peer_id
from molink_common.logs import get_logger
from molink_common.memory import spare_what_lives
from molink_common.messages import ClusterState
from molink_common.telemetry import open_telemetry
from molink_gateway.access_log import AccessLog
from molink_gateway.api_errors import unavailable
from molink_gateway.app import Parts, make_app
from molink_gateway.auth import Doorkeeper, KeyGuard
from molink_gateway.cluster import Cluster
from molink_gateway.exchange import Door
from molink_gateway.kept_responses import KeptResponses
from molink_gateway.key_table import KeyTable
from molink_gateway.mailbox import Patience
from molink_gateway.messages_errors import MessagesErrors
from molink_gateway.sequences import Sequences
from molink_gateway.settings import GatewaySettings

log = get_logger("gateway")

KEEP_ALIVE_S = 65
"""Longer than the minute after which proxies and clients give an idle connection up by themselves."""


_TOLD_TO_PAGES = ("x-request-id", "x-molink-stream", "retry-after")
"""Headers that a web page of another origin may read."""
_STOPPING = (
    "The gateway is stopping. Send the request again, or, if its answer had the header `X-MoLink-Stream`, take the "
    "stream up with `Last-Event-ID`."
)


class Missed:
    """Whom to tell that messages may have been lost: the bus is opened before there is anybody."""

    def __init__(self) -> None:
        self.ask: Callable[[], None] = lambda: None

    def tell(self) -> None:
        """The connection was away, or NATS dropped messages."""
        self.ask()


class _Server(uvicorn.Server):  # type: ignore[misc]
    """uvicorn without signal handlers: the service has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


async def serve(settings: GatewaySettings, stop: asyncio.Event, opened: socket.socket) -> None:
    """Serve HTTP on a listening socket until `stop` is set; open requests then get `stop_grace_s` to finish.

    Raises:
        BusUnavailable: no NATS.
    """
    with contextlib.closing(opened):
        port = opened.getsockname()[1]
        gateway = settings.gateway_id or new_peer_id("gateway")
        telemetry = open_telemetry(
            service="gateway", instance=gateway, endpoint=settings.otlp_endpoint, trace_share=settings.trace_share
        )
        try:
            missed = Missed()
            async with open_bus(
                settings.bus_settings(), name=gateway, on_reconnect=missed.tell, on_fault=lambda _: missed.tell()
            ) as bus:
                patience = Patience(
                    queue_timeout_s=settings.queue_timeout_s,
                    stall_timeout_s=settings.stall_timeout_s,
                    gap_timeout_s=settings.gap_timeout_s,
                )
                sequences = Sequences(bus, gateway=gateway, patience=patience)
                missed.ask = sequences.may_have_missed
                doorkeeper = Doorkeeper(settings.require_keys, is_loopback=_is_loopback(opened))
                keys = KeyTable(bus, doorkeeper.hear)

                def hear_state(state: ClusterState) -> None:
                    keys.hear_state(state)
                    sequences.hear_state(state)

                parts = Parts(
                    settings=settings,
                    gateway=gateway,
                    cluster=Cluster(bus, hear_state),
                    doorkeeper=doorkeeper,
                    keys=keys,
                    kept=KeptResponses(bus),
                    sequences=sequences,
                    telemetry=telemetry,
                    door=Door(settings.max_streams),
                )
                await _run(parts, opened, port, stop)
        finally:
            await asyncio.to_thread(telemetry.close)


@contextlib.asynccontextmanager
async def _errors_alone() -> AsyncIterator[None]:
    """A task group reports its tasks' errors as a group; the service knows what to do with one of ours."""
    try:
        yield
    except ExceptionGroup as errors:
        ours = errors.subgroup(MolinkError)
        if ours is None:
            raise
        raise ours.exceptions[0] from errors


def _is_loopback(opened: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return ipaddress.ip_address(str(opened.getsockname()[0]).partition("%")[0]).is_loopback


def _layers(parts: Parts) -> ASGIApp:
    """The routes behind what every request passes: the log, a browser's questions, the keys."""
    app: ASGIApp = MessagesErrors(KeyGuard(make_app(parts), parts.doorkeeper))
    if parts.settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=parts.settings.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=_TOLD_TO_PAGES,
        )
    return AccessLog(app)


async def _run(parts: Parts, opened: socket.socket, port: int, stop: asyncio.Event) -> None:
    settings = parts.settings
    server = _Server(
        uvicorn.Config(
            _layers(parts),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            http="httptools",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=settings.stop_grace_s + 2,
        )
    )
    async with _errors_alone(), asyncio.TaskGroup() as group:
        background = [
            group.create_task(parts.sequences.serve()),
            group.create_task(parts.cluster.follow()),
            group.create_task(parts.keys.follow()),
        ]
        await parts.sequences.is_listening.wait()
        spare_what_lives()
        serving = group.create_task(server.serve(sockets=[opened]))
        log.info(
            "gateway listens",
            url=f"http://{settings.host}:{port}",
            gateway=parts.gateway,
            who_may_ask=parts.doorkeeper.rule,
        )
        stopping = group.create_task(stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await asyncio.wait({serving}, timeout=settings.stop_grace_s)
        # whoever is still open reads a proper error instead of a cut connection
        parts.sequences.interrupt_all(unavailable(_STOPPING, code="stopping"))
        await asyncio.wait({serving})
        for task in (*background, stopping):
            task.cancel()
    log.info("gateway stopped", gateway=parts.gateway)
