"""Who may ask: whoever has a valid API key; and, where there are no keys, nobody but this machine.

    Authorization: Bearer sk-molink-…      or      x-api-key: sk-molink-…

A secret is looked up by its hash, so no comparison takes longer for a better guess, and it is never logged.
"""

from __future__ import annotations

from typing import Literal

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from molink_common.logs import get_logger
from molink_common.messages import SECRET_PREFIX, ApiKey, Keys, hash_of_secret
from molink_gateway.access_log import record_of, send_error
from molink_gateway.api_errors import ApiError, invalid_key, unavailable

log = get_logger("gateway.auth")

RequireKeys = Literal["auto", "always", "once-added"]
OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/openapi.json"})
"""What tells nothing of the pool's use. All else needs a key, /molink/status too."""
ANONYMOUS = ""
"""The tenant of requests without a key."""

_HOW = f"Send one as `Authorization: Bearer {SECRET_PREFIX}…` or `x-api-key: {SECRET_PREFIX}…`"
_ADD = "`molink keys add NAME --nats-url nats://…`"
_NO_SECRET = f"No API key was given. {_HOW}; who runs this pool adds one with {_ADD}."
_WRONG_SECRET = f"The API key is not valid here. {_HOW}; who runs this pool adds one with {_ADD}."
_REVOKED = "The API key was revoked. Ask who runs this pool for another one."
_NO_KEYS_YET = (
    f"This gateway answers nobody without an API key, and none has been added yet. Add one with {_ADD}, or start the "
    "gateway with `--require-keys once-added` to let everybody in who can reach it until then."
)
_NOT_KNOWN_YET = "No scheduler has told this gateway yet which API keys are valid. Try again soon."


class Doorkeeper:
    """Knows the keys, and lets in whom they allow. Without IO."""

    def __init__(self, require_keys: RequireKeys, *, is_loopback: bool) -> None:
        self._needs_no_key_before_one_is_added = require_keys == "once-added" or (
            require_keys == "auto" and is_loopback
        )
        self._is_loopback = is_loopback
        self._has_had_keys = False
        self._keys: dict[str, ApiKey] | None = None
        """By the hash of their secrets. None: not heard yet."""

    @property
    def rule(self) -> str:
        """Who may ask, in words."""
        if not self._needs_no_key_before_one_is_added:
            return "whoever has an API key"
        who = "whoever is on this machine" if self._is_loopback else "everybody who can reach it"
        return f"{who}, until an API key is added; then whoever has one"

    def hear(self, keys: Keys) -> None:
        """The table as it is now."""
        self._keys = {key.secret_sha256: key for key in keys.keys}
        # a table that is empty again was lost: that is no reason to let everybody in
        self._has_had_keys = self._has_had_keys or bool(self._keys)
        num_valid = sum(key.revoked_s is None for key in keys.keys)
        log.info(
            "API keys known", valid=num_valid, who_may_ask=self.rule if self._is_open else "whoever has one of them"
        )

    @property
    def _is_open(self) -> bool:
        return self._needs_no_key_before_one_is_added and not self._has_had_keys

    def tenant_of(self, headers: Headers) -> str:
        """Whose request it is.

        Raises:
            ApiError: 401, it may not be answered; 503, that cannot be said yet.
        """
        if self._keys is None:
            raise unavailable(_NOT_KNOWN_YET, code="no_scheduler")
        secret = given_secret(headers)
        if secret is not None:
            key = self._keys.get(hash_of_secret(secret))
            if key is not None and key.revoked_s is None:
                return key.id
            if key is not None or secret.startswith(SECRET_PREFIX):
                # what was meant as one of our keys is never let in as if it were none
                raise invalid_key(_WRONG_SECRET if key is None else _REVOKED)
        if self._is_open:
            return ANONYMOUS  # clients that must send some key send any
        if not self._keys:
            raise invalid_key(_NO_KEYS_YET)
        raise invalid_key(_NO_SECRET if secret is None else _WRONG_SECRET)


def given_secret(headers: Headers) -> str | None:
    """What stands where a key belongs: `Authorization` as OpenAI's clients send it, else `x-api-key` as Anthropic's."""
    scheme, _, value = headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return headers.get("x-api-key", "").strip() or None


class KeyGuard:
    """The ASGI layer in front of the routes: who may not ask gets an answer before the body is read."""

    def __init__(self, app: ASGIApp, doorkeeper: Doorkeeper) -> None:
        self._app = app
        self._doorkeeper = doorkeeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            record = record_of(scope)
            try:
                record.tenant = self._doorkeeper.tenant_of(Headers(scope=scope))
            except ApiError as error:
                record.problem = error.code
                await send_error(send, error)
                return
        await self._app(scope, receive, send)
