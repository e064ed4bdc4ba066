"""The routes."""

from __future__ import annotations

from dataclasses import dataclass

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from molink_common import PROTOCOL_VERSION, __version__, messages
from molink_common.telemetry import Telemetry
from molink_gateway.api_errors import ApiError, bad_request, unavailable, unknown_model
from molink_gateway.auth import Doorkeeper
from molink_gateway.cluster import Cluster, ServedModel
from molink_gateway.exchange import Door, Exchange, Limits
from molink_gateway.kept_responses import KeptResponses
from molink_gateway.key_table import KeyTable
from molink_gateway.messages_opening import MessageOpenings
from molink_gateway.messages_routes import add_messages
from molink_gateway.openapi_document import document
from molink_gateway.opening import Open, Openings
from molink_gateway.request_body import ClientGone
from molink_gateway.responses_opening import ResponseOpenings
from molink_gateway.responses_routes import add_kept_responses
from molink_gateway.sequences import Sequences
from molink_gateway.settings import GatewaySettings
from molink_gateway.stream_place import check_stream_id
from molink_gateway.token_routes import add_tokens

_GET_OR_HEAD = ["GET", "HEAD"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the routes work with."""

    settings: GatewaySettings
    gateway: str
    cluster: Cluster
    doorkeeper: Doorkeeper
    keys: KeyTable
    kept: KeptResponses
    sequences: Sequences
    telemetry: Telemetry
    door: Door


def make_app(parts: Parts) -> FastAPI:
    """The HTTP application. What it needs must be running; it opens nothing itself."""
    app = FastAPI(title="MoLink", version=__version__, openapi_url=None, docs_url=None, redoc_url=None)
    _add_error_shapes(app)
    _add_generation(app, parts)
    _add_models(app, parts)
    _add_health(app, parts)
    _add_document(app)
    return app


def _json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


def _error(error: ApiError) -> Response:
    return Response(error.json(), error.status, error.headers(), media_type="application/json")


def _add_error_shapes(app: FastAPI) -> None:
    """Whatever goes wrong, a client reads OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def of_ours(_: Request, error: ApiError) -> Response:
        return _error(error)

    @app.exception_handler(ClientGone)
    async def of_nobody(_: Request, __: ClientGone) -> Response:
        return Response(status_code=400)  # nobody reads it

    @app.exception_handler(RequestValidationError)
    async def of_validation(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return _error(bad_request(f"`{place}`: {first['msg']}", param=place))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        known = {
            404: f"There is nothing at {request.url.path[:200]}. The API is below /v1, as /openapi.json tells.",
            405: f"{request.url.path[:200]} does not take {request.method}.",
        }
        message = known.get(error.status_code, str(error.detail))
        response = _error(ApiError(error.status_code, message))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def of_the_rest(_: Request, __: Exception) -> Response:
        return _error(ApiError(500, "The gateway failed. Its log says why.", code="internal"))


def _add_generation(app: FastAPI, parts: Parts) -> None:
    settings = parts.settings
    openings = Openings(
        parts.cluster, parts.sequences, gateway=parts.gateway, are_all_resumable=settings.resumable_streams
    )
    limits = Limits(
        body_bytes=settings.max_body_bytes,
        body_timeout_s=settings.body_timeout_s,
        send_timeout_s=settings.stall_timeout_s,
        sign_of_life_s=settings.sign_of_life_s,
    )

    def exchange(opening: Open) -> Exchange:
        return Exchange(opening, sequences=parts.sequences, door=parts.door, telemetry=parts.telemetry, limits=limits)

    @app.post("/v1/chat/completions")
    async def chat_completions() -> Response:
        return exchange(openings.chat)

    @app.post("/v1/completions")
    async def completions() -> Response:
        return exchange(openings.completion)

    responses = ResponseOpenings(openings, parts.kept)

    @app.post("/v1/responses")
    async def new_response() -> Response:
        return exchange(responses.response)

    @app.get("/v1/streams/{sequence}")
    async def stream(sequence: str) -> Response:
        stream_id = check_stream_id(sequence)
        return exchange(lambda asked: openings.stream(asked, stream_id))

    add_kept_responses(app, parts.kept)
    add_messages(app, MessageOpenings(openings), limits, exchange)
    add_tokens(app, parts.cluster, openings, limits)


def _add_models(app: FastAPI, parts: Parts) -> None:
    def described(model: ServedModel, name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": model.known_since_s,
            "owned_by": "molink",
            "root": model.card.name,
            "max_model_len": model.card.context_length,
        }

    @app.api_route("/v1/models", methods=_GET_OR_HEAD)
    async def models() -> Response:
        model = parts.cluster.model
        data = [] if model is None else [described(model, name) for name in model.names]
        return _json({"object": "list", "data": data})

    @app.api_route("/v1/models/{name:path}", methods=_GET_OR_HEAD)
    async def one_model(name: str) -> Response:
        model = parts.cluster.model
        if model is None or name not in model.names:
            raise unknown_model(name, () if model is None else model.names)
        return _json(described(model, name))


def _add_health(app: FastAPI, parts: Parts) -> None:
    @app.api_route("/health", methods=_GET_OR_HEAD)
    async def health() -> Response:
        problem = parts.cluster.problem()
        return _json({"status": "ok", "ready": problem is None, "reason": problem or "ready"})

    @app.api_route("/ready", methods=_GET_OR_HEAD)
    async def ready() -> Response:
        problem = parts.cluster.problem()
        if problem is not None:
            return _json({"status": "unavailable", "reason": problem}, 503, {"retry-after": "2"})
        return _json({"status": "ok", "reason": "ready"})

    @app.get("/molink/status")
    async def status() -> Response:
        state = parts.cluster.state
        if state is None:
            raise unavailable("No scheduler has been heard yet.", code="no_scheduler")
        return Response(messages.encode(state), media_type="application/json")

    @app.api_route("/version", methods=_GET_OR_HEAD)
    async def version() -> Response:
        return _json({"version": __version__, "protocol": PROTOCOL_VERSION})


def _add_document(app: FastAPI) -> None:
    written = orjson.dumps(document())

    @app.api_route("/openapi.json", methods=_GET_OR_HEAD)
    async def openapi() -> Response:
        return Response(written, media_type="application/json")
