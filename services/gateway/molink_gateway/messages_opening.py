"""How an answer in Anthropic's shape begins: as a chat."""

from __future__ import annotations

import secrets
from dataclasses import replace

from molink_gateway.messages_reply import MessageReply, MessageScript, MessageTeller
from molink_gateway.messages_request import chat_body, parse_count, parse_messages
from molink_gateway.opening import Asked, Opened, Openings
from molink_gateway.preparation import Prepared
from molink_gateway.run import Run
from molink_gateway.scripts import Script


class MessageOpenings:
    """Openings of ``POST /v1/messages``."""

    def __init__(self, openings: Openings) -> None:
        self._openings = openings

    def message(self, asked: Asked) -> Opened:
        """A new message."""
        return self._openings.new(asked, self._prepare)

    async def count(self, asked: Asked) -> int:
        """The prompt's tokens.

        Raises:
            ApiError: it cannot be answered.
        """
        chat = await self._openings.prepare_chat(replace(asked, body=chat_body(parse_count(asked.body))))
        return chat.num_prompt_tokens

    async def _prepare(self, asked: Asked) -> Prepared:
        request = parse_messages(asked.body)
        chat = await self._openings.prepare_chat(replace(asked, body=chat_body(request)))
        teller = MessageTeller("msg_" + secrets.token_hex(12), request.model, lambda: chat.choices[0].met)

        def make_script(prepared: Prepared, run: Run) -> Script:
            return MessageScript(teller, chat.reply, run.usage)

        return replace(chat, reply=MessageReply(teller, chat.reply), make_script=make_script)
