"""The first question to a system that has just come up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from molink.openai_stream import ApiError, Delta, read_event, response_error

QUESTION = "Name the capital of France."
OPENING = "The capital of France is"
NO_CHAT_TEMPLATE = "no_chat_template"
"""The gateway's error code for a model that cannot chat."""
NEEDS_KEY = "invalid_api_key"
"""The gateway's error code for a request without an API key."""
_MAX_TOKENS = 32
_SILENCE_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, and how fast."""

    text: str
    pieces: int
    first_piece_s: float
    whole_s: float
    is_chat: bool

    @property
    def pieces_per_s(self) -> float:
        """After the first one; 0 if there was only one."""
        rest_s = self.whole_s - self.first_piece_s
        return (self.pieces - 1) / rest_s if rest_s > 0 else 0.0


async def ask_sample(url: str, model: str, show: Callable[[str], None]) -> Answer:
    """Ask `QUESTION`, greedily, and hand each piece of the answer to `show` as it comes.

    A base model has no chat template and cannot be asked; it gets `OPENING` to go on from.

    Raises:
        ApiError: the gateway answers with an error, with nothing, or not at all.
    """
    fixed = {"model": model, "temperature": 0, "max_tokens": _MAX_TOKENS, "stream": True}
    question = {**fixed, "messages": [{"role": "user", "content": QUESTION}]}
    try:
        return await _ask(f"{url}/v1/chat/completions", question, show, is_chat=True)
    except ApiError as error:
        if error.code != NO_CHAT_TEMPLATE:
            raise
    show(OPENING)
    return await _ask(f"{url}/v1/completions", {**fixed, "prompt": OPENING}, show, is_chat=False)


async def _ask(url: str, request: dict[str, object], show: Callable[[str], None], *, is_chat: bool) -> Answer:
    started_s = time.monotonic()
    pieces: list[str] = []
    first_piece_s = 0.0
    try:
        async with (
            httpx.AsyncClient(timeout=_SILENCE_TIMEOUT_S) as client,
            client.stream("POST", url, json=request) as response,
        ):
            if response.status_code != httpx.codes.OK:
                raise response_error(response.status_code, await response.aread())
            async for line in response.aiter_lines():
                event = read_event(line)
                if isinstance(event, Delta):
                    if not pieces:
                        first_piece_s = time.monotonic() - started_s
                    pieces.append(event.text)
                    show(event.text)
    except httpx.TransportError as error:
        raise ApiError(f"no answer from the gateway: {error or type(error).__name__}") from error
    if not pieces:
        raise ApiError("the gateway answered with an empty text")
    return Answer("".join(pieces), len(pieces), first_piece_s, time.monotonic() - started_s, is_chat)
