"""The routes of responses that are kept."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import FastAPI, Query, Request
from fastapi.responses import Response

from molink_gateway.access_log import record_of
from molink_gateway.api_errors import bad_request
from molink_gateway.kept_responses import KeptResponses
from molink_gateway.responses_items import Item

_MOST_ITEMS = 100


def add_kept_responses(app: FastAPI, kept: KeptResponses) -> None:
    """Below ``/v1/responses/{id}``."""

    @app.get("/v1/responses/{name}")
    async def retrieve(request: Request, name: str) -> Response:
        found = await kept.fetch(record_of(request.scope).tenant, name)
        if request.query_params.get("stream") in ("true", "1"):
            raise bad_request("A response that has ended cannot be streamed. Ask without `stream`.", param="stream")
        return _json(found.response)

    @app.delete("/v1/responses/{name}")
    async def delete(request: Request, name: str) -> Response:
        tenant = record_of(request.scope).tenant
        await kept.fetch(tenant, name)
        await kept.drop(tenant, name)
        return _json({"id": name, "object": "response", "deleted": True})

    @app.post("/v1/responses/{name}/cancel")
    async def cancel(request: Request, name: str) -> Response:
        await kept.fetch(record_of(request.scope).tenant, name)
        raise bad_request(
            "Only a response with `background` can be cancelled, and none is made so here. Close the connection of a "
            "response to end it.",
            code="not_in_background",
        )

    @app.get("/v1/responses/{name}/input_items")
    async def input_items(
        request: Request,
        name: str,
        limit: int = Query(default=20, ge=1, le=_MOST_ITEMS),
        order: str = Query(default="desc", pattern="^(asc|desc)$"),
        after: str | None = Query(default=None),
    ) -> Response:
        found = await kept.fetch(record_of(request.scope).tenant, name)
        items = found.context if order == "asc" else found.context[::-1]
        return _json(page_of(items, limit=limit, after=after))


def page_of(items: list[Item], *, limit: int, after: str | None) -> dict[str, Any]:
    """A page of a list as OpenAI's clients turn it.

    Raises:
        ApiError: 400, `after` is none of the items.
    """
    start = 0
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise bad_request(f"`after` is {after[:80]!r}, which is none of the items.", param="after")
        start = places[0] + 1
    page = items[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else "",
        "last_id": page[-1]["id"] if page else "",
        "has_more": start + limit < len(items),
    }


def _json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
