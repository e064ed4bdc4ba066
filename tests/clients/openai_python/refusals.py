"""What is refused: the exception that a program catches, and what it tells."""

from __future__ import annotations

from typing import Any

import openai

from tests.clients.openai_python.connection import client, user
from tests.clients.reporting import API_KEY, MODEL, Checks, same


def _refused(kind: type[openai.APIStatusError], **fields: Any) -> openai.APIStatusError:
    """The exception of a chat with these fields."""
    asked: dict[str, Any] = {"model": MODEL, "messages": user("Hi"), "max_tokens": 2} | fields
    try:
        client.chat.completions.create(**asked)
    except kind as error:
        body = error.body
        assert isinstance(body, dict), body
        same(set(body), {"message", "type", "param", "code"}, "the error's keys")
        return error
    raise AssertionError(f"{fields} was not refused")


def refused_model() -> str:
    error = _refused(openai.NotFoundError, model="gpt-9")
    same(error.code, "model_not_found", "code")
    return error.message


def refused_key() -> str:
    """Whoever has no valid key, where keys are asked for; a server without keys is open."""
    stranger = client.with_options(api_key="sk-of-nobody")
    if API_KEY == "unused":
        return f"the server is open: {[model.id for model in stranger.models.list()]}"
    try:
        stranger.models.list()
    except openai.AuthenticationError as error:
        same(error.code, "invalid_api_key", "code")
        return error.message
    raise AssertionError("a wrong key was not refused")


def refused_value() -> str:
    error = _refused(openai.BadRequestError, temperature=3)
    same(error.param, "temperature", "param")
    return error.message


def refused_context() -> str:
    error = _refused(openai.BadRequestError, messages=user("word " * 9000))
    same(error.code, "context_length_exceeded", "code")
    return error.message


def refused_schema() -> str:
    error = _refused(
        openai.BadRequestError,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
    )
    assert "response_format" in str(error.param), error.body
    return error.message


def refused_embeddings() -> str:
    try:
        client.embeddings.create(model=MODEL, input="Hi")
    except openai.APIStatusError as error:
        assert error.status_code in (400, 404, 501), error.status_code
        assert "embeddings" in error.message, error.message
        return f"{error.status_code}: {error.message}"
    raise AssertionError("embeddings were not refused")


def add_to(checks: Checks) -> None:
    """Every check of this file."""
    for check in (refused_key, refused_model, refused_value, refused_context, refused_schema, refused_embeddings):
        checks.add(check)
