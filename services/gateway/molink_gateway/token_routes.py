"""``/tokenize`` and ``/detokenize``, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import Field, ValidationError

from molink_gateway.access_log import record_of
from molink_gateway.api_errors import bad_request
from molink_gateway.asking import asked_by
from molink_gateway.cluster import Cluster, ServedModel
from molink_gateway.exchange import Limits
from molink_gateway.opening import Asked, Openings
from molink_gateway.options import check_vocabulary
from molink_gateway.request_fields import Fields
from molink_gateway.requests import complaint, json_object_in

MAX_TOKENS = 1_000_000
R = TypeVar("R", bound=Fields)
TokenId = Annotated[int, Field(ge=0)]


class TokenizeRequest(Fields):
    """``POST /tokenize``: a text, or the messages of a chat with whatever a chat request has beside them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(Fields):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS)]


def add_tokens(app: FastAPI, cluster: Cluster, openings: Openings, limits: Limits) -> None:
    """The two routes. A chat is tokenized as it would be for an answer, so it must leave room for one."""

    def model_of(name: str | None, request: Request) -> ServedModel:
        model = cluster.require_any_model() if name is None else cluster.require_model(name)
        record_of(request.scope).model = model.card.name
        return model

    async def tokens_of(asked: TokenizeRequest, model: ServedModel, chat: Asked) -> list[int]:
        if asked.prompt is not None:
            return await asyncio.to_thread(
                model.tokenizer.encode, asked.prompt, add_special_tokens=asked.add_special_tokens
            )
        named = json_object_in(chat.body) | {"model": asked.model or model.card.name}
        prepared = await openings.prepare_chat(replace(chat, body=orjson.dumps(named)))
        return list(prepared.submission.sequences[0].prompt)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        chat = await asked_by(request, limits)
        asked = _parsed(TokenizeRequest, chat.body)
        if (asked.prompt is None) == (asked.messages is None):
            raise bad_request("Give either `prompt` or `messages`.", param="prompt")
        model = model_of(asked.model, request)
        tokens = await tokens_of(asked, model, chat)
        texts = [model.tokenizer.text_of(token).text for token in tokens] if asked.return_token_strs else None
        return _json(
            {
                "count": len(tokens),
                "max_model_len": model.card.context_length,
                "tokens": tokens,
                "token_strs": texts,
            }
        )

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        asked = _parsed(DetokenizeRequest, (await asked_by(request, limits)).body)
        model = model_of(asked.model, request)
        check_vocabulary(asked.tokens, model.card.vocabulary_size, "tokens")
        return _json({"prompt": await asyncio.to_thread(model.tokenizer.decode_all, asked.tokens)})


def _parsed(kind: type[R], body: bytes) -> R:
    try:
        return kind.model_validate(json_object_in(body))
    except ValidationError as error:
        raise complaint(error) from error


def _json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
