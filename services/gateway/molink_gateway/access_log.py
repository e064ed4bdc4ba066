"""Around every request: an id, one log line, and the last net for what nobody else caught."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from molink_common.logs import get_logger
from molink_gateway.api_errors import ApiError

log = get_logger("gateway.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")
_QUIET_PATHS = frozenset({"/health", "/ready", "/molink/status", "/version"})
CLIENT_GONE = 499
"""The status in the log of a client that hung up (nginx's number; it is never sent)."""


@dataclass(slots=True)
class RequestRecord:
    """What is told of a request when it has ended. Never its texts."""

    request_id: str
    began_s: float = field(default_factory=time.monotonic)
    status: int = CLIENT_GONE
    tenant: str = ""
    """The id of the API key that it came with."""
    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    ttft_s: float | None = None
    problem: str | None = None
    """Why an answer that had begun did not end well."""

    def saw_token(self) -> None:
        """The first call sets the time to the first token."""
        if self.ttft_s is None:
            self.ttft_s = time.monotonic() - self.began_s

    def fields(self) -> dict[str, Any]:
        """For the log line."""
        known = {
            "key": self.tenant or None,
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.completion_tokens,
            "ttft_s": None if self.ttft_s is None else round(self.ttft_s, 4),
            "problem": self.problem,
        }
        return {name: value for name, value in known.items() if value is not None}


def record_of(scope: Scope) -> RequestRecord:
    """The record of the request being answered."""
    record: RequestRecord = scope["state"]["record"]
    return record


class AccessLog:
    """The outermost ASGI layer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_request_id(Headers(scope=scope).get("x-request-id")))
        scope.setdefault("state", {})["record"] = record
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # the boundary of a request: one bad request must not end the gateway
            log.exception("request failed", request=record.request_id)
            record.problem = type(error).__name__
            if not has_started:
                await send_error(send_with_id, ApiError(500, "The gateway failed. Its log says why.", code="internal"))
        finally:
            emit = log.debug if scope["path"] in _QUIET_PATHS else log.info
            emit(
                "request",
                request=record.request_id,
                method=scope["method"],
                path=scope["path"][:200],
                status=record.status,
                duration_s=round(time.monotonic() - record.began_s, 4),
                **record.fields(),
            )


def _request_id(given: str | None) -> str:
    if given is not None and _REQUEST_ID.match(given):
        return given
    return "req-" + secrets.token_hex(12)


async def send_error(send: Send, error: ApiError) -> None:
    """Answer with an error."""
    await send_json(send, error.status, error.json(), error.headers())


async def send_json(send: Send, status: int, body: bytes, extra_headers: dict[str, str] | None = None) -> None:
    """Answer with a JSON body."""
    headers = MutableHeaders({"content-type": "application/json", "content-length": str(len(body))})
    headers.update(extra_headers or {})
    await send({"type": "http.response.start", "status": status, "headers": headers.raw})
    await send({"type": "http.response.body", "body": body})
