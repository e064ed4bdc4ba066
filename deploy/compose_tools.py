"""What the check of the containers is made with: commands, waiting from outside, a chat client."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

FOLDER = Path(__file__).resolve().parent
PROJECT = "molink-check"
ANSWER_TIMEOUT_S = 120.0
PROBE_PAUSE_S = 1.0

ASK_STATE = """
import asyncio, os
from molink_common import messages, subjects
from molink_common.bus import BusSettings, open_bus
async def main():
    async with open_bus(BusSettings(url=os.environ["MOLINK_NATS_URL"]), name="compose-check") as bus:
        state = await bus.ask(subjects.STATUS, messages.AskState(), messages.ClusterState, timeout_s=5)
        print(state.model_dump_json())
asyncio.run(main())
"""


class CheckFailed(Exception):
    """A step did not show what it should. The message says what was seen."""


class Compose:
    """`docker compose` on the check's own project."""

    def __init__(self) -> None:
        self._environment = {**os.environ, "GATEWAY_ADDRESS": "127.0.0.1:0", "JAEGER_ADDRESS": "127.0.0.1:0"}

    def __call__(self, *arguments: str, timeout_s: float = 300.0, check: bool = True) -> str:
        """Run one command; gives what it printed.

        Raises:
            CheckFailed: it ended with an error or not in time.
        """
        command = ["docker", "compose", "-p", PROJECT, "-f", str(FOLDER / "docker-compose.yml"), *arguments]
        return run(command, timeout_s=timeout_s, check=check, environment=self._environment)

    def containers(self, service: str) -> list[str]:
        """Ids of a service's running containers."""
        return self("ps", "-q", service).split()

    def address(self, service: str, port: int) -> str:
        """Where a port of a service is published on this machine."""
        return "http://" + self("port", service, str(port)).strip()

    def cluster_state(self) -> dict[str, Any]:
        """The scheduler's view of the pool."""
        state: dict[str, Any] = json.loads(self("exec", "-T", "scheduler", "python", "-c", ASK_STATE))
        return state


def run(command: list[str], *, timeout_s: float, check: bool = True, environment: dict[str, str] | None = None) -> str:
    """Output of a command; its error output becomes part of `CheckFailed`."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment)  # noqa: S603  our own commands
    except subprocess.TimeoutExpired as error:
        raise CheckFailed(f"{' '.join(command)} took longer than {timeout_s:g} s") from error
    if check and done.returncode != 0:
        raise CheckFailed(f"{' '.join(command)} ended with {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def until(what: str, probe: Callable[[], str | None], timeout_s: float) -> str:
    """Probe from outside until it gives an answer; what a person with curl would do."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = probe()
        if seen is not None:
            return seen
        if time.monotonic() > deadline:
            raise CheckFailed(f"{what}: not within {timeout_s:g} s")
        time.sleep(PROBE_PAUSE_S)


def get_json(url: str, timeout_s: float = 10.0) -> Any:
    """The JSON that a GET gives."""
    with urlopen(url, timeout=timeout_s) as answer:  # noqa: S310  http on this machine
        return json.load(answer)


def post_chat(gateway: str, content: str, *, stream: bool, max_tokens: int) -> Any:
    """An open answer of the gateway, greedy, so that equal requests have equal texts."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": stream,
    }
    request = Request(  # noqa: S310  http on this machine
        gateway + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        return urlopen(request, timeout=ANSWER_TIMEOUT_S)  # noqa: S310
    except HTTPError as error:
        raise CheckFailed(f"HTTP {error.code}: {error.read().decode(errors='replace')}") from error


def stream_chat(gateway: str, content: str, max_tokens: int) -> Iterator[str]:
    """The pieces of a streamed answer, as they come.

    Raises:
        CheckFailed: an error chunk, or the stream ended without its [DONE].
    """
    with post_chat(gateway, content, stream=True, max_tokens=max_tokens) as answer:
        for raw in answer:
            line = raw.decode().strip()
            if line == "data: [DONE]":
                return
            if line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise CheckFailed(f"the stream ended in an error: {chunk['error']['message']}")
                for choice in chunk["choices"]:
                    if choice["delta"].get("content"):
                        yield choice["delta"]["content"]
    raise CheckFailed("the stream ended without [DONE]")


def expect_paris(text: str) -> str:
    """The text, if it names the capital."""
    if "Paris" not in text:
        raise CheckFailed(f"expected Paris, got {text!r}")
    return text.strip()


def trace_seen(jaeger: str) -> str | None:
    """What the newest complete trace holds, or None when there is none yet."""
    try:
        traces = get_json(jaeger + "/api/traces?service=molink-gateway&limit=20")["data"] or []
    except (URLError, OSError):
        return None
    for trace in traces:
        names = [process["serviceName"] for process in trace["processes"].values()]
        if names.count("molink-stage-worker") >= 2:
            return f"{len(trace['spans'])} spans from {', '.join(sorted(names))}"
    return None
