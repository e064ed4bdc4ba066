"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``, all four keys always."""

from __future__ import annotations

import math
from typing import Any

import orjson

from molink_common.errors import MolinkError

_TYPE_OF_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}
_RETRY_AFTER_S = 1.0
"""Where nobody knows better."""


class ApiError(MolinkError):
    """A request ends with this status and sentence.

    `param` names the field that is wrong, `code` is for programs, `retry_after_s` becomes ``Retry-After``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        if retry_after_s is None and status in (429, 503):  # whoever is told to come back is told when
            retry_after_s = _RETRY_AFTER_S
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = _TYPE_OF_STATUS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def json(self) -> bytes:
        """`body` as bytes."""
        return orjson.dumps(self.body())

    def headers(self) -> dict[str, str]:
        """``Retry-After`` in whole seconds, at least one, with every 429 and 503; how to come in, with every 401."""
        headers: dict[str, str] = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: what was sent is wrong; the message says what would be right."""
    return ApiError(400, message, param=param, code=code)


def unsupported(message: str, *, param: str) -> ApiError:
    """400: a field that would change the answer's meaning and that this version does not carry out."""
    return ApiError(400, message, param=param, code="unsupported")


def unknown_model(name: str, known: tuple[str, ...]) -> ApiError:
    """404: the model is not served here."""
    served = ", ".join(f"`{one}`" for one in known) or "none yet"
    return ApiError(
        404, f"The model `{name}` does not exist here. Served: {served}.", param="model", code="model_not_found"
    )


def too_long(num_prompt_tokens: int, context_length: int, *, param: str, is_at_least: bool = False) -> ApiError:
    """400: no room for even one new token behind the prompt."""
    how_many = f"at least {num_prompt_tokens}" if is_at_least else str(num_prompt_tokens)
    return ApiError(
        400,
        f"This model's maximum context length is {context_length} tokens, but the prompt has {how_many} "
        "tokens and at least 1 must be left for the answer. Shorten the prompt.",
        param=param,
        code="context_length_exceeded",
    )


def invalid_key(message: str) -> ApiError:
    """401: no API key, or not a valid one."""
    return ApiError(401, message, code="invalid_api_key")


def too_large(limit_bytes: int) -> ApiError:
    """413: the body is over the limit."""
    return ApiError(413, f"The request body is larger than the limit of {limit_bytes} bytes.", code="request_too_large")


def unavailable(message: str, *, retry_after_s: float = 2.0, code: str = "no_pipeline") -> ApiError:
    """503: nothing is wrong with the request; it may work later."""
    return ApiError(503, message, code=code, retry_after_s=retry_after_s)


def busy(message: str, *, code: str = "queue_full", retry_after_s: float = 1.0) -> ApiError:
    """429: there is no room, or not for this client; it may work later."""
    return ApiError(429, message, code=code, retry_after_s=retry_after_s)
