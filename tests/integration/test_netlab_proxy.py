"""The shaping proxy between real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from bench.netlab.proxy import open_proxy

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def through_proxy(
    serve: Serve, *, rate_bit_per_s: float | None = None, round_trip_s: float = 0.0
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection through a proxy to `serve`, which is given one."""
    ended = asyncio.Event()

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await serve(reader, writer)
        await close(writer)
        ended.set()

    async with asyncio.timeout(20):
        async with await asyncio.start_server(serve_one, "127.0.0.1", 0) as far:
            to = far.sockets[0].getsockname()
            async with open_proxy(
                ("127.0.0.1", 0), to, rate_bit_per_s=rate_bit_per_s, round_trip_s=round_trip_s
            ) as address:
                reader, writer = await asyncio.open_connection(*address)
                yield reader, writer
                await close(writer)
            await ended.wait()


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


async def test_a_word_takes_a_round_trip() -> None:
    clock = asyncio.get_running_loop().time
    async with through_proxy(echo, round_trip_s=0.05) as (reader, writer):
        trips = []
        for _ in range(5):
            asked_s = clock()
            writer.write(b"word")
            assert await reader.readexactly(4) == b"word"
            trips.append(clock() - asked_s)
    assert 0.05 <= min(trips) < 0.06


async def test_bulk_takes_the_time_that_the_rate_says_and_arrives_whole() -> None:
    clock = asyncio.get_running_loop().time
    sent = bytes(range(256)) * 1000
    started_s = clock()
    async with through_proxy(echo, rate_bit_per_s=8e6) as (reader, writer):
        writer.write(sent)
        writer.write_eof()
        assert await reader.read(-1) == sent
    # 256 kB at 1 MB/s, once forth; the way back runs beside it
    assert 0.256 <= clock() - started_s < 1.5


async def test_a_sender_feels_a_receiver_that_does_not_read() -> None:
    never = asyncio.Event()

    async def deaf(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await never.wait()

    async with through_proxy(deaf, rate_bit_per_s=400e6) as (_, writer):
        taken = 0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5):
                while True:
                    writer.write(bytes(65536))
                    await writer.drain()
                    taken += 65536
        # unbounded it would be 75 MB; the link holds 5, the kernel's buffers a few more
        assert 5_000_000 < taken < 15_000_000
        never.set()


async def test_an_end_is_passed_on_in_both_directions() -> None:
    ended = asyncio.Event()

    async def answer_at_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        question = await reader.read(-1)
        ended.set()
        writer.write(question[::-1])

    async with through_proxy(answer_at_the_end, round_trip_s=0.01) as (reader, writer):
        writer.write(b"abc")
        writer.write_eof()
        assert await reader.read(-1) == b"cba"
        assert ended.is_set()


async def test_a_broken_connection_is_broken_on_the_other_side_too() -> None:
    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.transport.abort()

    async with through_proxy(break_off) as (reader, writer):
        writer.write(b"a" * 1000)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read(-1) == b""


async def test_nobody_there_closes_the_connection() -> None:
    nobody = ("127.0.0.1", 1)
    async with (
        asyncio.timeout(10),
        open_proxy(("127.0.0.1", 0), nobody, rate_bit_per_s=None, round_trip_s=0.0) as address,
    ):
        reader, writer = await asyncio.open_connection(*address)
        assert await reader.read(-1) == b""
        await close(writer)
