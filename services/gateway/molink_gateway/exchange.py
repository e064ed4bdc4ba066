"""One HTTP answer: read, open, stream or collect, and leave when the client hangs up.

The body of a stream is written straight to ASGI: a token costs one small dictionary, one orjson call and one write.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import orjson
from opentelemetry.trace import Span
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from molink_common.telemetry import Telemetry, traceparent
from molink_gateway.access_log import RequestRecord, record_of, send_error, send_json
from molink_gateway.api_errors import ApiError, busy
from molink_gateway.mailbox import Mailbox
from molink_gateway.opening import Asked, Open
from molink_gateway.preparation import Prepared
from molink_gateway.replies import WAITING, Answer
from molink_gateway.request_body import ClientGone, raise_when_gone, read_body
from molink_gateway.run import Run
from molink_gateway.sequences import Sequences

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

_STREAM_ID = b"x-molink-stream"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much and how long an exchange takes."""

    body_bytes: int
    body_timeout_s: float
    send_timeout_s: float
    sign_of_life_s: float
    """A stream that says nothing for this long sends a comment, so that nothing on the way times out."""


class Door:
    """Lets in only so many requests at a time."""

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self.num_open = 0

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """Be counted until the end of the request.

        Raises:
            ApiError: 429, there is no room.
        """
        if self.num_open >= self._max_open:
            raise busy(f"This gateway has {self.num_open} requests open, and room for no more. Try again soon.")
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1


class Exchange(Response):
    """Answers one generation request. Everything happens in `__call__`, where hanging up can be noticed."""

    def __init__(  # a Response that has no content before it is called: its base is left unmade
        self,
        opening: Open,
        *,
        sequences: Sequences,
        door: Door,
        telemetry: Telemetry,
        limits: Limits,
    ) -> None:
        self.background = None
        self._open = opening
        self._sequences = sequences
        self._door = door
        self._telemetry = telemetry
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; an error that is known before the first byte becomes a status, later a chunk."""
        record, headers, limits = record_of(scope), Headers(scope=scope), self._limits
        span = self._telemetry.start_request(
            f"{scope['method']} {scope['path']}",
            parent=headers.get("traceparent"),
            attributes={"molink.request": record.request_id},
        )
        try:
            with self._door.enter():
                body = await read_body(scope, receive, limit_bytes=limits.body_bytes, timeout_s=limits.body_timeout_s)
                asked = Asked(body=body, headers=headers, record=record, trace=traceparent(span))
                async with asyncio.TaskGroup() as group:
                    watch = group.create_task(raise_when_gone(receive))
                    await self._answer(asked, send)
                    watch.cancel()
        except* ClientGone as gone:
            record.problem = str(gone.exceptions[0])
        except* ApiError as errors:
            error = next(one for one in errors.exceptions if isinstance(one, ApiError))
            record.problem = error.message if error.status >= 500 else error.code
            await send_error(send, error)
        finally:
            _finish_span(span, record)

    async def _answer(self, asked: Asked, send: Send) -> None:
        async with self._open(asked) as (prepared, mailbox):
            asked.record.prompt_tokens = prepared.num_prompt_tokens
            asked.record.completion_tokens = 0
            run = Run(prepared, mailbox, self._sequences, asked.record)
            if prepared.is_stream:
                await self._stream(run, prepared, mailbox, asked.record, send)
            else:
                await self._collect(run, prepared, send)

    async def _collect(self, run: Run, prepared: Prepared, send: Send) -> None:
        answers = [Answer() for _ in prepared.choices]
        while run.is_going_on:
            for choice, delta in await run.grow(self._limits.sign_of_life_s):
                answers[choice].add(delta)
        whole = orjson.dumps(prepared.reply.whole(answers, run.usage()))
        await prepared.before_end()
        await send_json(send, 200, whole)

    async def _stream(self, run: Run, prepared: Prepared, mailbox: Mailbox, record: RequestRecord, send: Send) -> None:
        body = StreamBody(send, self._limits.send_timeout_s, stream=prepared.stream if prepared.is_resumable else None)
        script = prepared.make_script(prepared, run)
        loop = asyncio.get_running_loop()
        data = script.begin()
        if prepared.is_resumable:  # the client can come back as soon as it knows the stream's id
            mailbox.outlives_client = True
            await body.write(data)
            data = b""
        try:
            while run.is_going_on:
                silent_s = loop.time() - body.written_s
                size_before = len(data)
                for choice, delta in await run.grow(max(self._limits.sign_of_life_s - silent_s, 0)):
                    data += script.grow(choice, delta)
                if len(data) == size_before and loop.time() - body.written_s >= self._limits.sign_of_life_s:
                    data += WAITING
                if data and run.is_going_on:
                    await body.write(data)
                    data = b""
        except ApiError as error:
            if not body.has_begun:
                raise
            record.problem = error.message
            await body.write(data + script.fail(error, runs_on=mailbox.runs_on), is_last=True)
            return
        data += script.end()
        await prepared.before_end()
        await body.write(data, is_last=True)


class StreamBody:
    """Writes a stream, whose headers go with its first bytes."""

    def __init__(self, send: Send, timeout_s: float, *, stream: str | None) -> None:
        self._send = send
        self._timeout_s = timeout_s
        self._headers = _STREAM_HEADERS if stream is None else [*_STREAM_HEADERS, (_STREAM_ID, stream.encode())]
        self.has_begun = False
        self.written_s = asyncio.get_running_loop().time()

    async def write(self, data: bytes, *, is_last: bool = False) -> None:
        """Send.

        Raises:
            ClientGone: the client does not read.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                if not self.has_begun:
                    self.has_begun = True
                    await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
                await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})
        except TimeoutError as error:
            raise ClientGone(f"the client read nothing for {self._timeout_s:g} s") from error
        self.written_s = asyncio.get_running_loop().time()


def _finish_span(span: Span | None, record: RequestRecord) -> None:
    if span is None:
        return
    attributes = {
        "gen_ai.request.model": record.model,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "molink.ttft_s": record.ttft_s,
        "http.response.status_code": record.status,
        "molink.problem": record.problem,
    }
    span.set_attributes({name: value for name, value in attributes.items() if value is not None})
    span.end()
