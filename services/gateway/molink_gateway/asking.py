"""A request that is answered at once, as the openings of longer answers read it."""

from __future__ import annotations

from fastapi import Request
from starlette.datastructures import Headers

from molink_gateway.access_log import record_of
from molink_gateway.exchange import Limits
from molink_gateway.opening import Asked
from molink_gateway.request_body import read_body


async def asked_by(request: Request, limits: Limits) -> Asked:
    """The request with its whole body.

    Raises:
        ApiError: the body is too large or too slow.
        ClientGone: it will never be whole.
    """
    body = await read_body(
        request.scope, request.receive, limit_bytes=limits.body_bytes, timeout_s=limits.body_timeout_s
    )
    return Asked(body=body, headers=Headers(scope=request.scope), record=record_of(request.scope), trace=None)
