"""The client, made as a user makes it."""

from __future__ import annotations

from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.clients.reporting import API_KEY, BASE_URL, TIMEOUT_S

client = OpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0, timeout=TIMEOUT_S)


def async_client() -> AsyncOpenAI:
    """One for each event loop."""
    return AsyncOpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0, timeout=TIMEOUT_S)


def user(text: str) -> list[ChatCompletionMessageParam]:
    """A conversation of one turn."""
    return [{"role": "user", "content": text}]
