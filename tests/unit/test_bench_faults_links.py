"""A link that can be cut: what arrives, what waits, what breaks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from bench.fault_lab.links import CuttableLink, open_link

SHORT_S = 0.1


@contextlib.asynccontextmanager
async def _served(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """The port of a server; at the end each of its connections has ended."""
    connections: set[asyncio.Task[None]] = set()
    async with asyncio.TaskGroup() as tasks:

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                await answer(reader, writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.add(tasks.create_task(serve(reader, writer)))

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()[1]


async def _answer_alike(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


@contextlib.asynccontextmanager
async def _linked() -> AsyncIterator[CuttableLink]:
    async with _served(_answer_alike) as port, open_link(port) as link:
        yield link


async def _connect(link: CuttableLink) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", link.port)


async def _echoed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> bytes:
    writer.write(data)
    return await asyncio.wait_for(reader.readexactly(len(data)), 5)


async def test_it_carries_much_both_ways() -> None:
    async with _linked() as link:
        reader, writer = await _connect(link)
        data = bytes(range(256)) * 40_000  # more than any buffer on the way holds
        writer.write(data)
        assert await asyncio.wait_for(reader.readexactly(len(data)), 10) == data
        writer.close()


async def test_what_is_held_arrives_when_it_is_mended() -> None:
    async with _linked() as link:
        reader, writer = await _connect(link)
        assert await _echoed(reader, writer, b"before") == b"before"
        link.hold()
        writer.write(b"during")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), SHORT_S)
        link.mend()
        assert await asyncio.wait_for(reader.readexactly(6), 5) == b"during"
        writer.close()


async def test_who_connects_while_it_is_held_is_served_afterwards() -> None:
    async with _linked() as link:
        link.hold()
        reader, writer = await _connect(link)
        writer.write(b"early")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), SHORT_S)
        link.mend()
        assert await asyncio.wait_for(reader.readexactly(5), 5) == b"early"
        writer.close()


async def _is_broken(reader: asyncio.StreamReader) -> bool:
    try:
        return await asyncio.wait_for(reader.read(1), 5) == b""
    except ConnectionError:
        return True


async def test_a_closed_link_breaks_connections_and_takes_none_until_it_is_mended() -> None:
    async with _linked() as link:
        old, old_writer = await _connect(link)
        assert await _echoed(old, old_writer, b"before") == b"before"
        link.close()
        assert await _is_broken(old)
        new, new_writer = await _connect(link)
        assert await _is_broken(new)
        link.mend()
        again, again_writer = await _connect(link)
        assert await _echoed(again, again_writer, b"after") == b"after"
        for writer in (old_writer, new_writer, again_writer):
            writer.close()


async def test_when_one_side_ends_so_does_the_other() -> None:
    ended = asyncio.Event()

    async def notice(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.read()
        ended.set()

    async with _served(notice) as port, open_link(port) as link:
        _, writer = await _connect(link)
        writer.transport.abort()
        await asyncio.wait_for(ended.wait(), 5)


async def test_nobody_behind_it_breaks_the_connection() -> None:
    async with _served(_answer_alike) as port:
        pass
    async with open_link(port) as link:
        reader, writer = await _connect(link)
        assert await _is_broken(reader)
        writer.close()
