"""Loads in the same process do not disturb each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from molink_common.messages import Dtype
from molink_stage_worker.engine.interface import Engine, StageSpec
from molink_stage_worker.engine.loading import load_engine

NUM_LAYERS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("bloom")
    model = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=NUM_LAYERS, n_head=4, vocab_size=64))
    model.save_pretrained(folder)
    return folder


def test_stages_that_load_at_once_all_load(checkpoint: Path) -> None:
    def load(layer: int) -> Engine:
        return load_engine(
            StageSpec(
                checkpoint=checkpoint,
                first_layer=layer,
                last_layer=layer + 1,
                num_layers=NUM_LAYERS,
                dtype=Dtype.FLOAT32,
                device="cpu",
                num_blocks=4,
                block_size=4,
            )
        )

    with ThreadPoolExecutor(4) as threads:
        engines = list(threads.map(load, [0, 1, 2, 3] * 4))
    assert {engine.hidden_size for engine in engines} == {32}
