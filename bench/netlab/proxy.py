"""A TCP proxy that is a slow link, for machines without root.

    python -m bench.netlab.proxy --listen 127.0.0.1:5222 --to 127.0.0.1:4222 --rate-mbit 100 --round-trip-ms 30

All its connections share one rate in each direction. It takes no more than its queue holds: while that is full it
does not read, so that senders feel the link as back-pressure. It differs from a real link in what TCP does across
one: there is no loss, no slow start over the round trip, and the kernel's buffers on both sides hold some more.
Where there is root, the laboratory proper is the better measure.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

_LEAST_QUEUE_BYTES = 16 * 1024
_QUEUE_S = 0.1
_LARGEST_CHUNK_BYTES = 64 * 1024
_LEAST_CHUNK_BYTES = 1448
_CHUNK_S = 0.001
_SOCKET_BUFFER_BYTES = 64 * 1024
_UNLIMITED_HOLDS_BYTES = 16 * 1024 * 1024
_CONNECT_TIMEOUT_S = 10.0


@dataclass(slots=True, kw_only=True)
class Transmitter:
    """One direction of the link: when bytes taken now arrive. Decisions only; the clock is an argument.

    The next bytes begin to be sent when those before have been (virtual finish time), so the long-run rate is exact
    however late the shell acts.
    """

    rate_bytes_per_s: float | None
    """None: unlimited."""
    delay_s: float
    queue_bytes: int
    """What may wait to be sent."""
    free_at_s: float = 0.0
    """When everything taken so far has been sent."""

    @property
    def chunk_bytes(self) -> int:
        """How much to take at once: a millisecond's worth, so that connections get their turns."""
        if self.rate_bytes_per_s is None:
            return _LARGEST_CHUNK_BYTES
        return min(_LARGEST_CHUNK_BYTES, max(_LEAST_CHUNK_BYTES, int(self.rate_bytes_per_s * _CHUNK_S)))

    @property
    def holds_bytes(self) -> int:
        """What the link holds when it is full: its queue, and what travels."""
        if self.rate_bytes_per_s is None:
            return _UNLIMITED_HOLDS_BYTES
        return self.queue_bytes + int(self.rate_bytes_per_s * self.delay_s) + self.chunk_bytes

    def room_in_s(self, size_bytes: int, *, now_s: float) -> float:
        """How long until the queue has room for so many bytes; for more than it can hold, until it is empty."""
        if self.rate_bytes_per_s is None:
            return 0.0
        may_wait_s = max(0, self.queue_bytes - size_bytes) / self.rate_bytes_per_s
        return max(0.0, self.free_at_s - may_wait_s - now_s)

    def take(self, size_bytes: int, *, now_s: float) -> float:
        """Take bytes that there is room for; gives the time at which they arrive."""
        sending_s = 0.0 if self.rate_bytes_per_s is None else size_bytes / self.rate_bytes_per_s
        self.free_at_s = max(self.free_at_s, now_s) + sending_s
        return self.free_at_s + self.delay_s


def transmitter(*, rate_bit_per_s: float | None, round_trip_s: float) -> Transmitter:
    """One direction of a link, with a queue of 100 ms or a round trip, whichever is more."""
    if rate_bit_per_s is None:
        return Transmitter(rate_bytes_per_s=None, delay_s=round_trip_s / 2, queue_bytes=_LEAST_QUEUE_BYTES)
    queue = int(max(_QUEUE_S, round_trip_s) * rate_bit_per_s / 8)
    return Transmitter(
        rate_bytes_per_s=rate_bit_per_s / 8,
        delay_s=round_trip_s / 2,
        queue_bytes=max(_LEAST_QUEUE_BYTES, queue),
    )


class Direction:
    """Carries the bytes of all connections one way."""

    def __init__(self, decisions: Transmitter) -> None:
        self._decisions = decisions
        self._turn = asyncio.Lock()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the sender has said everything; then the receiver is told that this was all."""
        under_way = UnderWay(self._decisions.holds_bytes)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._take(reader, under_way))
            tasks.create_task(_deliver(under_way, writer))

    async def _take(self, reader: asyncio.StreamReader, under_way: UnderWay) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            data = await reader.read(self._decisions.chunk_bytes)
            async with self._turn:  # a lock is taken in the order of asking: connections get equal turns
                if wait_s := self._decisions.room_in_s(len(data), now_s=clock()):
                    await asyncio.sleep(wait_s)
                due_s = self._decisions.take(len(data), now_s=clock())
            await under_way.put(due_s, data)
            if not data:
                return


class UnderWay:
    """What one connection has on its way; bounded, so that a receiver that does not read is felt by the sender."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._chunks: deque[tuple[float, bytes]] = deque()
        self._changed = asyncio.Condition()

    async def put(self, due_s: float, data: bytes) -> None:
        """Wait for room, then add a chunk."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._held_bytes + len(data) <= self._limit_bytes)
            self._held_bytes += len(data)
            self._chunks.append((due_s, data))
            self._changed.notify_all()

    async def get(self) -> tuple[float, bytes]:
        """The next chunk; its room is given back by `delivered`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._chunks)
            return self._chunks.popleft()

    async def delivered(self, size_bytes: int) -> None:
        """So many bytes have reached the receiver."""
        async with self._changed:
            self._held_bytes -= size_bytes
            self._changed.notify_all()


async def _deliver(under_way: UnderWay, writer: asyncio.StreamWriter) -> None:
    clock = asyncio.get_running_loop().time
    while True:
        due_s, data = await under_way.get()
        if (wait_s := due_s - clock()) > 0:
            await asyncio.sleep(wait_s)
        if not data:
            writer.write_eof()
            return
        writer.write(data)
        await writer.drain()
        await under_way.delivered(len(data))


@contextlib.asynccontextmanager
async def open_proxy(
    listen: tuple[str, int], to: tuple[str, int], *, rate_bit_per_s: float | None, round_trip_s: float
) -> AsyncIterator[tuple[str, int]]:
    """Accept connections and join each to one to `to`; gives the address (port 0 takes a free one).

    At the end every connection is broken off.
    """
    forth, back = (Direction(transmitter(rate_bit_per_s=rate_bit_per_s, round_trip_s=round_trip_s)) for _ in range(2))
    running: set[asyncio.Task[None]] = set()
    async with asyncio.TaskGroup() as connections:

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = connections.create_task(_join(reader, writer, to, forth, back))
            running.add(task)
            task.add_done_callback(running.discard)

        server = await asyncio.start_server(accept, sock=_listener(listen), limit=_SOCKET_BUFFER_BYTES)
        try:
            async with server:
                yield server.sockets[0].getsockname()[:2]
        finally:
            for task in running:
                task.cancel()


def _listener(address: tuple[str, int]) -> socket.socket:
    listener = socket.create_server(address)
    # the kernel's own buffers are a queue that we do not see: keep them small
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_BYTES)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
    return listener


async def _join(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    to: tuple[str, int],
    forth: Direction,
    back: Direction,
) -> None:
    """Carry a connection until both sides have said everything, or one breaks it off: so does the other then."""
    async with contextlib.AsyncExitStack() as writers:
        writers.push_async_callback(_close, writer)
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                far_reader, far_writer = await asyncio.open_connection(*to, limit=_SOCKET_BUFFER_BYTES)
        except (OSError, TimeoutError):
            return
        writers.push_async_callback(_close, far_writer)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(forth.carry(reader, far_writer))
                tasks.create_task(back.carry(far_reader, writer))
        except* (OSError, asyncio.CancelledError):
            far_writer.transport.abort()
            writer.transport.abort()


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no address; give one as 127.0.0.1:5222")
    return host.strip("[]"), int(port)


async def _run(arguments: argparse.Namespace) -> None:
    rate = arguments.rate_mbit * 1e6 if arguments.rate_mbit else None
    trip_s = arguments.round_trip_ms / 1e3
    async with open_proxy(arguments.listen, arguments.to, rate_bit_per_s=rate, round_trip_s=trip_s) as address:
        print("listening on " + ":".join(map(str, address)), flush=True)
        await asyncio.Event().wait()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.netlab.proxy", description="A TCP proxy that is a slow link."
    )
    parser.add_argument(
        "--listen", type=_address, required=True, help="where to accept, as 127.0.0.1:5222; port 0: a free one"
    )
    parser.add_argument("--to", type=_address, required=True, help="where to connect, as 127.0.0.1:4222")
    parser.add_argument("--rate-mbit", type=float, default=None, help="of each direction; left out: unlimited")
    parser.add_argument("--round-trip-ms", type=float, default=0.0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        asyncio.run(_run(parse(sys.argv[1:])))
    except KeyboardInterrupt:
        sys.exit(130)
