"""`molink chat`: a terminal chat against any OpenAI-compatible endpoint."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import typer

from molink.openai_stream import ApiError, Delta, Finished, read_event, response_error
from molink_common.errors import MolinkError

_CONNECT_TIMEOUT_S = 5.0
_SILENCE_TIMEOUT_S = 120.0
_HELP = "/quit ends, /reset forgets the conversation, Ctrl-C stops an answer"

Turn = dict[str, str]


class Conversation:
    """The turns so far and what every request carries beside them."""

    def __init__(self, *, model: str, system: str | None, options: dict[str, Any]) -> None:
        self._model = model
        self._system = system
        self._options = {name: value for name, value in options.items() if value is not None}
        self._turns: list[Turn] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self._turns = [{"role": "system", "content": self._system}] if self._system else []

    def ask(self, text: str) -> dict[str, Any]:
        """The request that asks `text` next."""
        self._turns.append({"role": "user", "content": text})
        return {"model": self._model, "messages": list(self._turns), "stream": True, **self._options}

    def answered(self, text: str) -> None:
        """Keep an answer, also one that was stopped; without any text the question is taken back."""
        if text:
            self._turns.append({"role": "assistant", "content": text})
        else:
            self._turns.pop()


def chat(
    url: Annotated[str, typer.Option(help="Base URL of the endpoint.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str | None, typer.Option(help="Model to ask. Default: the first that the endpoint lists.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar=["MOLINK_API_KEY", "OPENAI_API_KEY"], help="Key for the endpoint.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
) -> None:
    """Chat with a model in the terminal. /quit ends, /reset forgets, Ctrl-C stops an answer."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(_SILENCE_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
    options = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    with httpx.Client(base_url=url.rstrip("/") + "/", headers=headers, timeout=timeout) as client:
        try:
            conversation = Conversation(model=model or first_model(client), system=system, options=options)
            talk(client, conversation, is_terminal=sys.stdin.isatty())
        except httpx.TransportError as error:
            raise MolinkError(f"no answer from {url}: {error or type(error).__name__}") from error
        except httpx.InvalidURL as error:
            raise MolinkError(f"--url {url}: {error}") from error


def first_model(client: httpx.Client) -> str:
    """The first model that the endpoint lists.

    Raises:
        ApiError: it lists none, or answers with an error.
    """
    answer = client.get("models")
    if answer.status_code != httpx.codes.OK:
        raise response_error(answer.status_code, answer.content)
    try:
        return str(answer.json()["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ApiError("the endpoint lists no model; give --model") from error


def talk(client: httpx.Client, conversation: Conversation, *, is_terminal: bool) -> None:
    """Read questions from standard input until it ends or says /quit.

    Raises:
        ApiError: the endpoint refused, and nobody is at a terminal to read it and go on.
    """
    if is_terminal:
        print(_HELP)
    for question in _questions(is_terminal=is_terminal):
        if question == "/quit":
            return
        if question == "/reset":
            conversation.reset()
            continue
        try:
            conversation.answered(_print_answer(client, conversation.ask(question)))
        except ApiError as error:
            if not is_terminal:
                raise
            conversation.answered("")
            print(f"error: {error}", file=sys.stderr)


def _questions(*, is_terminal: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> " if is_terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            return
        if line.strip():
            yield line.strip()


def _print_answer(client: httpx.Client, request: dict[str, Any]) -> str:
    """Print the answer as it comes; gives what came until it ended or was stopped."""
    pieces: list[str] = []
    try:
        with client.stream("POST", "chat/completions", json=request) as answer:
            if answer.status_code != httpx.codes.OK:
                raise response_error(answer.status_code, answer.read())
            for line in answer.iter_lines():
                event = read_event(line)
                if isinstance(event, Delta):
                    pieces.append(event.text)
                    print(event.text, end="", flush=True)
                elif isinstance(event, Finished) and event.reason == "length":
                    print(" …", end="")
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    print(flush=True)
    return "".join(pieces)
