"""Responses that can be asked for again: the schedulers keep them for an hour, so that any gateway finds them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import orjson

from molink_common import subjects
from molink_common.bus import Bus
from molink_common.errors import BusError, ProtocolError
from molink_common.logs import get_logger
from molink_common.messages import AskResponse, Done, DropResponse, Failed, KeepResponse, KeptResponse, M, Message
from molink_common.messages.kept import MAX_KEPT_CHARACTERS
from molink_gateway.api_errors import ApiError, unavailable
from molink_gateway.responses_items import Item

log = get_logger("gateway.responses")

ANSWER_TIMEOUT_S = 2.0
_ID = re.compile(r"resp_[0-9a-f]{32}\Z")
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A response and what it answers."""

    response: dict[str, Any]
    context: list[Item]
    """Every item that the model was given, those of earlier responses too."""

    def conversation(self) -> list[Item]:
        """What a further response builds upon."""
        return [*self.context, *self.response["output"]]


class KeptResponses:
    """The schedulers' shelf, as a gateway uses it."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def keep(self, tenant: str, kept: Kept) -> None:
        """Keep it if that can be done soon; a response that cannot be kept has been answered all the same."""
        name = kept.response["id"]
        body = orjson.dumps({"version": _VERSION, "response": kept.response, "context": kept.context}).decode()
        if len(body) > MAX_KEPT_CHARACTERS:
            log.info("a response is too large to be kept", response=name, characters=len(body))
            return
        try:
            answer = await self._bus.ask(
                subjects.RESPONSES,
                KeepResponse(tenant=tenant, response=name, body=body),
                Done,
                Failed,
                timeout_s=ANSWER_TIMEOUT_S,
            )
        except (BusError, ProtocolError) as error:
            log.warning("a response is not kept", response=name, problem=str(error))
            return
        if isinstance(answer, Failed):
            log.warning("a response is not kept", response=name, problem=answer.message)

    async def fetch(self, tenant: str, name: str, *, param: str | None = None) -> Kept:
        """The response of this name.

        Raises:
            ApiError: 404, there is none (any more); 503, nobody can tell.
        """
        body = await self._body(tenant, name) if _ID.match(name) else None
        parsed = None if body is None else orjson.loads(body)
        if parsed is None or parsed.get("version") != _VERSION:
            raise ApiError(
                404,
                f"There is no response `{name[:80]}`. Responses are kept for an hour, unless `store` is false.",
                param=param,
                code="previous_response_not_found" if param else "response_not_found",
            )
        return Kept(response=parsed["response"], context=parsed["context"])

    async def drop(self, tenant: str, name: str) -> None:
        """Forget one.

        Raises:
            ApiError: 503, nobody is there to forget it.
        """
        await self._ask(DropResponse(tenant=tenant, response=name), Done)

    async def _body(self, tenant: str, name: str) -> str | None:
        return (await self._ask(AskResponse(tenant=tenant, response=name), KeptResponse)).body

    async def _ask(self, question: AskResponse | DropResponse, expected: type[M]) -> M:
        try:
            answer: Message = await self._bus.ask(
                subjects.RESPONSES, question, expected, Failed, timeout_s=ANSWER_TIMEOUT_S
            )
        except (BusError, ProtocolError) as error:
            log.warning("kept responses cannot be asked for", problem=str(error))
            raise unavailable("No scheduler tells of kept responses. Try again soon.", code="no_scheduler") from error
        if isinstance(answer, Failed):
            raise unavailable(f"Kept responses cannot be read: {answer.message}. Try again soon.", code="no_store")
        assert isinstance(answer, expected)
        return answer
