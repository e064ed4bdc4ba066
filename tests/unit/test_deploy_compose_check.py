"""The check of the containers fails when it should: a stream must end with [DONE] and without an error."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from pathlib import Path

import pytest

_DEPLOY = str(Path(__file__).resolve().parents[2] / "deploy")
sys.path.insert(0, _DEPLOY)
tools = import_module("compose_tools")
sys.path.remove(_DEPLOY)

PIECE = 'data: {"choices": [{"delta": {"content": "Paris"}}]}\n\n'
ERROR = 'data: {"error": {"message": "a worker was lost"}}\n\n'
DONE = "data: [DONE]\n\n"


@contextmanager
def gateway_that_says(body: str, status: int = 200) -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_stream_is_given_in_pieces() -> None:
    with gateway_that_says(PIECE + PIECE + DONE) as url:
        assert list(tools.stream_chat(url, "?", max_tokens=2)) == ["Paris", "Paris"]


@pytest.mark.parametrize(
    ("body", "problem"),
    [(PIECE, "without .DONE."), (PIECE + ERROR + DONE, "a worker was lost"), ("", "without .DONE.")],
)
def test_a_stream_that_does_not_end_properly_fails(body: str, problem: str) -> None:
    with gateway_that_says(body) as url, pytest.raises(tools.CheckFailed, match=problem):
        list(tools.stream_chat(url, "?", max_tokens=2))


def test_a_refusal_fails_with_its_words() -> None:
    with gateway_that_says("no pipeline", status=503) as url, pytest.raises(tools.CheckFailed, match="no pipeline"):
        list(tools.stream_chat(url, "?", max_tokens=2))


def test_waiting_ends() -> None:
    with pytest.raises(tools.CheckFailed, match="a miracle: not within 0 s"):
        tools.until("a miracle", lambda: None, 0.0)


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(tools.CheckFailed, match="ended with 3: oh dear"):
        tools.run(["sh", "-c", "echo oh dear >&2; exit 3"], timeout_s=10)


def test_another_city_fails() -> None:
    with pytest.raises(tools.CheckFailed, match="Lyon"):
        tools.expect_paris("It is Lyon.")
