"""Whatever the mixture of sequences, a compiled layer gives what the same layer in torch's own calls gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from molink_stage_worker.engine import compiled_layers, kernels
from molink_stage_worker.engine.attention import PagedStep
from molink_stage_worker.engine.block_tables import Placement, Span
from molink_stage_worker.engine.compiled_layers import CompiledLayer, CompiledRotation
from molink_stage_worker.engine.kv_store import KvStore
from molink_stage_worker.engine.lean_layers import LeanLayer, Rotation
from molink_stage_worker.engine.step_plan import StepPlan
from tests.property.spans import BLOCK_SIZE, histories, placed

TINY = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 32,
    "attn_implementation": "eager",
}


def make_pair(family: str) -> tuple[Any, LeanLayer, CompiledLayer]:
    """The rotary embedding of a tiny random model, and its layer twice."""
    torch.manual_seed(5)
    model: Any = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY)),
        "windowed": lambda: MistralForCausalLM(MistralConfig(**TINY, sliding_window=6)),
        "normed heads": lambda: Qwen3ForCausalLM(Qwen3Config(**TINY)),
    }[family]()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    model.requires_grad_(False)
    layer = model.model.layers[0]
    return model.model.rotary_emb, LeanLayer(layer, Rotation()), CompiledLayer(layer, CompiledRotation())


PAIRS = {family: make_pair(family) for family in ("llama", "windowed", "normed heads")}


@pytest.fixture(params=[False, True], ids=["one thread", "many keys for several threads"])
def shares_work(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        monkeypatch.setattr(compiled_layers, "_KEYS_FOR_ONE_THREAD", 30)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return bool(request.param)


@pytest.mark.usefixtures("shares_work")
@pytest.mark.parametrize("family", PAIRS)
def test_both_kinds_of_layer_agree(family: str) -> None:
    assert kernels.compile_for(torch.float32)
    rotary, *layers = PAIRS[family]

    @settings(max_examples=40, deadline=None)
    @given(sizes=histories(), seed=st.integers(0, 1000))
    def agree(sizes: list[tuple[int, int]], seed: int) -> None:
        spans, num_blocks = placed(sizes, seed)
        generator = torch.Generator().manual_seed(seed)
        pasts = [torch.randn(span.start, TINY["hidden_size"], generator=generator) for span in spans]
        now = torch.randn(sum(span.count for span in spans), TINY["hidden_size"], generator=generator)
        outputs = []
        for layer in layers:
            store = KvStore(num_blocks, BLOCK_SIZE)
            for span, past in zip(spans, pasts, strict=True):
                if span.start:
                    run(layer, rotary, store, [Span(0, 0, span.start, span.blocks)], past)
            outputs.append(run(layer, rotary, store, spans, now))
        torch.testing.assert_close(outputs[1], outputs[0], atol=2e-4, rtol=2e-4)

    agree()


@torch.inference_mode()
def run(layer: LeanLayer, rotary: Any, store: KvStore, spans: list[Span], hidden_TH: torch.Tensor) -> torch.Tensor:
    new_blocks = tuple(block for span in spans if span.start == 0 for block in span.blocks.tolist())
    plan = StepPlan(
        Placement(tuple(spans), new_blocks), block_size=BLOCK_SIZE, device=torch.device("cpu"), dtype=torch.float32
    )
    angles = rotary(hidden_TH[None], plan.positions_1T)
    return layer(hidden_TH[None].clone(), paged=PagedStep(store, plan), position_embeddings=angles)[0]  # type: ignore[no-any-return]
