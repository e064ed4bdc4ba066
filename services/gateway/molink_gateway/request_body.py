"""Reading a request's body: never more than the limit, never longer than the time for it."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from molink_common.errors import MolinkError
from molink_gateway.api_errors import ApiError, bad_request, too_large


class ClientGone(MolinkError):
    """The client hung up: nobody reads an answer."""


async def read_body(scope: Scope, receive: Receive, *, limit_bytes: int, timeout_s: float) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413, known from ``Content-Length`` before a byte is read or else while reading; 408 after
            `timeout_s`; 400 for a ``Content-Length`` that is no number.
        ClientGone: the connection was closed before the end.
    """
    announced = Headers(scope=scope).get("content-length")
    if announced is not None:
        if not announced.isascii() or not announced.isdigit():
            raise bad_request("The Content-Length header is not a number.")
        if int(announced) > limit_bytes:
            raise too_large(limit_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone("the client closed the connection while sending its request")
                body += message.get("body", b"")
                if len(body) > limit_bytes:
                    raise too_large(limit_bytes)
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError as error:
        raise ApiError(408, f"The request's body did not arrive within {timeout_s:g} s.", code="timeout") from error


async def raise_when_gone(receive: Receive) -> None:
    """Wait until the client hangs up; the body must have been read.

    Raises:
        ClientGone: it has.
    """
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client closed the connection")
