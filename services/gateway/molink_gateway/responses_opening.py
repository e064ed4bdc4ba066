"""How a response begins: its conversation is found, and a chat is opened that answers it."""

from __future__ import annotations

import secrets
import time
from dataclasses import replace

from molink_gateway.access_log import RequestRecord
from molink_gateway.api_errors import ApiError
from molink_gateway.kept_responses import Kept, KeptResponses
from molink_gateway.opening import Asked, Opened, Openings
from molink_gateway.preparation import Prepared
from molink_gateway.responses_items import Item, numbered
from molink_gateway.responses_reply import ResponseHead, ResponseReply, ResponseScript, ResponseTeller
from molink_gateway.responses_request import ResponsesRequest, chat_body, parse_responses, retold
from molink_gateway.run import Run
from molink_gateway.scripts import Script


class ResponseOpenings:
    """Openings of ``POST /v1/responses``."""

    def __init__(self, openings: Openings, kept: KeptResponses) -> None:
        self._openings = openings
        self._kept = kept

    def response(self, asked: Asked) -> Opened:
        """A new response."""
        return self._openings.new(asked, self._prepare)

    async def _prepare(self, asked: Asked) -> Prepared:
        request, passed_on = parse_responses(asked.body)
        stem = secrets.token_hex(16)
        context = [*await self._before(request, asked.record), *numbered(request.input, stem)]
        try:
            chat = await self._openings.prepare_chat(replace(asked, body=chat_body(request, passed_on, context)))
        except ApiError as error:
            raise retold(error) from error
        teller = ResponseTeller(
            ResponseHead(stem=stem, created_s=int(time.time()), request=request), lambda: int(time.time())
        )

        def make_script(prepared: Prepared, run: Run) -> Script:
            return ResponseScript(teller, chat.reply, run.usage)

        async def keep() -> None:
            if request.is_kept:
                await self._kept.keep(asked.record.tenant, Kept(response=teller.response, context=context))

        return replace(chat, reply=ResponseReply(teller, chat.reply), make_script=make_script, before_end=keep)

    async def _before(self, request: ResponsesRequest, record: RequestRecord) -> list[Item]:
        if request.previous_response_id is None:
            return []
        kept = await self._kept.fetch(record.tenant, request.previous_response_id, param="previous_response_id")
        return kept.conversation()
