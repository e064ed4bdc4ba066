"""The one door to NATS.

A `Bus` publishes bytes, asks questions and subscribes. While the connection is down, publishing raises
`BusUnavailable` at once: nothing is buffered, because what is replayed after an outage is stale. The client
reconnects for ever with a short pause. A subscription that overflows, or a permission that is missing, is
reported to `on_fault`: NATS drops such messages silently, so the owner must act on it.

    async with open_bus(BusSettings(...), name="gateway-1") as bus:
        await bus.send(subjects.STATE, message)
        answer = await bus.ask(subjects.SUBMIT, message, Admitted, Refused, timeout_s=5)
"""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from molink_common import messages
from molink_common.cancellation import heeding_cancellation
from molink_common.errors import BusUnavailable, NobodyListens, ProtocolError, RequestTimeout
from molink_common.logs import get_logger
from molink_common.messages import Failed, M, Message
from molink_common.nats_client import NatsClient

log = get_logger("bus")

Payload = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class BusSettings:
    """How to reach NATS. `url` may carry several addresses, separated by commas, and user:password."""

    url: str
    connect_timeout_s: float = 30.0
    """How long to keep trying before the first connection is given up."""
    user: str | None = None
    password: str | None = None
    credentials_file: str | None = None
    max_pending_bytes: int = 512 * 1024 * 1024
    """Per subscription; more is dropped and reported as a fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """A message that arrived."""

    subject: str
    data: bytes
    respond: Callable[[Payload], Awaitable[None]] | None
    """Present when the sender waits for an answer."""


Handler = Callable[[Incoming], Awaitable[None]]


class Subscription(Protocol):
    """Stops delivering when closed. Closing twice is harmless."""

    async def close(self) -> None:
        """Stop delivering."""


class Bus(Protocol):
    """What the parts need of a message broker."""

    @property
    def is_connected(self) -> bool:
        """Whether messages can be sent now."""

    @property
    def max_payload_bytes(self) -> int:
        """The largest message that the broker takes."""

    async def publish(self, subject: str, data: Payload) -> None:
        """Send to whoever listens; nobody is fine.

        Raises:
            BusUnavailable: the connection is down, or the message is too large.
        """

    def publish_at_once(self, subject: str, data: Payload) -> bool:
        """`publish` from where nobody can wait. False: the socket has no room yet, and nothing was sent.

        Raises: as `publish`.
        """

    async def request(self, subject: str, data: Payload, *, timeout_s: float) -> bytes:
        """Send and wait for one answer.

        Raises:
            NobodyListens: no subscriber (known in about a millisecond).
            RequestTimeout: no answer in time.
            BusUnavailable: the connection is down.
        """

    async def subscribe(self, subject: str, handler: Handler) -> Subscription:
        """Call `handler` for each message, one after the other, in the order of arrival."""

    async def flush(self) -> None:
        """Wait until the broker has seen everything sent so far (a round trip: never per token)."""

    async def send(self, subject: str, message: Message) -> None:
        """`publish` for a control message."""

    async def ask(self, subject: str, message: Message, *expected: type[M], timeout_s: float) -> M:
        """`request` for control messages; raises also `ProtocolError`."""


async def serve(
    bus: Bus, subject: str, answer: Callable[[M], Awaitable[Message | None]], *expected: type[M]
) -> Subscription:
    """Answer requests (or take one-way messages) of the `expected` types on a subject.

    What does not parse is answered with `Failed` and logged; it never stops the subscription. An exception
    of `answer` itself is logged with its traceback and answered with `Failed`.
    """

    async def handle(incoming: Incoming) -> None:
        reply: Message | None
        try:
            reply = await answer(messages.decode(incoming.data, *expected))
        except ProtocolError as error:
            log.warning("message refused", subject=incoming.subject, problem=str(error))
            reply = Failed(message=str(error))
        except Exception as error:  # the boundary of a handler: one bad message must not end the service
            log.exception("handler failed", subject=incoming.subject)
            reply = Failed(message=f"{type(error).__name__}: {error}")
        if incoming.respond is not None and reply is not None:
            with contextlib.suppress(BusUnavailable):
                await incoming.respond(messages.encode(reply))

    return await bus.subscribe(subject, handle)


class _NatsSubscription:
    def __init__(self, subscription: Any) -> None:
        self._subscription = subscription

    async def close(self) -> None:
        with contextlib.suppress(
            nats.errors.ConnectionClosedError,
            nats.errors.BadSubscriptionError,
            nats.errors.ConnectionDrainingError,
        ):
            await self._subscription.unsubscribe()


class NatsBus:
    """`Bus` over one NATS connection. Made by `open_bus`."""

    def __init__(self, client: NatsClient, settings: BusSettings) -> None:
        self._client = client
        self._settings = settings

    @property
    def is_connected(self) -> bool:
        """See `Bus.is_connected`."""
        return bool(self._client.is_connected)

    @property
    def max_payload_bytes(self) -> int:
        """See `Bus.max_payload_bytes`."""
        return int(self._client.max_payload)

    async def publish(self, subject: str, data: Payload) -> None:
        """See `Bus.publish`."""
        try:
            await self._client.publish(subject, data)  # type: ignore[arg-type]
        except (nats.errors.Error, OSError) as error:
            raise self._not_sent(error, data) from error

    def publish_at_once(self, subject: str, data: Payload) -> bool:
        """See `Bus.publish_at_once`."""
        try:
            return self._client.publish_at_once(subject, data)
        except (nats.errors.Error, OSError) as error:
            raise self._not_sent(error, data) from error

    async def request(self, subject: str, data: Payload, *, timeout_s: float) -> bytes:
        """See `Bus.request`."""
        try:
            with heeding_cancellation():
                answer = await self._client.request(subject, bytes(data), timeout=timeout_s)
        except nats.errors.NoRespondersError as error:
            raise NobodyListens(subject) from error
        except (nats.errors.TimeoutError, TimeoutError) as error:
            raise RequestTimeout(subject, timeout_s) from error
        except (nats.errors.Error, OSError) as error:
            raise BusUnavailable(f"cannot ask on {subject}: {error!r}") from error
        return bytes(answer.data)

    async def subscribe(self, subject: str, handler: Handler) -> Subscription:
        """See `Bus.subscribe`."""

        async def deliver(message: Msg) -> None:
            respond = None
            if message.reply:
                reply_to = message.reply

                async def respond(data: Payload) -> None:
                    await self.publish(reply_to, data)

            await handler(Incoming(subject=message.subject, data=message.data, respond=respond))

        try:
            subscription = await self._client.subscribe(
                subject,
                cb=deliver,
                pending_msgs_limit=65536,
                pending_bytes_limit=self._settings.max_pending_bytes,
            )
        except (nats.errors.Error, OSError) as error:
            raise BusUnavailable(f"cannot subscribe to {subject}: {error!r}") from error
        return _NatsSubscription(subscription)

    async def send(self, subject: str, message: Message) -> None:
        """See `Bus.send`."""
        await self.publish(subject, messages.encode(message))

    async def ask(self, subject: str, message: Message, *expected: type[M], timeout_s: float) -> M:
        """See `Bus.ask`."""
        answer = await self.request(subject, messages.encode(message), timeout_s=timeout_s)
        return messages.decode(answer, *expected)

    def _not_sent(self, error: Exception, data: Payload) -> BusUnavailable:
        if isinstance(error, nats.errors.MaxPayloadError):
            return BusUnavailable(
                f"a message of {len(data)} bytes is larger than the broker's max_payload of {self.max_payload_bytes}"
            )
        return BusUnavailable(f"cannot publish: {error!r}")

    async def flush(self) -> None:
        """See `Bus.flush`."""
        try:
            with heeding_cancellation():
                await self._client.flush(timeout=10)
        except (nats.errors.Error, OSError) as error:
            raise BusUnavailable(f"cannot flush: {error!r}") from error


@contextlib.asynccontextmanager
async def open_bus(
    settings: BusSettings,
    *,
    name: str,
    on_fault: Callable[[str], None] | None = None,
    on_reconnect: Callable[[], None] | None = None,
) -> AsyncIterator[NatsBus]:
    """Connect, and close on leaving.

    Raises:
        BusUnavailable: no connection within `connect_timeout_s`; the message says which address was tried.
    """
    refusals: list[Exception] = []

    async def fault(error: Exception) -> None:
        if "authorization" in str(error).lower():  # while connecting, the client knows no type for it
            refusals[:] = [error]
        if not client.is_connected and isinstance(error, (OSError, nats.errors.Error)):
            return  # the client tries again by itself; `disconnected` or `_connect` says so
        log.warning("bus fault", problem=repr(error), raised_at=_raised_at(error))
        if on_fault is not None:
            on_fault(repr(error))

    async def disconnected() -> None:
        log.warning("bus disconnected", url=_without_password(settings.url))

    async def reconnected() -> None:
        log.info("bus connected again", url=_without_password(settings.url))
        if on_reconnect is not None:
            on_reconnect()

    client = NatsClient()
    options: dict[str, Any] = {}
    if settings.credentials_file is not None:
        options["user_credentials"] = settings.credentials_file
    await _connect(client, settings, name, fault, disconnected, reconnected, refusals, options)
    try:
        yield NatsBus(client, settings)
    finally:
        with contextlib.suppress(nats.errors.Error, OSError, asyncio.TimeoutError):
            await asyncio.wait_for(client.close(), timeout=5)


async def _connect(
    client: Client,
    settings: BusSettings,
    name: str,
    fault: Callable[[Exception], Awaitable[None]],
    disconnected: Callable[[], Awaitable[None]],
    reconnected: Callable[[], Awaitable[None]],
    refusals: list[Exception],
    options: dict[str, Any],
) -> None:
    """Try until a server answers. The services may start before the broker, so a refusal is not the end."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + settings.connect_timeout_s
    while True:
        try:
            await client.connect(
                servers=[address.strip() for address in settings.url.split(",")],
                name=name,
                user=settings.user,
                password=settings.password,
                error_cb=fault,
                disconnected_cb=disconnected,
                reconnected_cb=reconnected,
                connect_timeout=2,
                # for ever, ten times a second: an outage of the broker must cost no more than itself
                max_reconnect_attempts=1,  # until the first connection; then without end, see below
                reconnect_time_wait=0.1,
                # A peer whose cable was cut is noticed after seconds instead of minutes. Not after fewer: a ping waits
                # behind whatever a slow link still holds, and who is taken for lost has to send it all again.
                ping_interval=1,
                max_outstanding_pings=4,
                # nothing is buffered while disconnected: stale activations must not be replayed
                pending_size=0,
                **options,
            )
        except (TimeoutError, nats.errors.Error, OSError) as error:
            if loop.time() >= deadline and refusals:
                raise BusUnavailable(
                    f"the NATS server at {_without_password(settings.url)} refuses this user and password: "
                    "set --nats-user and --nats-password, or --nats-credentials-file"
                ) from error
            if loop.time() >= deadline:
                raise BusUnavailable(
                    f"no NATS server answers at {_without_password(settings.url)} "
                    f"(tried for {settings.connect_timeout_s:g} s): {error!r}. Start one, or set --nats-url."
                ) from error
            await asyncio.sleep(0.2)
        else:
            client.options["max_reconnect_attempts"] = -1
            return


def _raised_at(error: Exception) -> str | None:
    """Where a handler failed, innermost first; None for what the client tells of the connection."""
    if isinstance(error, (OSError, nats.errors.Error)):
        return None
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames)) or None


def _without_password(url: str) -> str:
    """The address without user:password, for logs."""
    return ",".join(part.split("@")[-1] for part in url.split(","))
