"""The door to Redis.

Keys, all below ``molink:v1:``

    lease            string   who is the active scheduler; expires after a few seconds unless renewed
    epoch            integer  the last epoch drawn; never goes back
    worker:<id>      JSON     the worker's last `Heartbeat`; expires after 15 s
    pipeline:<n>     JSON     `PipelineRecord`: the layer map
    sequences        set      ids of the sequences that are being served
    sequence:<id>    JSON     `SequenceRecord`; expires an hour after its last token
    tokens:<id>      bytes    generated tokens, 4 bytes little-endian each, in order; expires likewise

Every write is idempotent (a token is written to its place, not appended), so that a write whose answer was
lost can simply be written again.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from enum import Enum, auto
from typing import Any, Protocol, TypeVar, assert_never

import redis.exceptions
from pydantic import BaseModel, ValidationError
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from molink_common.errors import MolinkError, ProtocolError
from molink_common.logs import get_logger
from molink_common.messages import Heartbeat, decode, encode
from molink_scheduler.instructions import (
    AppendTokens,
    DeleteSequence,
    SavePipeline,
    SaveSequence,
    SaveWorker,
    Write,
)
from molink_scheduler.records import PipelineRecord, SequenceRecord, Snapshot, StoredSequence

log = get_logger("scheduler.store")

KEY_ROOT = "molink:v1:"
WORKER_EXPIRY_S = 15
SEQUENCE_EXPIRY_S = 3600
_TIMEOUT_S = 2.0

# ARGV: owner, milliseconds. 0: another holds it; 1: it was held and is renewed; 2: nobody held it, now taken.
_TAKE_LEASE = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return holder and 1 or 2
"""
_RELEASE_LEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
_NEXT_EPOCH = """
local last = tonumber(redis.call('GET', KEYS[1]) or '0')
if last < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], ARGV[1]) end
return redis.call('INCR', KEYS[1])
"""


class StoreUnavailable(MolinkError):
    """Redis does not answer, or not as Redis does."""


class Lease(Enum):
    """Who is the active scheduler."""

    ANOTHERS = auto()
    RENEWED = auto()
    TAKEN = auto()
    """Nobody held it: at the start, or because the store has forgotten everything."""


class Store(Protocol):
    """What the scheduler needs of a store. Every method raises `StoreUnavailable`, within seconds."""

    async def take_lease(self, owner: str, *, expiry_s: float) -> Lease:
        """Become or stay the active scheduler, unless another is."""

    async def release_lease(self, owner: str) -> None:
        """Let another take over at once."""

    async def next_epoch(self, above: int) -> int:
        """A number larger than `above` and than every one given before."""

    async def write(self, writes: Sequence[Write]) -> None:
        """Carry out in order, in one round trip. Writing the same again changes nothing."""

    async def load(self) -> Snapshot:
        """Everything. What does not parse is left out and logged."""


R = TypeVar("R", bound=BaseModel)


class RedisStore:
    """`Store` on a Redis server. Made by `open_store`."""

    def __init__(self, client: Redis, *, key_root: str = KEY_ROOT) -> None:
        # the library's types do not know that answers are bytes here
        self._client: Any = client
        self._root = key_root
        self._take_lease = client.register_script(_TAKE_LEASE)
        self._release_lease = client.register_script(_RELEASE_LEASE)
        self._next_epoch = client.register_script(_NEXT_EPOCH)

    async def take_lease(self, owner: str, *, expiry_s: float) -> Lease:
        """See `Store.take_lease`."""
        with _translated():
            answer = await self._take_lease(keys=[self._root + "lease"], args=[owner, int(expiry_s * 1000)])
        return (Lease.ANOTHERS, Lease.RENEWED, Lease.TAKEN)[int(answer)]

    async def release_lease(self, owner: str) -> None:
        """See `Store.release_lease`."""
        with _translated():
            await self._release_lease(keys=[self._root + "lease"], args=[owner])

    async def next_epoch(self, above: int) -> int:
        """See `Store.next_epoch`."""
        with _translated():
            return int(await self._next_epoch(keys=[self._root + "epoch"], args=[above]))

    async def write(self, writes: Sequence[Write]) -> None:
        """See `Store.write`."""
        root = self._root
        with _translated():
            async with self._client.pipeline(transaction=False) as batch:
                for write in writes:
                    match write:
                        case SaveSequence(record):
                            name = record.request.sequence
                            batch.set(f"{root}sequence:{name}", record.model_dump_json(), ex=SEQUENCE_EXPIRY_S)
                            batch.sadd(root + "sequences", name)
                        case AppendTokens(name, start, tokens):
                            batch.setrange(f"{root}tokens:{name}", 4 * start, pack_tokens(tokens))
                            batch.expire(f"{root}tokens:{name}", SEQUENCE_EXPIRY_S)
                            batch.expire(f"{root}sequence:{name}", SEQUENCE_EXPIRY_S)
                        case DeleteSequence(name):
                            batch.delete(f"{root}sequence:{name}", f"{root}tokens:{name}")
                            batch.srem(root + "sequences", name)
                        case SavePipeline(layout):
                            batch.set(f"{root}pipeline:{layout.pipeline}", layout.model_dump_json())
                        case SaveWorker(heartbeat):
                            batch.set(f"{root}worker:{heartbeat.worker}", encode(heartbeat), ex=WORKER_EXPIRY_S)
                        case _:
                            assert_never(write)
                await batch.execute()

    async def load(self) -> Snapshot:
        """See `Store.load`."""
        root = self._root
        with _translated():
            epoch = int(await self._client.get(root + "epoch") or 0)
            names = sorted(name.decode() for name in await self._client.smembers(root + "sequences"))
            sequences = [stored for name in names if (stored := await self._load_sequence(name)) is not None]
            pipelines = [
                record
                for value in await self._values(root + "pipeline:*")
                if (record := _parsed(PipelineRecord, value)) is not None
            ]
            workers = [
                heartbeat
                for value in await self._values(root + "worker:*")
                if (heartbeat := _parsed_heartbeat(value)) is not None
            ]
        return Snapshot(epoch=epoch, pipelines=tuple(pipelines), sequences=tuple(sequences), workers=tuple(workers))

    async def _load_sequence(self, name: str) -> StoredSequence | None:
        value, tokens = await self._client.mget(f"{self._root}sequence:{name}", f"{self._root}tokens:{name}")
        record = _parsed(SequenceRecord, value) if value is not None else None
        if record is None:
            await self.write([DeleteSequence(name)])
            return None
        return StoredSequence(record=record, tokens=unpack_tokens(tokens or b""))

    async def _values(self, pattern: str) -> list[bytes]:
        keys = sorted([key async for key in self._client.scan_iter(match=pattern, count=500)])
        return [value for value in await self._client.mget(keys) if value is not None] if keys else []


@contextlib.asynccontextmanager
async def open_store(url: str, *, key_root: str = KEY_ROOT) -> AsyncIterator[RedisStore]:
    """A store at this address; connects when it is first used, and again whenever it must.

    Raises:
        StoreUnavailable: the address is not one.
    """
    try:
        client = Redis.from_url(
            url,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            # whoever calls knows better when to try again
            retry=Retry(NoBackoff(), 0),
            max_connections=8,
        )
    except ValueError as error:
        raise StoreUnavailable(f"--redis-url / MOLINK_REDIS_URL: {error}") from error
    try:
        yield RedisStore(client, key_root=key_root)
    finally:
        await client.aclose()


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """4 bytes little-endian each."""
    return struct.pack(f"<{len(tokens)}I", *tokens)


def unpack_tokens(data: bytes) -> tuple[int, ...]:
    """The inverse of `pack_tokens`."""
    return struct.unpack(f"<{len(data) // 4}I", data[: len(data) // 4 * 4])


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (redis.exceptions.RedisError, OSError, TimeoutError) as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            # a connection that breaks while it is being closed for a cancellation hides the cancellation
            raise asyncio.CancelledError from error
        raise StoreUnavailable(f"Redis: {error!r}") from error


def _parsed(kind: type[R], value: bytes) -> R | None:
    try:
        return kind.model_validate_json(value)
    except ValidationError as error:
        log.warning("a stored value does not parse", kind=kind.__name__, problem=str(error.errors()[0]["msg"]))
        return None


def _parsed_heartbeat(value: bytes) -> Heartbeat | None:
    try:
        return decode(value, Heartbeat)
    except ProtocolError as error:
        log.warning("a stored heartbeat does not parse", problem=str(error))
        return None
