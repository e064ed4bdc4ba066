"""Answers that clients may ask for again (`molink_common.messages.kept`), in Redis, for an hour.

Keys, all below ``molink:v1:``

    response:<tenant>:<id>   string       JSON that only gateways read; expires after an hour
    responses                sorted set   "<key> <bytes>" of each, by the second when it was kept
    responses:bytes          integer      how much they are together

The oldest go when there are too many or they are too large together. Nothing here is fenced by a term, because what is
kept does not change: a scheduler that was frozen keeps what any other would. So every scheduler answers, the active
one or not. The connection is its own: a large answer must not stand before the tokens of others.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

import redis.exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from molink_common import subjects
from molink_common.bus import Bus, serve
from molink_common.logs import get_logger
from molink_common.messages import AskResponse, Done, DropResponse, Failed, KeepResponse, KeptResponse, Message
from molink_scheduler.store import KEY_ROOT, StoreUnavailable

log = get_logger("scheduler.responses")

EXPIRY_S = 3600
MAX_BYTES = 64 * 1024 * 1024
MAX_RESPONSES = 16384
_TIMEOUT_S = 2.0

# KEYS: the response, all of them, their bytes. ARGV: body, expiry in seconds, most bytes, most responses.
_KEEP = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local size = string.len(ARGV[1])
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
local used = tonumber(redis.call('GET', KEYS[3]) or '0')
if redis.call('ZADD', KEYS[2], 'NX', now, KEYS[1] .. ' ' .. size) == 1 then used = used + size end
while true do
  local oldest = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
  if not oldest[1] then used = 0 break end
  local is_over = used > tonumber(ARGV[3]) or redis.call('ZCARD', KEYS[2]) > tonumber(ARGV[4])
  if tonumber(oldest[2]) > now - tonumber(ARGV[2]) and not is_over then break end
  local key, bytes = string.match(oldest[1], '^(.*) (%d+)$')
  redis.call('ZREM', KEYS[2], oldest[1])
  redis.call('DEL', key)
  used = used - tonumber(bytes)
end
redis.call('SET', KEYS[3], used, 'EX', 2 * ARGV[2])
redis.call('EXPIRE', KEYS[2], 2 * ARGV[2])
"""


class ResponseShelf(Protocol):
    """Where answers are kept. Every method raises `StoreUnavailable`, within seconds."""

    async def keep(self, tenant: str, response: str, body: str) -> None:
        """Keep one; again is the same as once."""

    async def fetch(self, tenant: str, response: str) -> str | None:
        """What is kept; None: nothing, or no longer."""

    async def drop(self, tenant: str, response: str) -> None:
        """Keep it no longer."""


class MemoryShelf:
    """`ResponseShelf` in memory, for tests. Knows no time."""

    def __init__(self, *, max_bytes: int = MAX_BYTES, max_responses: int = MAX_RESPONSES) -> None:
        self._bodies: dict[tuple[str, str], str] = {}
        self._max_bytes = max_bytes
        self._max_responses = max_responses

    async def keep(self, tenant: str, response: str, body: str) -> None:
        """See `ResponseShelf.keep`."""
        self._bodies.setdefault((tenant, response), body)
        while (
            len(self._bodies) > self._max_responses
            or sum(len(one.encode()) for one in self._bodies.values()) > self._max_bytes
        ):
            del self._bodies[next(iter(self._bodies))]

    async def fetch(self, tenant: str, response: str) -> str | None:
        """See `ResponseShelf.fetch`."""
        return self._bodies.get((tenant, response))

    async def drop(self, tenant: str, response: str) -> None:
        """See `ResponseShelf.drop`."""
        self._bodies.pop((tenant, response), None)


class RedisShelf:
    """`ResponseShelf` on a Redis server. Made by `open_response_shelf`."""

    def __init__(self, client: Redis, *, key_root: str, max_bytes: int, max_responses: int) -> None:
        self._client: Any = client  # the library's types do not know that answers are bytes here
        self._root = key_root
        self._limits = (EXPIRY_S, max_bytes, max_responses)
        self._keep = client.register_script(_KEEP)

    async def keep(self, tenant: str, response: str, body: str) -> None:
        """See `ResponseShelf.keep`."""
        keys = [self._key(tenant, response), self._root + "responses", self._root + "responses:bytes"]
        with _translated():
            await self._keep(keys=keys, args=[body.encode(), *self._limits])

    async def fetch(self, tenant: str, response: str) -> str | None:
        """See `ResponseShelf.fetch`."""
        with _translated():
            found = await self._client.get(self._key(tenant, response))
        return None if found is None else found.decode()

    async def drop(self, tenant: str, response: str) -> None:
        """See `ResponseShelf.drop`. It counts until its hour is over."""
        with _translated():
            await self._client.delete(self._key(tenant, response))

    def _key(self, tenant: str, response: str) -> str:
        return f"{self._root}response:{tenant}:{response}"


@contextlib.asynccontextmanager
async def open_response_shelf(
    url: str, *, key_root: str = KEY_ROOT, max_bytes: int = MAX_BYTES, max_responses: int = MAX_RESPONSES
) -> AsyncIterator[RedisShelf]:
    """A shelf at this address; connects when it is first used, and again whenever it must.

    Raises:
        StoreUnavailable: the address is not one.
    """
    try:
        client = Redis.from_url(
            url,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            max_connections=2,
        )
    except ValueError as error:
        raise StoreUnavailable(f"--redis-url / MOLINK_REDIS_URL: {error}") from error
    try:
        yield RedisShelf(client, key_root=key_root, max_bytes=max_bytes, max_responses=max_responses)
    finally:
        await client.aclose()


@contextlib.asynccontextmanager
async def keeping_responses(bus: Bus, shelf: ResponseShelf) -> AsyncIterator[None]:
    """Keep and tell answers for gateways, one question after the other."""

    async def hear(asked: Message) -> Message:
        try:
            match asked:
                case KeepResponse():
                    await shelf.keep(asked.tenant, asked.response, asked.body)
                case DropResponse():
                    await shelf.drop(asked.tenant, asked.response)
                case AskResponse():
                    return KeptResponse(body=await shelf.fetch(asked.tenant, asked.response))
                case _:  # `serve` lets nothing else through
                    return Failed(message=f"{asked.TYPE} is none of the questions about responses")
        except StoreUnavailable as error:
            log.warning("the shelf of responses is away", problem=str(error))
            return Failed(message="Redis is away")
        return Done()

    subscription = await serve(bus, subjects.RESPONSES, hear, KeepResponse, AskResponse, DropResponse)
    try:
        yield
    finally:
        await subscription.close()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (redis.exceptions.RedisError, OSError, TimeoutError) as error:
        raise StoreUnavailable(f"Redis: {error!r}") from error
