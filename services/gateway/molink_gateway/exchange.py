"""One HTTP answer: read, submit, stream or collect, and cancel when the client hangs up.

The body of a stream is written straight to ASGI: a token costs one small dictionary, one orjson call and one write.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator

import orjson
from opentelemetry.trace import Span
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from molink_common.telemetry import Telemetry, traceparent
from molink_gateway.access_log import RequestRecord, record_of, send_error, send_json
from molink_gateway.api_errors import ApiError, busy
from molink_gateway.choice import Delta
from molink_gateway.mailbox import Mailbox
from molink_gateway.preparation import Prepared
from molink_gateway.replies import DONE, WAITING, Answer, Chunk, server_sent_event, usage_of
from molink_gateway.request_body import ClientGone, raise_when_gone, read_body
from molink_gateway.sequences import Sequences

SIGN_OF_LIFE_S = 10.0
"""A stream without a token for this long sends its headers and a comment, so that nothing on the way times out."""
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

Prepare = Callable[[bytes, RequestRecord, str | None], Awaitable[Prepared]]
"""Body, record and trace context to a prepared request."""


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
        prepare: Prepare,
        *,
        sequences: Sequences,
        door: Door,
        telemetry: Telemetry,
        max_body_bytes: int,
        body_timeout_s: float,
        send_timeout_s: float,
    ) -> None:
        self.background = None
        self._prepare = prepare
        self._sequences = sequences
        self._door = door
        self._telemetry = telemetry
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; an error that is known before the first byte becomes a status, later a chunk."""
        record = record_of(scope)
        span = self._telemetry.start_request(
            f"POST {scope['path']}",
            parent=Headers(scope=scope).get("traceparent"),
            attributes={"molink.request": record.request_id},
        )
        try:
            with self._door.enter():
                body = await read_body(scope, receive, limit_bytes=self._max_body_bytes, timeout_s=self._body_timeout_s)
                async with asyncio.TaskGroup() as group:
                    watch = group.create_task(raise_when_gone(receive))
                    await self._answer(body, record, span, send)
                    watch.cancel()
        except* ClientGone as gone:
            record.problem = str(gone.exceptions[0])
        except* ApiError as errors:
            error = next(one for one in errors.exceptions if isinstance(one, ApiError))
            record.problem = error.message if error.status >= 500 else error.code
            await send_error(send, error)
        finally:
            _finish_span(span, record)

    async def _answer(self, body: bytes, record: RequestRecord, span: Span | None, send: Send) -> None:
        prepared = await self._prepare(body, record, traceparent(span))
        record.prompt_tokens = prepared.num_prompt_tokens
        record.completion_tokens = 0
        async with self._sequences.open(prepared.submission) as mailbox:
            run = Run(prepared, mailbox, self._sequences, record)
            if prepared.is_stream:
                await self._stream(run, prepared, record, send)
            else:
                await self._collect(run, prepared, send)

    async def _collect(self, run: Run, prepared: Prepared, send: Send) -> None:
        answers = [Answer() for _ in prepared.choices]
        while run.is_going_on:
            for choice, delta in await run.grow():
                answers[choice].add(delta)
        await send_json(send, 200, orjson.dumps(prepared.reply.whole(answers, run.usage())))

    async def _stream(self, run: Run, prepared: Prepared, record: RequestRecord, send: Send) -> None:
        reply = prepared.reply
        has_begun = False

        async def write(data: bytes, *, is_last: bool = False) -> None:
            nonlocal has_begun
            try:
                async with asyncio.timeout(self._send_timeout_s):
                    if not has_begun:
                        has_begun = True
                        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
                    await send({"type": "http.response.body", "body": data, "more_body": not is_last})
            except TimeoutError as error:
                raise ClientGone(f"the client read nothing for {self._send_timeout_s:g} s") from error

        def events(chunks: list[Chunk]) -> bytes:
            for chunk in chunks:
                if prepared.has_usage:
                    chunk["usage"] = run.usage() if prepared.has_continuous_usage else None
            return b"".join(map(server_sent_event, chunks))

        data = events([chunk for choice in range(len(prepared.choices)) for chunk in reply.opening(choice)])
        try:
            while run.is_going_on:
                deltas = await run.grow()
                for choice, delta in deltas:
                    data += events(reply.chunks(choice, delta))
                if not deltas:
                    data += WAITING
                if data and run.is_going_on:
                    await write(data)
                    data = b""
        except ApiError as error:
            if not has_begun:
                raise
            record.problem = error.message
            await write(server_sent_event(error.body()) + DONE, is_last=True)
            return
        if prepared.has_usage:
            data += server_sent_event({**reply.last(), "usage": run.usage()})
        await write(data + DONE, is_last=True)


class Run:
    """The choices of a request growing from its mailbox."""

    def __init__(self, prepared: Prepared, mailbox: Mailbox, sequences: Sequences, record: RequestRecord) -> None:
        self._prepared = prepared
        self._mailbox = mailbox
        self._sequences = sequences
        self._record = record
        self._num_going_on = len(prepared.choices)
        self._num_tokens = 0

    @property
    def is_going_on(self) -> bool:
        """Whether a choice has not ended."""
        return self._num_going_on > 0

    def usage(self) -> Chunk:
        """Token counts so far."""
        return usage_of(self._prepared.num_prompt_tokens, self._num_tokens)

    async def grow(self) -> list[tuple[int, Delta]]:
        """What the choices grew by; empty when nothing came for `SIGN_OF_LIFE_S`.

        Raises:
            ApiError: the request cannot be answered to its end.
        """
        deltas: dict[int, Delta] = {}
        for choice, event in await self._mailbox.take(SIGN_OF_LIFE_S):
            growing = self._prepared.choices[choice]
            if growing.finish is not None:
                continue
            self._record.saw_token()
            self._num_tokens += 1
            delta = growing.feed(event)
            known = deltas.get(choice)
            deltas[choice] = delta if known is None else known.joined(delta)
            if growing.finish is not None:
                self._num_going_on -= 1
                if growing.is_cut_short:
                    sequence = self._prepared.submission.ids[choice]
                    await self._sequences.cancel(sequence, "a stop string was met")
        self._record.completion_tokens = self._num_tokens
        return list(deltas.items())


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
