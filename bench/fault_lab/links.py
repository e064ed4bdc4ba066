"""A TCP proxy between one worker and NATS that can be cut, in two ways, and mended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from enum import Enum, auto
from typing import cast

_HOST = "127.0.0.1"


class _Link(Enum):
    OPEN = auto()
    HELD = auto()
    CLOSED = auto()


class CuttableLink:
    """Carries every connection of one worker. Made by `open_link`; its methods take effect at once."""

    def __init__(self, to_port: int, tasks: asyncio.TaskGroup) -> None:
        self._to_port = to_port
        self._tasks = tasks
        self._state = _Link.OPEN
        self._mended = asyncio.Event()
        self._mended.set()
        self._ends: set[_End] = set()
        self.sent_bytes = 0
        """By the worker."""
        self.port = 0
        """Where the worker connects."""

    @property
    def is_held(self) -> bool:
        """Whether bytes wait."""
        return self._state is _Link.HELD

    def hold(self) -> None:
        """Carry nothing, close nothing: both sides believe that they are connected."""
        self._state = _Link.HELD
        self._mended.clear()
        self._read_or_not()

    def close(self) -> None:
        """Break every connection off, and every new one until it is mended."""
        self._state = _Link.CLOSED
        self._mended.set()
        for end in list(self._ends):
            end.abort()

    def mend(self) -> None:
        """Carry again; what was held arrives now."""
        self._state = _Link.OPEN
        self._mended.set()
        self._read_or_not()

    def _read_or_not(self) -> None:
        for end in self._ends:
            end.read_or_not()

    def accept(self) -> _End:
        """The near end of a connection that is being made."""
        return _End(self, is_near=True)

    def begin(self, end: _End) -> None:
        """A side is connected; the worker's gets a connection of its own to NATS."""
        if self._state is _Link.CLOSED:
            end.abort()
            return
        self._ends.add(end)
        end.read_or_not()
        if end.is_near:
            self._tasks.create_task(self._connect(end))

    async def _connect(self, near: _End) -> None:
        await self._mended.wait()
        far = _End(self, is_near=False)
        far.peer = near
        try:
            await asyncio.get_running_loop().create_connection(lambda: far, _HOST, self._to_port)
        except OSError:
            near.abort()
            return
        near.peer = far
        near.read_or_not()
        if near.is_gone:
            far.abort()

    def end(self, end: _End) -> None:
        """A side is gone, so the other goes too."""
        self._ends.discard(end)
        if end.peer is not None and not end.peer.is_gone:
            end.peer.finish()


class _End(asyncio.Protocol):
    def __init__(self, link: CuttableLink, *, is_near: bool) -> None:
        self._link = link
        self._transport: asyncio.Transport | None = None
        self._is_reading = True
        self._is_full = False
        self._kept = b""
        self.is_near = is_near
        self.is_gone = False
        self.peer: _End | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by inheritance
        self._link.begin(self)

    def data_received(self, data: bytes) -> None:
        if self._may_carry:
            self._hand_on(data)
        else:
            self._kept += data  # little: a new connection is read from before it can be told not to

    @property
    def _may_carry(self) -> bool:
        return not self._link.is_held and self.peer is not None

    def _hand_on(self, data: bytes) -> None:
        transport = None if self.peer is None else self.peer._transport
        if transport is not None and not transport.is_closing():
            self._link.sent_bytes += len(data) if self.is_near else 0
            transport.write(data)

    def pause_writing(self) -> None:
        self._is_full = True
        if self.peer is not None:
            self.peer.read_or_not()

    def resume_writing(self) -> None:
        self._is_full = False
        if self.peer is not None:
            self.peer.read_or_not()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_gone = True
        self._link.end(self)

    def read_or_not(self) -> None:
        """Read while there is somebody to hand it to who takes it."""
        if self._kept and self._may_carry:
            kept, self._kept = self._kept, b""
            self._hand_on(kept)
        wants = self._may_carry and self.peer is not None and not self.peer._is_full
        if self._transport is None or self._transport.is_closing() or wants == self._is_reading:
            return
        self._is_reading = wants
        if wants:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def finish(self) -> None:
        """Close when all has been sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Break it off."""
        if self._transport is not None:
            self._transport.abort()


@contextlib.asynccontextmanager
async def open_link(to_port: int) -> AsyncIterator[CuttableLink]:
    """A link to a port of this machine; at the end every connection is broken off."""
    async with asyncio.TaskGroup() as tasks:
        link = CuttableLink(to_port, tasks)
        server = await asyncio.get_running_loop().create_server(link.accept, _HOST, 0)
        link.port = server.sockets[0].getsockname()[1]
        try:
            yield link
        finally:
            server.close()
            link.close()
