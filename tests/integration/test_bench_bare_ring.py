"""The bare ring on one host: what it counts is what has gone round."""

from __future__ import annotations

import socket
import threading

import pytest

from bench.bare_ring_end import Head, Line, load, tail
from bench.link_grid.cells import EngineKind

LEAST_STEP_S = 0.018


@pytest.mark.parametrize("kind", list(EngineKind))
def test_streams_go_round_and_no_faster_than_the_stages_compute(kind: EngineKind) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=tail, args=(load(kind, is_head=False), listener))
        server.start()
        with Line(socket.create_connection(listener.getsockname())) as line:
            head = Head(load(kind, is_head=True), line)
            found = head.run(streams=6, micro_batches=2, warm_s=0.2, seconds=1.0)
            again = head.run(streams=1, micro_batches=1, warm_s=0.0, seconds=0.5)
        server.join(timeout=10)
    assert not server.is_alive()
    assert found["tokens_per_s"] > 0
    assert again["tokens_per_s"] > 0
    if kind is EngineKind.SYNTHETIC:
        assert found["tokens_per_s"] <= 6 / (2 * LEAST_STEP_S), "faster than two stages in turn"
        assert again["tokens_per_s"] <= 1 / (2 * LEAST_STEP_S)
