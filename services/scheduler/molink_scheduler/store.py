"""The door to Redis.

Keys, all below ``molink:v1:``

    lease            string   who is the active scheduler; expires after a moment unless renewed
    term             string   number and owner of the newest term: who may write. The number never goes back
    epoch            integer  the last epoch drawn; never goes back
    worker:<id>      JSON     the worker's last `Heartbeat`; expires after 15 s
    pipeline:<n>     JSON     `PipelineRecord`: the layer map
    sequences        set      ids of the sequences that are being served
    sequence:<id>    JSON     `SequenceRecord`; expires an hour after its last token
    tokens:<id>      bytes    generated tokens, 4 bytes little-endian each, in order; expires likewise
    keys             hash     API keys: id → JSON `ApiKey`, with the secret's SHA-256
    usage            hash     what they have used: id → JSON `KeyUsage`, a few seconds behind

Every write is idempotent (a token is written to its place, not appended), so that a write whose answer was
lost can simply be written again. And every write names the term that it belongs to: the server carries a batch out as
one script, which first looks whether that is still the newest one. So a scheduler that was frozen, and has been
replaced meanwhile, changes nothing when it wakes.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, assert_never

import redis.exceptions
from pydantic import BaseModel, ValidationError
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from molink_common.cancellation import heeding_cancellation
from molink_common.errors import MolinkError, ProtocolError
from molink_common.logs import get_logger
from molink_common.messages import ApiKey, Heartbeat, decode, encode
from molink_scheduler import store_scripts
from molink_scheduler.instructions import (
    AppendTokens,
    DeleteKey,
    DeleteSequence,
    SaveKey,
    SavePipeline,
    SaveSequence,
    SaveUsage,
    SaveWorker,
    Write,
)
from molink_scheduler.records import KeyUsage, PipelineRecord, SequenceRecord, Snapshot, StoredSequence

log = get_logger("scheduler.store")

KEY_ROOT = "molink:v1:"
WORKER_EXPIRY_S = 15
SEQUENCE_EXPIRY_S = 3600
_TIMEOUT_S = 2.0
_LOADED_AT_ONCE = 500


class StoreUnavailable(MolinkError):
    """Redis does not answer, or not as Redis does."""


class StoreForgetful(StoreUnavailable):
    """Redis answers but knows less than it did: it has lost its memory, or some of it. The lease must be taken anew."""


class LeaseLost(MolinkError):
    """Another scheduler has become the active one: whoever is told this must decide nothing more."""


@dataclass(frozen=True, slots=True)
class Term:
    """One scheduler's time as the active one. The number rises with every one that takes over: a fencing token."""

    number: int
    owner: str


@dataclass(frozen=True, slots=True)
class LeaseState:
    """What a standby sees."""

    is_held: bool
    newest_term: int
    """0: the store knows of none."""


class Store(Protocol):
    """What the scheduler needs of a store. Every method raises `StoreUnavailable`, within seconds.

    What is given a term raises `LeaseLost` where there is a newer one, `StoreForgetful` where the store does not know
    it; then nothing has been changed.
    """

    async def lease_state(self) -> LeaseState:
        """Whether anybody is active, without trying to be."""

    async def take_lease(self, owner: str, *, expiry_s: float, above: int) -> Term | None:
        """Begin a term, later than `above` and than every one before; None: another holds the lease."""

    async def renew_lease(self, term: Term, *, expiry_s: float) -> None:
        """Stay the active scheduler."""

    async def release_lease(self, term: Term) -> None:
        """Let another take over at once. Harmless in a term that is over."""

    async def next_epoch(self, above: int, *, term: Term) -> int:
        """A number larger than `above` and than every one given before."""

    async def write(self, writes: Sequence[Write], *, term: Term) -> None:
        """Carry out in order, all or nothing, in one round trip. Writing the same again changes nothing."""

    async def load(self, *, term: Term) -> Snapshot:
        """Everything. What does not parse is left out and logged; such a sequence is deleted."""


R = TypeVar("R", bound=BaseModel)


class RedisStore:
    """`Store` on a Redis server. Made by `open_store`."""

    def __init__(self, client: Redis, *, key_root: str = KEY_ROOT) -> None:
        # the library's types do not know that answers are bytes here
        self._client: Any = client
        self._root = key_root
        self._take_lease = client.register_script(store_scripts.TAKE_LEASE)
        self._renew_lease = client.register_script(store_scripts.RENEW_LEASE)
        self._release_lease = client.register_script(store_scripts.RELEASE_LEASE)
        self._next_epoch = client.register_script(store_scripts.NEXT_EPOCH)
        self._write = client.register_script(store_scripts.WRITE)
        self._term_key = key_root + "term"
        self._lease_keys = (self._term_key, key_root + "lease")

    async def lease_state(self) -> LeaseState:
        """See `Store.lease_state`."""
        with _translated():
            term, holder = await self._client.mget(*self._lease_keys)
        number = (term or b"").partition(b" ")[0]
        return LeaseState(is_held=holder is not None, newest_term=int(number) if number.isdigit() else 0)

    async def take_lease(self, owner: str, *, expiry_s: float, above: int) -> Term | None:
        """See `Store.take_lease`."""
        with _translated():
            number = await self._take_lease(keys=self._lease_keys, args=[above, owner, int(expiry_s * 1000)])
        return Term(int(number), owner) if number else None

    async def renew_lease(self, term: Term, *, expiry_s: float) -> None:
        """See `Store.renew_lease`."""
        milliseconds = int(expiry_s * 1000)
        with _translated():
            answer = await self._renew_lease(keys=self._lease_keys, args=[term.number, term.owner, milliseconds])
        _refuse_unless_held(answer, term)

    async def release_lease(self, term: Term) -> None:
        """See `Store.release_lease`."""
        with _translated():
            await self._release_lease(keys=self._lease_keys, args=[term.number, term.owner])

    async def next_epoch(self, above: int, *, term: Term) -> int:
        """See `Store.next_epoch`."""
        keys = [self._term_key, self._root + "epoch"]
        with _translated():
            answer, epoch = await self._next_epoch(keys=keys, args=[term.number, term.owner, above])
        _refuse_unless_held(answer, term)
        return int(epoch)

    async def write(self, writes: Sequence[Write], *, term: Term) -> None:
        """See `Store.write`."""
        words: list[str | bytes | int] = [term.number, term.owner]
        for write in writes:
            for command in self._commands(write):
                words.append(len(command))
                words.extend(command)
        with _translated():
            answer = await self._write(keys=[self._term_key], args=words)
        _refuse_unless_held(answer, term)

    def _commands(self, write: Write) -> tuple[tuple[str | bytes | int, ...], ...]:  # noqa: PLR0911  one a kind
        root = self._root
        match write:
            case AppendTokens(name, start, tokens):
                return (
                    ("SETRANGE", f"{root}tokens:{name}", 4 * start, pack_tokens(tokens)),
                    ("EXPIRE", f"{root}tokens:{name}", SEQUENCE_EXPIRY_S),
                    ("EXPIRE", f"{root}sequence:{name}", SEQUENCE_EXPIRY_S),
                )
            case SaveSequence(record):
                name = record.request.sequence
                return (
                    ("SET", f"{root}sequence:{name}", record.model_dump_json(), "EX", SEQUENCE_EXPIRY_S),
                    ("SADD", root + "sequences", name),
                )
            case DeleteSequence(name):
                return (
                    ("DEL", f"{root}sequence:{name}", f"{root}tokens:{name}"),
                    ("SREM", root + "sequences", name),
                )
            case SavePipeline(layout):
                return (("SET", f"{root}pipeline:{layout.pipeline}", layout.model_dump_json()),)
            case SaveWorker(heartbeat):
                return (("SET", f"{root}worker:{heartbeat.worker}", encode(heartbeat), "EX", WORKER_EXPIRY_S),)
            case SaveKey(key):
                return (("HSET", root + "keys", key.id, key.model_dump_json()),)
            case DeleteKey(name):
                return (("HDEL", root + "keys", name), ("HDEL", root + "usage", name))
            case SaveUsage(usage):
                return (("HSET", root + "usage", usage.key, usage.model_dump_json()),)
            case _:
                assert_never(write)

    async def load(self, *, term: Term) -> Snapshot:
        """See `Store.load`."""
        root = self._root
        with _translated():
            epoch = int(await self._client.get(root + "epoch") or 0)
            names = sorted(name.decode() for name in await self._client.smembers(root + "sequences"))
            found = await self._load_sequences(names)
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
            keys = await self._hash(root + "keys", ApiKey)
            usage = await self._hash(root + "usage", KeyUsage)
        sequences = tuple(stored for stored in found.values() if stored is not None)
        broken = [DeleteSequence(name) for name, stored in found.items() if stored is None]
        if broken:
            await self.write(broken, term=term)
        return Snapshot(
            epoch=epoch,
            pipelines=tuple(pipelines),
            sequences=sequences,
            workers=tuple(workers),
            keys=keys,
            usage=usage,
        )

    async def _load_sequences(self, names: list[str]) -> dict[str, StoredSequence | None]:
        found: dict[str, StoredSequence | None] = {}
        for start in range(0, len(names), _LOADED_AT_ONCE):
            some = names[start : start + _LOADED_AT_ONCE]
            records = await self._client.mget([f"{self._root}sequence:{name}" for name in some])
            tokens = await self._client.mget([f"{self._root}tokens:{name}" for name in some])
            for name, value, generated in zip(some, records, tokens, strict=True):
                record = _parsed(SequenceRecord, value) if value is not None else None
                found[name] = (
                    StoredSequence(record=record, tokens=unpack_tokens(generated or b""))
                    if record is not None
                    else None
                )
        return found

    async def _hash(self, name: str, kind: type[R]) -> tuple[R, ...]:
        found = await self._client.hgetall(name)
        parsed = (_parsed(kind, found[field]) for field in sorted(found))
        return tuple(value for value in parsed if value is not None)

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


def _refuse_unless_held(answer: int, term: Term) -> None:
    if answer == store_scripts.LOST:
        raise LeaseLost(f"a newer term than {term.number} has begun")
    if answer != store_scripts.HOLDS:
        raise StoreForgetful(f"Redis does not know of term {term.number}")


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """4 bytes little-endian each."""
    return struct.pack(f"<{len(tokens)}I", *tokens)


def unpack_tokens(data: bytes) -> tuple[int, ...]:
    """The inverse of `pack_tokens`."""
    return struct.unpack(f"<{len(data) // 4}I", data[: len(data) // 4 * 4])


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        with heeding_cancellation():
            yield
    except (redis.exceptions.RedisError, OSError, TimeoutError) as error:
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
