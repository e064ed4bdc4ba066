"""The routes in Anthropic's shape."""

from __future__ import annotations

from collections.abc import Callable

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response

from molink_gateway.asking import asked_by
from molink_gateway.exchange import Exchange, Limits
from molink_gateway.messages_errors import PATH
from molink_gateway.messages_opening import MessageOpenings
from molink_gateway.opening import Open


def add_messages(app: FastAPI, openings: MessageOpenings, limits: Limits, exchange: Callable[[Open], Exchange]) -> None:
    """``/v1/messages`` and what is below it."""

    @app.post(PATH)
    async def messages() -> Response:
        return exchange(openings.message)

    @app.post(PATH + "/count_tokens")
    async def count_tokens(request: Request) -> Response:
        counted = await openings.count(await asked_by(request, limits))
        return Response(orjson.dumps({"input_tokens": counted}), media_type="application/json")
