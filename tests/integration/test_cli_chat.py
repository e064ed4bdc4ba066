"""`molink chat` and `molink status` as processes against a small HTTP server."""

from __future__ import annotations

import http.server
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from molink.embedded import free_port
from molink_common.messages import ClusterState


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Answers a chat with how many messages it got, and one question without end."""

    requests: list[dict[str, object]]
    endless: threading.Event

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._answer(200, {"data": [{"id": "fake"}]})
        elif self.path == "/molink/status":
            self._answer(200, ClusterState(ready=False, reason="no worker is there").model_dump(mode="json"))
        else:
            self._answer(404, {"error": {"message": "no such page"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(body)
        last = body["messages"][-1]["content"]
        if last == "fail":
            self._answer(429, {"error": {"message": "too many requests"}})
            return
        self.send_response(200)
        self.end_headers()
        self._event({"choices": [{"delta": {"content": f"{len(body['messages'])} "}, "finish_reason": None}]})
        if last == "forever":
            # The signs of life matter: a signal just ahead of a blocking read is seen when the read ends.
            while not self.endless.wait(timeout=0.1):
                self.wfile.write(b": still here\n\n")
            return
        self._event({"choices": [{"delta": {"content": "messages"}, "finish_reason": None}]})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, body: object) -> None:
        self.wfile.write(b"data: " + json.dumps(body).encode() + b"\n\n")
        self.wfile.flush()

    def _answer(self, status: int, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def endpoint() -> Iterator[tuple[str, type[Endpoint]]]:
    class handler(Endpoint):
        requests: list[dict[str, object]] = []  # noqa: RUF012  a server makes one object a request
        endless = threading.Event()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        handler.endless.set()
        server.shutdown()
        thread.join()


def run_molink(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "molink", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=30, check=False)


def test_a_chat_through_a_pipe_keeps_the_conversation(endpoint: tuple[str, type[Endpoint]]) -> None:
    url, handler = endpoint
    flags = ("--url", f"{url}/v1", "--system", "be brief", "--temperature", "0.5")
    done = run_molink("chat", *flags, text="one\ntwo\n\n/reset\nthree\n/quit\nfour\n")
    assert done.stdout.splitlines() == ["2 messages", "4 messages", "2 messages"]
    assert done.returncode == 0, done.stderr
    first = handler.requests[0]
    assert first["model"] == "fake"
    assert first["temperature"] == 0.5
    assert "seed" not in first


def test_an_error_ends_a_chat_through_a_pipe(endpoint: tuple[str, type[Endpoint]]) -> None:
    done = run_molink("chat", "--url", f"{endpoint[0]}/v1", text="fail\nnext\n")
    assert done.returncode == 1
    assert done.stderr == "molink: too many requests (HTTP 429)\n"


def test_ctrl_c_stops_an_answer_and_not_the_chat(endpoint: tuple[str, type[Endpoint]]) -> None:
    url, handler = endpoint
    command = [sys.executable, "-m", "molink", "chat", "--url", f"{url}/v1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("forever\n")
        process.stdin.flush()
        assert process.stdout.read(2) == "1 "
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == " (stopped)\n"
        out, _ = process.communicate("again\n", timeout=20)
    assert out == "3 messages\n"
    assert handler.requests[-1]["messages"][1] == {"role": "assistant", "content": "1 "}  # type: ignore[index]


def test_nothing_at_the_address_is_one_clear_line() -> None:
    address = f"http://127.0.0.1:{free_port()}"
    for arguments in (("chat", "--url", f"{address}/v1"), ("status", "--gateway", address)):
        done = run_molink(*arguments)
        assert done.returncode == 1
        assert address in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_status_in_both_forms(endpoint: tuple[str, type[Endpoint]]) -> None:
    shown = run_molink("status", "--gateway", endpoint[0])
    assert "not ready: no worker is there" in shown.stdout
    as_json = run_molink("status", "--gateway", endpoint[0], "--json")
    assert json.loads(as_json.stdout)["reason"] == "no worker is there"


@pytest.mark.parametrize("server", ["nats", "redis"])
def test_up_wants_the_servers_that_it_is_given_to_answer(server: str) -> None:
    port, up_port = free_port(), free_port()
    done = run_molink("up", "--port", str(up_port), f"--{server}", f"{server}://user:secret@127.0.0.1:{port}")
    assert done.returncode == 1
    assert f"--{server} 127.0.0.1:{port}" in done.stderr
    assert "secret" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_version_and_unknown_commands() -> None:
    assert run_molink("--version").stdout.startswith("molink 0.")
    assert run_molink("serve").returncode == 2
