"""Between gateway and scheduler: answers that a client may ask for again by their id.

Gateways are stateless, and any of them may be asked. What is kept does not change, and its id is random: keeping it
twice, or by two schedulers, is the same as once.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from molink_common.messages.codec import Message, Tenant

MAX_KEPT_CHARACTERS = 512 * 1024
"""Larger ones are not kept: a message must hold one."""

KeptId = Annotated[str, Field(pattern=r"^resp_[0-9a-f]{32}$")]


class KeepResponse(Message):
    """Keep this for an hour, unless there is no room for so many."""

    TYPE = "keep_response"
    tenant: Tenant = ""
    response: KeptId
    body: Annotated[str, Field(max_length=MAX_KEPT_CHARACTERS)]
    """JSON that only gateways read."""


class AskResponse(Message):
    """What is kept under this id, for this tenant."""

    TYPE = "ask_response"
    tenant: Tenant = ""
    response: KeptId


class DropResponse(Message):
    """Keep it no longer. Unknown ids are ignored."""

    TYPE = "drop_response"
    tenant: Tenant = ""
    response: KeptId


class KeptResponse(Message):
    """The answer to `AskResponse`."""

    TYPE = "kept_response"
    body: str | None = None
    """None: nothing is kept, or no longer."""
