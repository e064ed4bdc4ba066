"""The NATS library's client as `bus` needs it. Nobody else uses it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import nats.aio.client
from nats.aio.client import PING_PROTO, Client
from nats.aio.transport import TcpTransport

# The library reads 32 KiB at a time and stops the socket at 64: a step of a large model's decode is several of these.
nats.aio.client.DEFAULT_BUFFER_SIZE = 1024**2  # type: ignore[attr-defined]
_SOCKET_WAITS_BYTES = 64 * 1024


class NatsClient(Client):  # type: ignore[misc]  # the library has no types
    """The library's client, with two faults mended and a shorter way out."""

    async def _attempt_reconnect(self) -> None:
        """Give a dead connection up at once.

        The library itself waits until all that was written has gone out, which never happens when the cable is cut.
        """
        transport = self._transport
        if isinstance(transport, TcpTransport) and transport._io_writer is not None:
            transport._io_writer.transport.abort()
        await super()._attempt_reconnect()

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        """A ping behind all that was sent before it; the library's own goes ahead of what is not written yet.

        `flush` counts on the order: its answer must mean that a subscription is known, or gone.
        """
        self._pongs.append(future or asyncio.Future())
        await self._send_command(PING_PROTO)
        await self._flush_pending()

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        """Hand over to the socket at once; the library asks a task to do it, two turns of the loop later."""
        if force_flush or not self.is_connected or self._is_congested():
            return await super()._flush_pending(force_flush)
        with contextlib.suppress(OSError, RuntimeError):  # the connection has ended: the reader says so
            self._transport.writelines(self._pending)
        self._pending: list[bytes] = []
        self._pending_data_size = 0
        return None

    def publish_at_once(self, subject: str, data: bytes | bytearray | memoryview) -> bool:
        """Whether it could be done without waiting; raises what `publish` raises."""
        if self.is_connected and self._is_congested():
            return False
        try:
            # nothing in it waits as long as `_flush_pending` does not
            self.publish(subject, data).send(None)
        except StopIteration:
            return True
        raise AssertionError("the library waits where it did not wait")

    def _is_congested(self) -> bool:
        """Whether much waits for the socket already; the library's task waits until it has gone."""
        writer = self._transport._io_writer if isinstance(self._transport, TcpTransport) else None
        return writer is None or writer.transport.get_write_buffer_size() > _SOCKET_WAITS_BYTES
