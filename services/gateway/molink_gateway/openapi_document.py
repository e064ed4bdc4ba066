"""The OpenAPI document of the gateway. Pure: made once from the models that check requests and from `ANSWER_SCHEMAS`.

FastAPI makes none here, because bodies are read as bytes and answers are written as bytes.
"""

from __future__ import annotations

from typing import Any

from molink_common import __version__
from molink_gateway.messages_request import CountRequest, MessagesRequest
from molink_gateway.openapi_parts import Schema
from molink_gateway.openapi_requests import request_schemas
from molink_gateway.openapi_schemas import ANSWER_SCHEMAS
from molink_gateway.requests import ChatRequest, CompletionRequest
from molink_gateway.responses_request import PASSED_ON, ResponsesRequest
from molink_gateway.token_routes import DetokenizeRequest, TokenizeRequest

_ERRORS = {
    400: "The request is wrong; the message says what would be right.",
    401: "No API key was given, or not a valid one.",
    404: "There is no such model, response or stream.",
    405: "The address does not take this method.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "There is no room, or not for this key: try again after `Retry-After`.",
    500: "The gateway failed, or the model's answer broke off.",
    503: "Nothing is wrong with the request, but nobody can answer it now: try again after `Retry-After`.",
}
_REQUEST_ID = {"X-Request-Id": {"schema": {"type": "string"}, "description": "of the request, for the logs"}}
_RETRY_AFTER = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "seconds"}}
_STREAM = "A stream of server-sent events, if the request has `stream`."
_ANYTIME = (405, 429, 500, 503)
_LOCKED = (401, *_ANYTIME)
_WITH_BODY = (400, 404, 408, 413, *_LOCKED)


def document() -> dict[str, Any]:
    """The document, in version 3.1 of OpenAPI."""
    requests = request_schemas(
        ChatRequest,
        CompletionRequest,
        ResponsesRequest,
        MessagesRequest,
        CountRequest,
        TokenizeRequest,
        DetokenizeRequest,
    )
    as_in_a_chat = {field: requests["ChatRequest"]["properties"][field] for field in PASSED_ON}
    requests["ResponsesRequest"]["properties"] |= as_in_a_chat
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "MoLink",
            "version": __version__,
            "description": "A large language model, cut by layers over several machines, behind OpenAI's API. Fields "
            "that are not described are left out of account; fields that would change the answer and that this server "
            "does not carry out are refused with 400.",
        },
        "paths": _paths(),
        "components": {
            "schemas": {**requests, **ANSWER_SCHEMAS},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        # without keys a gateway on loopback lets everybody in
        "security": [{}, {"bearer": []}, {"key": []}],
    }


def _paths() -> dict[str, Any]:
    response_id = _parameter("response_id", "path", {"type": "string"}, "of a response that is kept, for an hour")
    of_response = (400, 404, *_LOCKED)
    return {
        "/v1/chat/completions": {
            "post": _operation(
                "createChatCompletion", "Answer a chat.", "ChatCompletion", _WITH_BODY, body="ChatRequest", streams=True
            )
        },
        "/v1/completions": {
            "post": _operation(
                "createCompletion",
                "Go on with a text.",
                "Completion",
                _WITH_BODY,
                body="CompletionRequest",
                streams=True,
            )
        },
        "/v1/responses": {
            "post": _operation(
                "createResponse",
                "Answer items.",
                "Response",
                _WITH_BODY,
                body="ResponsesRequest",
                streams=True,
                leads_to=("getResponse", "listInputItems", "cancelResponse", "deleteResponse"),
            )
        },
        "/v1/responses/{response_id}": {
            "parameters": [response_id],
            "get": _operation("getResponse", "A response that is kept.", "Response", of_response),
            "delete": _operation("deleteResponse", "Forget a response.", "DeletedResponse", of_response),
        },
        "/v1/responses/{response_id}/cancel": {
            "parameters": [response_id],
            "post": _operation(
                "cancelResponse", "Always refused: no response is made in the background.", None, of_response
            ),
        },
        "/v1/responses/{response_id}/input_items": {
            "parameters": [
                response_id,
                _parameter("limit", "query", {"type": "integer", "minimum": 1, "maximum": 100}, "of one page"),
                _parameter("order", "query", {"enum": ["asc", "desc"]}, "newest first unless `asc`"),
                _parameter("after", "query", {"type": "string"}, "the last item of the page before"),
            ],
            "get": _operation("listInputItems", "What a response answers.", "ResponseItems", of_response),
        },
        "/v1/messages": {
            "post": _operation(
                "createMessage",
                "Answer a chat, in Anthropic's shape.",
                "Message",
                _WITH_BODY,
                body="MessagesRequest",
                streams=True,
                error="MessagesError",
            )
        },
        "/v1/messages/count_tokens": {
            "post": _operation(
                "countTokens",
                "How many tokens a message has.",
                "TokenCount",
                _WITH_BODY,
                body="CountRequest",
                error="MessagesError",
            )
        },
        "/v1/streams/{stream}": {
            "parameters": [
                _parameter("stream", "path", {"type": "string"}, "from the header `X-MoLink-Stream`"),
                _parameter("Last-Event-ID", "header", {"type": "string"}, "where the client stands"),
            ],
            "get": _operation("takeUpStream", "The rest of a stream.", None, (400, 404, *_LOCKED), streams=True),
        },
        "/v1/models": {"get": _operation("listModels", "What can be asked.", "Models", _LOCKED)},
        "/v1/models/{model}": {
            "parameters": [_parameter("model", "path", {"type": "string"}, "its name")],
            "get": _operation("getModel", "One model.", "Model", (404, *_LOCKED)),
        },
        "/tokenize": {
            "post": _operation("tokenize", "Text or chat to token ids.", "Tokens", _WITH_BODY, body="TokenizeRequest")
        },
        "/detokenize": {
            "post": _operation("detokenize", "Token ids to text.", "Text", _WITH_BODY, body="DetokenizeRequest")
        },
        "/health": {"get": _operation("health", "200 while the gateway lives.", "Health", _ANYTIME)},
        "/ready": {"get": _operation("ready", "200 while a request would be answered.", "Readiness", _ANYTIME)},
        "/version": {"get": _operation("version", "Of software and protocol.", "Version", _ANYTIME)},
        "/molink/status": {"get": _operation("status", "The state of the pool.", "ClusterState", _LOCKED)},
        "/openapi.json": {"get": _operation("openapi", "This document.", None, _ANYTIME, tells_object=True)},
    }


def _operation(
    name: str,
    summary: str,
    answer: str | None,
    errors: tuple[int, ...],
    *,
    body: str | None = None,
    streams: bool = False,
    tells_object: bool = False,
    error: str = "Error",
    leads_to: tuple[str, ...] = (),
) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if answer is not None or tells_object:
        content["application/json"] = {"schema": {"type": "object"} if answer is None else _named(answer)}
    if streams:
        content["text/event-stream"] = {"schema": _named("StreamEvent")}
    responses: dict[str, Any] = {}
    if content:
        described = "The answer. " + _STREAM if streams else "The answer."
        responses["200"] = {"description": described, "headers": _REQUEST_ID, "content": content}
    if leads_to:
        by_id = {"response_id": "$response.body#/id"}
        responses["200"]["links"] = {other: {"operationId": other, "parameters": by_id} for other in leads_to}
    responses |= {
        str(status): _error(status, "Readiness" if name == "ready" and status == 503 else error)
        for status in sorted(errors)
    }
    operation: dict[str, Any] = {"operationId": name, "summary": summary, "responses": responses}
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _named(body)}}}
    return operation


def _error(status: int, schema: str) -> dict[str, Any]:
    headers = _REQUEST_ID | (_RETRY_AFTER if status in (429, 503) else {})
    return {
        "description": _ERRORS[status],
        "headers": headers,
        "content": {"application/json": {"schema": _named(schema)}},
    }


def _parameter(name: str, place: str, schema: Schema, description: str) -> dict[str, Any]:
    is_required = {"required": True} if place == "path" else {}
    return {"name": name, "in": place, "schema": schema, "description": description, **is_required}


def _named(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
