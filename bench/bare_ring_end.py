"""One end of a bare ring (see `bare_ring`). It runs on a host of a laboratory.

    bare_ring_end.py tail ENGINE PORT
    bare_ring_end.py head ENGINE PORT ADDRESS WARM_S SECONDS STREAMS:MICRO_BATCHES,…

The tail prints ``listening``; the head prints a JSON object for each case.

A message is two sizes, a JSON text and hidden states as bytes. Both ends compute in their main thread; a thread sends
and a thread receives, so that a step is on its way while the next one is computed.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from bench.cost_curve import CostCurve
from bench.link_grid.cells import EngineKind
from bench.link_grid.steady_load import LoadShape
from bench.timed_stage import NUM_LAYERS, load_timed
from molink_common.folders import cache_folder
from molink_common.memory import begin_again_with_memory_environment, spare_what_lives
from molink_common.messages import Dtype
from molink_common.wire import Entry, Logits
from molink_stage_worker.engine.interface import Engine, StageSpec
from molink_stage_worker.engine.loading import load_engine
from molink_stage_worker.models import prepare

_SHAPE = LoadShape(streams=1)
_PROMPT_TOKENS, _ANSWER_TOKENS = _SHAPE.prompt_tokens, _SHAPE.answer_tokens
_BLOCK_SIZE = 16
_BLOCKS_EACH = -(-(_PROMPT_TOKENS + _ANSWER_TOKENS) // _BLOCK_SIZE)
_MOST_STREAMS = 128
_SIZES = struct.Struct("<II")
_LISTEN_S = 60.0

Message = tuple[Any, bytearray]


class Line:
    """A connection that neither sending nor receiving blocks. Leaving it closes the connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)
        self._connection = connection
        self._outgoing: queue.SimpleQueue[tuple[bytes, bytes] | None] = queue.SimpleQueue()
        self.incoming: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        """None: the other end has gone."""
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._send, self._receive)]

    def __enter__(self) -> Line:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._outgoing.put(None)
        with contextlib.suppress(OSError):  # the other end was first
            self._connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._connection.close()

    def send(self, said: Any, hidden: memoryview | bytes = b"") -> None:
        """`hidden` may be used again at once."""
        self._outgoing.put((json.dumps(said).encode(), bytes(hidden)))

    def _send(self) -> None:
        with contextlib.suppress(OSError):  # the other end has gone: receiving says so
            while (message := self._outgoing.get()) is not None:
                said, hidden = message
                self._connection.sendall(_SIZES.pack(len(said), len(hidden)) + said)
                self._connection.sendall(hidden)

    def _receive(self) -> None:
        while (sizes := self._read(_SIZES.size)) is not None:
            said_bytes, hidden_bytes = _SIZES.unpack(sizes)
            said, hidden = self._read(said_bytes), self._read(hidden_bytes)
            if said is None or hidden is None:
                break
            self.incoming.put((json.loads(said), hidden))
        self.incoming.put(None)

    def _read(self, size: int) -> bytearray | None:
        data = bytearray(size)
        rest = memoryview(data)
        while rest:
            try:
                read = self._connection.recv_into(rest)
            except OSError:
                read = 0
            if not read:
                return None
            rest = rest[read:]
        return data


def load(kind: EngineKind, *, is_head: bool) -> Engine:
    """One half of the model."""
    if kind is EngineKind.SYNTHETIC:
        return load_timed(_spec(None, NUM_LAYERS, is_head), CostCurve(), lambda _: None)
    prepared = prepare("demo", cache=cache_folder(), progress=lambda *_: None)
    num_layers = prepared.card.num_layers
    return load_engine(_spec(prepared.checkpoint_for(0, num_layers), num_layers, is_head))


def _spec(checkpoint: Any, num_layers: int, is_head: bool) -> StageSpec:
    cut = num_layers // 2
    return StageSpec(
        checkpoint=checkpoint or cache_folder(), first_layer=0 if is_head else cut,
        last_layer=cut if is_head else num_layers, num_layers=num_layers, dtype=Dtype.BFLOAT16, device="cpu",
        num_blocks=_MOST_STREAMS * _BLOCKS_EACH, block_size=_BLOCK_SIZE,
    )  # fmt: skip


def tail(engine: Engine, listener: socket.socket) -> None:
    """Compute what the first who connects sends, until it goes."""
    listener.settimeout(_LISTEN_S)
    connection, _ = listener.accept()
    with Line(connection) as line:
        while (message := line.incoming.get()) is not None:
            (rows, closes), hidden = message
            found = engine.run([_entry(row) for row in rows], closes, hidden=memoryview(hidden))
            assert found.logits_RV is not None
            line.send(found.logits_RV.numpy().argmax(axis=1).tolist() if rows else [])


def _entry(row: Sequence[int]) -> Entry:
    slot, start, count = row
    blocks = range(slot * _BLOCKS_EACH, (slot + 1) * _BLOCKS_EACH) if start == 0 else ()
    return Entry(
        sequence=slot, start=start, count=count, opens=start == 0, logits=Logits.LAST, new_blocks=tuple(blocks)
    )


class Head:
    """Streams in slots: each asks for the next answer as soon as it has one. Micro-batches of slots go round."""

    def __init__(self, engine: Engine, line: Line) -> None:
        self._engine = engine
        self._line = line
        self._lengths: list[int] = []
        self._tokens: list[int] = []

    def run(self, streams: int, micro_batches: int, warm_s: float, seconds: float) -> dict[str, Any]:
        """Tokens a second over `seconds`."""
        self._lengths, self._tokens = [0] * streams, [0] * streams
        # as after a while: the first answers end one after the other
        ends = [_PROMPT_TOKENS + 1 + _ANSWER_TOKENS * slot // streams for slot in range(streams)]
        groups = [list(range(number, streams, micro_batches)) for number in range(micro_batches)]
        for group in groups:
            self._start(group)
        started_s = time.perf_counter()
        warmed = 0
        done = 0
        while (passed_s := time.perf_counter() - started_s) < warm_s + seconds:
            warmed = done if passed_s < warm_s else warmed
            group = groups.pop(0)
            done += self._finish(group, ends)
            self._start(group)
            groups.append(group)
        for group in groups:
            self._finish(group, ends)
        self._exchange([], list(range(streams)))
        return {
            "streams": streams,
            "micro_batches": micro_batches,
            "tokens_per_s": round((done - warmed) / (passed_s - warm_s), 1),
        }

    def _start(self, group: Sequence[int]) -> None:
        rows = []
        token_ids: list[int] = []
        for slot in group:
            start = self._lengths[slot]
            count = 1 if start else _PROMPT_TOKENS
            rows.append((slot, start, count))
            token_ids += [self._tokens[slot]] if start else range(100 + slot, 100 + slot + _PROMPT_TOKENS)
            self._lengths[slot] = start + count
        hidden = self._engine.run([_entry(row) for row in rows], (), token_ids=token_ids).hidden
        assert hidden is not None
        self._line.send((rows, ()), hidden)

    def _finish(self, group: Sequence[int], ends: list[int]) -> int:
        message = self._line.incoming.get()
        assert message is not None, "the tail has gone"
        for slot, token in zip(group, message[0], strict=True):
            self._tokens[slot] = token
            if self._lengths[slot] >= ends[slot]:
                self._lengths[slot], ends[slot] = 0, _PROMPT_TOKENS + _ANSWER_TOKENS - 1
        return len(group)

    def _exchange(self, rows: Sequence[Sequence[int]], closes: Sequence[int]) -> None:
        self._engine.run((), closes, token_ids=())
        self._line.send((rows, closes))
        self._line.incoming.get()


def _main() -> None:
    begin_again_with_memory_environment()
    torch.set_num_threads(1)
    role, kind, port, *words = sys.argv[1:]
    engine = load(EngineKind(kind), is_head=role == "head")
    spare_what_lives()
    if role == "tail":
        with socket.create_server(("0.0.0.0", int(port))) as listener:
            print("listening", flush=True)
            tail(engine, listener)
        return
    address, warm_s, seconds, cases = words
    with Line(socket.create_connection((address, int(port)), timeout=_LISTEN_S)) as line:
        head = Head(engine, line)
        for case in cases.split(","):
            streams, micro_batches = map(int, case.split(":"))
            print(json.dumps(head.run(streams, micro_batches, float(warm_s), float(seconds))), flush=True)


if __name__ == "__main__":
    _main()
