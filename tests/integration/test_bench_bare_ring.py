"""The bare ring on one host: what it counts is what has gone round."""

from __future__ import annotations

import socket
import threading

import pytest

from bench.bare_ring_end import Head, Line, load, tail
from bench.link_grid.cells import EngineKind

LEAST_STEP_S = 0.018


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.mark.parametrize("kind", list(EngineKind))
def test_streams_go_round_and_no_faster_than_the_stages_compute(
    kind: EngineKind, capfd: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    server = threading.Thread(target=tail, args=(load(kind, is_head=False), port))
    server.start()
    while "listening" not in capfd.readouterr().out:
        assert server.is_alive()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = Head(load(kind, is_head=True), Line(connection))
        found = head.run(streams=6, micro_batches=2, warm_s=0.2, seconds=1.0)
        again = head.run(streams=1, micro_batches=1, warm_s=0.0, seconds=0.5)
        connection.shutdown(socket.SHUT_RDWR)
    server.join(timeout=10)
    assert not server.is_alive()
    assert found["tokens_per_s"] > 0
    assert again["tokens_per_s"] > 0
    if kind is EngineKind.SYNTHETIC:
        assert found["tokens_per_s"] <= 6 / (2 * LEAST_STEP_S), "faster than two stages in turn"
        assert again["tokens_per_s"] <= 1 / (2 * LEAST_STEP_S)
