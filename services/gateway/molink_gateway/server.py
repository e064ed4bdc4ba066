"""The gateway as a whole: its parts, its HTTP server, its end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import uvicorn

from molink_common.bus import open_bus
from molink_common.errors import MolinkError
from molink_common.identity import new_peer_id
from molink_common.logs import get_logger
from molink_common.telemetry import open_telemetry
from molink_gateway.access_log import AccessLog
from molink_gateway.api_errors import unavailable
from molink_gateway.app import Parts, make_app
from molink_gateway.cluster import Cluster
from molink_gateway.exchange import Door
from molink_gateway.mailbox import Patience
from molink_gateway.sequences import Sequences
from molink_gateway.settings import GatewaySettings

log = get_logger("gateway")

KEEP_ALIVE_S = 65
"""Longer than the minute after which proxies and clients give an idle connection up by themselves."""


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
                parts = Parts(
                    settings=settings,
                    gateway=gateway,
                    cluster=Cluster(bus, sequences.hear_state),
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


async def _run(parts: Parts, opened: socket.socket, port: int, stop: asyncio.Event) -> None:
    settings = parts.settings
    server = _Server(
        uvicorn.Config(
            AccessLog(make_app(parts)),
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
        background = [group.create_task(parts.sequences.serve()), group.create_task(parts.cluster.follow())]
        await parts.sequences.is_listening.wait()
        serving = group.create_task(server.serve(sockets=[opened]))
        log.info("gateway listens", url=f"http://{settings.host}:{port}", gateway=parts.gateway)
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
