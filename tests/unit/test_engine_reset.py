"""An engine that has served is as good as a new one after a reset, whatever the number of its KV blocks by then."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from molink_common.errors import ProtocolError
from molink_common.wire import Entry, Logits
from molink_stage_worker.engine.interface import Engine
from molink_stage_worker.engine.loading import load_engine
from tests.architectures.staggered_run import tiny_spec
from tests.architectures.tiny_models import NUM_LAYERS, make_tiny_model


def entry(start: int, count: int, *blocks: int) -> Entry:
    opens = start == 0
    return Entry(sequence=1, start=start, count=count, opens=opens, logits=Logits.LAST, new_blocks=blocks)


def say(engine: Engine, *blocks: int) -> torch.Tensor:
    logits_RV = engine.run([entry(0, 5, *blocks)], (), token_ids=[3, 4, 5, 6, 7]).logits_RV
    assert logits_RV is not None
    return logits_RV.clone()


@pytest.mark.parametrize("family", ["llama", "stablelm"])
def test_a_reset_engine_knows_no_sequence_and_says_the_same(family: str, tmp_path: Path) -> None:
    make_tiny_model(family, tmp_path)
    spec = tiny_spec(tmp_path, 0, NUM_LAYERS, NUM_LAYERS)
    engine = load_engine(spec)
    first = say(engine, *range(5))
    engine.reset(num_blocks=100, block_size=2)
    with pytest.raises(ProtocolError, match="not known here"):
        engine.run([entry(5, 1)], (), token_ids=[8])
    assert torch.equal(say(engine, 97, 98, 99), first)
    engine.reset(num_blocks=3, block_size=2)
    with pytest.raises(ProtocolError, match="KV block 3 of 3"):
        say(engine, 1, 2, 3)
    assert torch.equal(say(engine, 0, 1, 2), first)


def test_a_dropped_engine_gives_its_memory_back_at_once(tmp_path: Path) -> None:
    """Without waiting for the collector of cycles, whose run stops every thread for a fifth of a second."""
    make_tiny_model("llama", tmp_path)
    engine = load_engine(tiny_spec(tmp_path, 0, NUM_LAYERS, NUM_LAYERS))
    say(engine, *range(5))
    seen = weakref.ref(engine)
    del engine
    assert seen() is None
