"""A pass without transformers' frame gives what the model's own forward gives, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from molink_common.messages import Dtype
from molink_common.wire import Entry, Logits
from molink_stage_worker.engine import bf16_unit, packed
from molink_stage_worker.engine.interface import Engine, StageSpec
from molink_stage_worker.engine.loading import load_engine
from molink_stage_worker.engine.packed import PackedEngine

pytestmark = pytest.mark.skipif(not bf16_unit.is_here(), reason="this processor has nothing for bfloat16")

NUM_LAYERS = 4
BLOCK_SIZE = 16
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "head_dim": 32, "max_position_embeddings": 4096,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama, yarn": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=YARN)),
    "qwen2, with a window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "smollm3, some layers turn nothing": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SIZES)),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def stages_of(model: Any, folder: Path) -> list[Engine]:
    """A head, a stage in the middle, a tail."""
    model.bfloat16().save_pretrained(folder)
    return [
        load_engine(
            StageSpec(
                checkpoint=folder, first_layer=first, last_layer=last, num_layers=NUM_LAYERS, dtype=Dtype.BFLOAT16,
                device="cpu", num_blocks=200, block_size=BLOCK_SIZE,
            )
        )
        for first, last in ((0, 1), (1, 3), (3, NUM_LAYERS))
    ]  # fmt: skip


def logits_after(stages: list[Engine], steps: list[list[Entry]]) -> list[torch.Tensor]:
    found = []
    for entries in steps:
        ids = [(7 * at + 13 * one.sequence) % 128 for one in entries for at in range(one.start, one.start + one.count)]
        output = stages[0].run(entries, (), token_ids=ids)
        for stage in stages[1:]:
            output = stage.run(entries, (), hidden=output.hidden)
        assert output.logits_RV is not None
        found.append(output.logits_RV)
    return found


def long_prompt(sequence: int, *chunks: int) -> list[list[Entry]]:
    """Steps of chunks; only the last one gives a token."""
    total = sum(chunks)
    blocks = tuple(range(100, 101 + total // BLOCK_SIZE))
    steps, start = [], 0
    for count in chunks:
        wants = Logits.LAST if start + count == total else Logits.NONE
        steps.append([
            Entry(sequence=sequence, start=start, count=count, opens=not start, logits=wants,
                  new_blocks=blocks if not start else ()),
        ])  # fmt: skip
        start += count
    return steps


@pytest.mark.parametrize("name", MODELS)
def test_what_the_model_gives(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    model = MODELS[name]()
    steps = [
        [Entry(sequence=one, start=0, count=5, opens=True, logits=Logits.LAST, new_blocks=(one,)) for one in (0, 1)],
        [Entry(sequence=one, start=5, count=1, logits=Logits.LAST) for one in (0, 1)],
        [Entry(sequence=0, start=6, count=3, logits=Logits.ALL), Entry(sequence=1, start=6, count=1)],
        # too many for one call; then past the positions that are kept at first
        *long_prompt(2, 300, 200, 250, 250, 250, 3),
    ]
    shortened = stages_of(model, tmp_path)
    monkeypatch.setattr(packed, "can_shorten", lambda _model: False)
    whole = stages_of(model, tmp_path)
    for engines, are in ((shortened, True), (whole, False)):
        assert all(isinstance(one, PackedEngine) and (one._short is not None) is are for one in engines)
    for ours, theirs in zip(logits_after(shortened, steps), logits_after(whole, steps), strict=True):
        assert torch.equal(ours, theirs)


def test_angles_that_depend_on_the_length_are_left_to_the_model(tmp_path: Path) -> None:
    stages = stages_of(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=DYNAMIC)), tmp_path)
    assert all(isinstance(one, PackedEngine) and one._short is None for one in stages)
