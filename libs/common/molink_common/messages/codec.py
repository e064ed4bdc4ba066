"""Base, encoding and decoding of all control messages."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from molink_common import PROTOCOL_VERSION
from molink_common.errors import ProtocolError

PeerId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
SequenceIdField = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Count = Annotated[int, Field(ge=0)]
TokenIds = tuple[Count, ...]
Tenant = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{0,64}$")]
"""Whose request it is: the id of an API key, empty without one. Under load tenants get equal shares."""
Priority = Annotated[int, Field(ge=-1000, le=1000)]
"""Within a tenant, the smaller one goes first."""


class Message(BaseModel):
    """Base of all control messages."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    TYPE: ClassVar[str]


M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """One JSON object with the message's fields, its type and the protocol version."""
    body: dict[str, Any] = message.model_dump(mode="python")
    body["v"] = PROTOCOL_VERSION
    body["type"] = message.TYPE
    return orjson.dumps(body, option=orjson.OPT_NON_STR_KEYS, default=_encode_rest)


def _encode_rest(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("ascii")  # pydantic has made it base64 already
    raise TypeError(f"{type(value).__name__} cannot stand in a message")


def decode(data: bytes | memoryview, *expected: type[M]) -> M:
    """The message in `data`, which must be one of the `expected` types.

    Raises:
        ProtocolError: not JSON, another version, another type, or a field with a wrong value.
    """
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ProtocolError(f"a control message is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ProtocolError("a control message is not a JSON object")
    if body.get("v") != PROTOCOL_VERSION:
        raise ProtocolError(f"protocol version {body.get('v')!r}, this side speaks {PROTOCOL_VERSION}")
    for message_type in expected:
        if body.get("type") == message_type.TYPE:
            try:
                return message_type.model_validate(body)
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(str(part) for part in first["loc"])
                raise ProtocolError(f"{message_type.TYPE}: {place}: {first['msg']}") from error
    names = ", ".join(message_type.TYPE for message_type in expected)
    raise ProtocolError(f"a message of type {body.get('type')!r} where one of ({names}) belongs")
