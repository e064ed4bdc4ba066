"""Below ``/v1/messages`` errors have Anthropic's shape: ``{"type": "error", "error": {"type", "message"}}``.

Whoever refuses a request (the door, the keys, the routes) does it in one shape, OpenAI's; this layer writes it anew.
"""

from __future__ import annotations

from typing import Any

import orjson
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATH = "/v1/messages"

_TYPE_OF_STATUS = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(status: int, message: str) -> dict[str, Any]:
    """An error as Anthropic's clients read it."""
    kind = _TYPE_OF_STATUS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


class MessagesErrors:
    """The ASGI layer around everything that may refuse a request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        is_ours = scope["type"] == "http" and (scope["path"] == PATH or scope["path"].startswith(PATH + "/"))
        await self._app(scope, receive, _Rewriter(send) if is_ours else send)


class _Rewriter:
    """Holds the beginning of an error back until its body is here: errors have one piece."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._start = message
            return
        if self._start is not None:
            start, self._start = self._start, None
            body = _rewritten(start["status"], message.get("body", b""))
            MutableHeaders(scope=start)["content-length"] = str(len(body))
            await self._send(start)
            message = {**message, "body": body}
        await self._send(message)


def _rewritten(status: int, body: bytes) -> bytes:
    if not body:
        return body
    told = orjson.loads(body)["error"]
    return orjson.dumps(error_body(status, told["message"]))
