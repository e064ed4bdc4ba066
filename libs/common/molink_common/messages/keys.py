"""API keys: who may ask, how often and how much.

A secret is known to nobody but the one it was made for: whoever adds a key makes the secret himself and sends its
SHA-256 alone. That is enough, without salt and without a slow hash, because a secret is 256 random bits and no
password: there is no list to try.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from molink_common.messages.codec import Count, Message

SECRET_PREFIX = "sk-molink-"  # noqa: S105  by which people and secret scanners know one
_SECRET_BYTES = 32
MAX_KEYS = 4096
"""Valid ones and revoked ones that are remembered: all of them fit one message."""

KeyId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
KeyName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._@+-]{0,63}$")]
"""For people; of the valid keys no two have the same."""
Limit = Annotated[int, Field(ge=1, le=10**12)]


class KeyLimits(BaseModel):
    """How much a key allows. None: as much as there is."""

    model_config = ConfigDict(frozen=True)
    requests_per_minute: Limit | None = None
    concurrent: Limit | None = None
    """Sequences at the same time: a request for n answers has n of them."""
    tokens_per_day: Limit | None = None
    """Of prompts and answers, from midnight to midnight UTC."""


class ApiKey(BaseModel):
    """A key as everybody but its owner knows it."""

    model_config = ConfigDict(frozen=True)
    id: KeyId
    """The tenant that requests with this key belong to."""
    name: KeyName
    secret_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    created_s: Count
    """Seconds since 1970."""
    limits: KeyLimits = KeyLimits()
    revoked_s: Count | None = None
    """Since when it is not valid any more."""


def new_secret() -> str:
    """256 random bits, for one pair of eyes."""
    return SECRET_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)


def hash_of_secret(secret: str) -> str:
    """What is kept of a secret, and what a given one is looked up by."""
    return hashlib.sha256(secret.encode()).hexdigest()


class AddKey(Message):
    """From an operator: this key is valid from now on. Answered by `Done` once the store has it, or by `Failed`."""

    TYPE = "add_key"
    key: ApiKey


class RevokeKey(Message):
    """From an operator: this key is not valid any more, and what runs with it ends. Answered as `AddKey` is."""

    TYPE = "revoke_key"
    key: KeyId


class AskKeys(Message):
    """Ask the scheduler for all keys; answered by `Keys`."""

    TYPE = "ask_keys"


class Keys(Message):
    """All keys, revoked ones too."""

    TYPE = "keys"
    revision: str
    """See `ClusterState.keys_revision`."""
    keys: Annotated[tuple[ApiKey, ...], Field(max_length=MAX_KEYS)] = ()
    tokens_today: dict[KeyId, Count] = Field(default_factory=dict)
    """Of those that have used any."""
