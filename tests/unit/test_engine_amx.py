"""Small steps on AMX tiles compute what torch computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import linear, silu
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from molink_common.wire import Entry
from molink_stage_worker.engine import amx_layers, amx_tiles, lean_model
from molink_stage_worker.engine.amx_products import Then, multiply
from molink_stage_worker.engine.attention import ATTENTION_NAME, PagedStep
from molink_stage_worker.engine.block_tables import BlockTables
from molink_stage_worker.engine.kv_store import KvStore
from molink_stage_worker.engine.layer_stack import LayerStack
from molink_stage_worker.engine.lean_model import make_lean
from molink_stage_worker.engine.projections import PackedProjection
from molink_stage_worker.engine.step_plan import StepPlan

needs_tiles = pytest.mark.skipif(not amx_tiles.are_here(), reason="this processor has no AMX tiles")
NO_BIAS = np.empty(0, np.float32)


def bits(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().view(torch.uint16).numpy().reshape(-1)


def packed(weight_OI: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """oneDNN's tensor, which owns the memory, and its numbers."""
    tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, 16)
    return tensor, amx_tiles.memory_of(tensor, weight_OI)


@needs_tiles
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 32, 33, 63, 100])
@pytest.mark.parametrize(("outputs", "inputs"), [(32, 32), (96, 64), (160, 96)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("then", list(Then))
def test_a_product_and_what_follows(rows: int, outputs: int, inputs: int, with_bias: bool, then: Then) -> None:
    torch.manual_seed(rows + outputs)
    weight, x = torch.randn(outputs, inputs).bfloat16(), torch.randn(rows, inputs).bfloat16()
    other, out = torch.randn(rows, outputs).bfloat16(), torch.full((rows, outputs), torch.nan).bfloat16()
    bias = torch.randn(outputs) if with_bias else None
    _owner, numbers = packed(weight)
    multiply(
        amx_tiles.configuration(min(rows, amx_tiles.ROWS)), bits(x), numbers, NO_BIAS if bias is None else bias.numpy(),
        int(then), bits(other), (written := bits(out)), rows, inputs, outputs,
    )  # fmt: skip
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    exact = {
        Then.NOTHING: exact, Then.SILU: silu(exact), Then.TIMES: exact * other.double(),
        Then.PLUS: exact + other.double(),
    }[then]  # fmt: skip
    found = torch.from_numpy(written).view(torch.bfloat16).reshape(rows, outputs)
    # rounded once: half a bit in eight, and float32's own noise near 0
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)


@needs_tiles
def test_a_token_does_not_depend_on_who_is_in_the_step() -> None:
    torch.manual_seed(1)
    projection = PackedProjection(torch.randn(96, 64).bfloat16(), None)
    x = torch.randn(70, 64).bfloat16()
    together = projection(x)
    assert all(torch.equal(together[t], projection(x[t : t + 1])[0]) for t in range(70))
    assert torch.equal(together[:20], projection(x[:20]))


@needs_tiles
def test_nan_stays_nan_and_infinity_infinity() -> None:
    x = torch.ones(2, 32).bfloat16()
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    found = PackedProjection(torch.ones(32, 32).bfloat16(), None)(x)
    assert found[0].isnan().all()
    assert found[1].isinf().all()


@needs_tiles
@pytest.mark.parametrize("shape", [(40, 32), (32, 40), (33, 32)])
def test_other_shapes_are_left_to_onednn(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).bfloat16()
    projection = PackedProjection(weight, None)
    assert projection.in_tiles is None
    x = torch.randn(3, shape[1]).bfloat16()
    torch.testing.assert_close(projection(x), linear(x, weight), rtol=2e-2, atol=2e-2)


@needs_tiles
def test_weights_that_lie_otherwise_are_left_to_onednn() -> None:
    weight = torch.randn(64, 64).bfloat16()
    tensor, _numbers = packed(weight)
    assert amx_tiles.memory_of(tensor, weight.flip(0)) is None


SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "head_dim": 16,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "qwen2, with a window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}


def hidden_after_steps(model: Any, steps: list[list[Entry]]) -> list[torch.Tensor]:
    """What the layers give for each of the steps, with a store of their own."""
    tables, store = BlockTables(num_blocks=64, block_size=4, context_length=None), KvStore(64, 4)
    found = []
    for entries in steps:
        plan = StepPlan(tables.apply(entries, ()), block_size=4, device=torch.device("cpu"), dtype=torch.bfloat16)
        ids = torch.tensor([[(7 * entry.start + 13 * i + entry.sequence) % 96 for entry in entries
                             for i in range(entry.count)]])  # fmt: skip
        with torch.inference_mode():
            answer = model.base_model(
                input_ids=ids, position_ids=plan.positions_1T, paged=PagedStep(store, plan), use_cache=False
            )
        found.append(answer.last_hidden_state[0])
    return found


@needs_tiles
@pytest.mark.parametrize("name", MODELS)
def test_a_stack_computes_what_its_layers_compute(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    blocks = {0: (0, 1, 2, 3), 1: (4, 5, 6, 7), 2: (20, 9, 30, 11)}
    steps = [
        [Entry(sequence=one, start=0, count=5, opens=True, new_blocks=blocks[one]) for one in blocks],
        [Entry(sequence=one, start=5, count=1) for one in blocks],
        [Entry(sequence=0, start=6, count=3), Entry(sequence=2, start=6, count=1)],
        [Entry(sequence=3, start=0, count=40, opens=True, new_blocks=tuple(range(40, 52)))],
        [Entry(sequence=3, start=40, count=1), Entry(sequence=1, start=6, count=1)],
    ]
    found = []
    for stacked in (True, False):
        torch.manual_seed(3)
        model = MODELS[name]().bfloat16().eval()
        model.set_attn_implementation(ATTENTION_NAME)
        with monkeypatch.context() as patch:
            if not stacked:
                patch.setattr(lean_model, "can_stack", lambda _layers: False)
            make_lean(model)
        assert isinstance(model.base_model.layers[0], LayerStack) is stacked
        found.append(hidden_after_steps(model, steps))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.03)


@needs_tiles
def test_no_step_compiles() -> None:
    """All is compiled when a model is loaded: what a step asks for has been there."""
    torch.manual_seed(3)
    model = MODELS["qwen3"]().bfloat16().eval()
    model.set_attn_implementation(ATTENTION_NAME)
    make_lean(model)
    loops = (amx_layers.layers, amx_layers.before_attention, amx_layers.after_attention, multiply)
    compiled = [list(loop.signatures) for loop in loops]
    entries = [Entry(sequence=0, start=0, count=20, opens=True, new_blocks=tuple(range(8)))]
    hidden = hidden_after_steps(model, [entries, [Entry(sequence=0, start=20, count=1)]])[-1]
    with torch.inference_mode():
        model.get_output_embeddings()(hidden)
    assert [list(loop.signatures) for loop in loops] == compiled
