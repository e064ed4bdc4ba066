"""The timed worker as a process: a real worker that says it has the synthetic 70B, and serves stages of it."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import sys
from pathlib import Path

import pytest

from bench.cost_curve import CostCurve
from bench.timed_stage import FIRST_LETTER, HIDDEN_SIZE, NUM_LAYERS, NUM_LETTERS, load_timed, synthetic_card
from molink.embedded import EmbeddedServer
from molink_common import messages, subjects
from molink_common.bus import Incoming, NatsBus
from molink_common.messages import FetchFile, FileChunk, Heartbeat
from tests.architectures.tiny_models import make_tiny_model
from tests.integration.counting_engine import CARD, CountingModel
from tests.integration.worker_pool import open_pool

TOKENIZER = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}


async def test_it_offers_the_synthetic_model_with_a_real_ones_tokenizer(
    bus: NatsBus, nats_server: EmbeddedServer, tmp_path: Path
) -> None:
    make_tiny_model("llama", tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    beats: asyncio.Queue[Heartbeat] = asyncio.Queue()

    async def listen(incoming: Incoming) -> None:
        beats.put_nowait(messages.decode(incoming.data, Heartbeat))

    subscription = await bus.subscribe(subjects.heartbeat("timed"), listen)
    flags = ["--nats-url", nats_server.url, "--worker-id", "timed", "--device", "cpu", "--memory", "100GiB"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.timed_worker", "--layer-token-us", "20", *flags, "--model", str(tmp_path)),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            while (card := (await beats.get()).card) is None:
                pass
            assert (card.name, card.num_layers, card.hidden_size) == ("synthetic-70b", NUM_LAYERS, HIDDEN_SIZE)
            fetch = FetchFile(name="tokenizer.json", offset_bytes=0, size_bytes=4096)
            answer = await bus.ask(subjects.files("timed"), fetch, FileChunk, timeout_s=5)
            assert json.loads(answer.data) == TOKENIZER
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
            assert process.stderr is not None
            assert b"Traceback" not in await process.stderr.read()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await subscription.close()


@pytest.mark.parametrize("num_stages", [1, 3])
async def test_stages_of_it_give_letters_through_real_frames(
    bus: NatsBus, nats_server: EmbeddedServer, num_stages: int
) -> None:
    model = CountingModel(card=synthetic_card(CARD.model_copy(update={"vocabulary_size": 200})))
    quick = CostCurve(layer_read_s=1e-6, layer_token_s=1e-6, layer_context_s=0.0, overhead_s=0.0)
    async with (
        open_pool(
            bus,
            nats_server.url,
            7_000_000 + num_stages,
            model,
            lambda spec, progress: load_timed(spec, quick, progress),
            block_size=16,
        ) as pool,
        pool.workers(num_stages) as names,
    ):
        await pool.form(names)
        sequences = [await pool.start(names[0], [5] * (10 + 30 * number), 6) for number in range(4)]
        await pool.until(lambda: all(sequence in pool.finishes for sequence in sequences))
        for sequence in sequences:
            tokens = pool.tokens[sequence]
            assert len(tokens) == 6
            # a step further is eleven letters further: none was lost or came twice
            assert {(after - before) % NUM_LETTERS for before, after in itertools.pairwise(tokens)} == {11}
            assert all(FIRST_LETTER <= token < FIRST_LETTER + NUM_LETTERS for token in tokens)
        await pool.until_idle(names[0])
