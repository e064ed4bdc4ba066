"""Small steps in bfloat16 compute what torch computes, by whatever this processor has for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import linear, silu
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from molink_common.wire import Entry
from molink_stage_worker.engine import bf16_attention, bf16_layers, bf16_unit, kernels, lean_model
from molink_stage_worker.engine.attention import ATTENTION_NAME, PagedStep
from molink_stage_worker.engine.bf16_unit import BLOCK, multiply
from molink_stage_worker.engine.block_tables import BlockTables, Placement, Span
from molink_stage_worker.engine.kv_store import KvStore
from molink_stage_worker.engine.layer_stack import LayerStack
from molink_stage_worker.engine.lean_model import make_lean
from molink_stage_worker.engine.product_ends import Then
from molink_stage_worker.engine.projections import OneDnnProjection, PackedProjection, projection_of
from molink_stage_worker.engine.step_plan import StepPlan

needs_unit = pytest.mark.skipif(not bf16_unit.is_here(), reason="this processor has nothing for bfloat16")
NO_BIAS = np.empty(0, np.float32)


def bits(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().view(torch.uint16).numpy().reshape(-1)


def packed(weight_OI: torch.Tensor) -> PackedProjection:
    """A product by weights that the loops read."""
    projection = projection_of(weight_OI, None)
    assert isinstance(projection, PackedProjection)
    return projection


@needs_unit
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 32, 33, 63, 100])
@pytest.mark.parametrize(("outputs", "inputs"), [(BLOCK, 32), (3 * BLOCK, 64), (5 * BLOCK, 96)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("then", list(Then))
def test_a_product_and_what_follows(rows: int, outputs: int, inputs: int, with_bias: bool, then: Then) -> None:
    torch.manual_seed(rows + outputs)
    weight, x = torch.randn(outputs, inputs).bfloat16(), torch.randn(rows, inputs).bfloat16()
    other, out = torch.randn(rows, outputs).bfloat16(), torch.full((rows, outputs), torch.nan).bfloat16()
    bias = torch.randn(outputs) if with_bias else None
    projection = packed(weight)
    multiply(
        (np.zeros(16, np.int64), 1, 0), bf16_unit.configurations()[min(rows, bf16_unit.ROWS)], bits(x),
        projection.in_blocks, NO_BIAS if bias is None else bias.numpy(), int(then), bits(other), (written := bits(out)),
        rows, inputs, outputs,
    )  # fmt: skip
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    exact = {
        Then.NOTHING: exact, Then.SILU: silu(exact), Then.TIMES: exact * other.double(),
        Then.PLUS: exact + other.double(),
    }[then]  # fmt: skip
    found = torch.from_numpy(written).view(torch.bfloat16).reshape(rows, outputs)
    # rounded once: half a bit in eight, and float32's own noise near 0
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)


@needs_unit
def test_a_token_does_not_depend_on_who_is_in_the_step() -> None:
    torch.manual_seed(1)
    projection = packed(torch.randn(3 * BLOCK, 64).bfloat16())
    x = torch.randn(70, 64).bfloat16()
    together = projection(x)
    assert all(torch.equal(together[t], projection(x[t : t + 1])[0]) for t in range(70))
    assert torch.equal(together[:20], projection(x[:20]))


@needs_unit
def test_nan_stays_nan_and_infinity_infinity() -> None:
    x = torch.ones(2, 32).bfloat16()
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    found = packed(torch.ones(BLOCK, 32).bfloat16())(x)
    assert found[0].isnan().all()
    assert found[1].isinf().all()


@needs_unit
@pytest.mark.parametrize("shape", [(BLOCK + 8, 32), (BLOCK, 33), (BLOCK + 1, 32)])
def test_other_shapes_are_left_to_onednn(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).bfloat16()
    projection = packed(weight)
    assert isinstance(projection, OneDnnProjection)
    assert projection.in_blocks is None
    x = torch.randn(3, shape[1]).bfloat16()
    torch.testing.assert_close(projection(x), linear(x, weight), rtol=2e-2, atol=2e-2)


@needs_unit
def test_tiles_leave_weights_that_lie_otherwise_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16_unit, "_HAS_TILES", True)  # where there are none, oneDNN lays them out in the same way
    weight = torch.randn(64, 64).bfloat16()
    tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    assert bf16_unit.memory_of(tensor, weight) is not None
    assert bf16_unit.memory_of(tensor, weight.flip(0)) is None


class Step:
    """Some spans of random queries over random keys and values, in blocks that lie anywhere."""

    def __init__(self, spans: list[tuple[int, int]], *, key_heads: int, group: int, size: int, block_size: int) -> None:
        """`spans` are pairs of start and count."""
        tokens = sum(count for _, count in spans)
        lengths = [-(-(start + count) // block_size) for start, count in spans]
        places = torch.randperm(sum(lengths) + 3)
        placed: list[Span] = []
        for (start, count), length in zip(spans, lengths, strict=True):
            blocks, places = places[:length].numpy(), places[length:]
            placed.append(Span(sum(span.count for span in placed), start, count, blocks))
        self.spans, self.group, self.block_size = placed, group, block_size
        slots = (sum(lengths) + 3) * block_size
        self.keys_KSD, self.values_KSD = (torch.randn(key_heads, slots, size).bfloat16() for _ in "kv")
        self.rows_TW = torch.randn(tokens, (group + 2) * key_heads * size).bfloat16()

    def found(self, window: int, spans: list[Span] | None = None) -> torch.Tensor:
        """By the loops, of all spans or of these."""
        plan = StepPlan(
            Placement(tuple(self.spans if spans is None else spans), ()), block_size=self.block_size,
            device=torch.device("cpu"), dtype=torch.bfloat16,
        )  # fmt: skip
        reads = plan.span_reads()
        key_heads, _, size = self.keys_KSD.shape
        out_TQ = torch.full((len(self.rows_TW), self.group * key_heads * size), torch.nan).bfloat16()
        assert bf16_attention.is_ready()
        bf16_attention.attend(
            (np.zeros(16, np.int64), 1, 0), bf16_unit.configurations(), kernels.array_of(self.rows_TW),
            reads.firsts_B, reads.counts_B, reads.starts_B, reads.tables_B, reads.slots_N, window, 0.2,
            *self.stored(), kernels.array_of(out_TQ),
        )  # fmt: skip
        return out_TQ

    def stored(self) -> tuple[Any, Any]:
        """Keys and values as the loops store them: slot after slot."""
        key_heads, slots, size = self.keys_KSD.shape
        queries_SW = torch.zeros(slots, self.group * key_heads * size).bfloat16()
        keys_SW, values_SW = (part.transpose(0, 1).reshape(slots, -1) for part in (self.keys_KSD, self.values_KSD))
        rows_SW = kernels.array_of(torch.cat([queries_SW, keys_SW, values_SW], dim=1))
        places = np.random.default_rng(1).permutation(slots)
        keys, values = (np.zeros((key_heads, slots, size), np.uint16) for _ in "kv")
        bf16_attention.store(rows_SW[places].copy(), places, keys, values)
        return keys, values

    def exact(self, window: int) -> torch.Tensor:
        """One query after the other, in double precision."""
        key_heads, _, size = self.keys_KSD.shape
        heads_TND = self.rows_TW.double().view(len(self.rows_TW), -1, size)
        out_TND = torch.empty(len(self.rows_TW), key_heads * self.group, size).double()
        for span in self.spans:
            for i in range(span.count):
                positions = np.arange(max(span.start + i + 1 - window, 0), span.start + i + 1)
                slots = span.blocks[positions // self.block_size] * self.block_size + positions % self.block_size
                for head in range(key_heads * self.group):
                    scores = self.keys_KSD[head // self.group, slots].double() @ heads_TND[span.row + i, head] * 0.2
                    values = self.values_KSD[head // self.group, slots].double()
                    out_TND[span.row + i, head] = torch.softmax(scores, 0) @ values
        return out_TND.view(len(self.rows_TW), -1)


@needs_unit
@pytest.mark.parametrize("window", [kernels.SEES_ALL, 1, 15, 37, 64])
@pytest.mark.parametrize(
    ("key_heads", "group", "size", "block_size"), [(3, 3, 64, 16), (1, 8, 32, 32), (2, 1, 96, 16), (1, 16, 128, 48)]
)
def test_attention_is_attention(window: int, key_heads: int, group: int, size: int, block_size: int) -> None:
    torch.manual_seed(size + block_size)
    spans = [(0, 1), (50, 1), (0, 5), (70, 20), (31, 1), (16, 33), (127, 2), (0, 16), (300, 1)]
    step = Step(spans, key_heads=key_heads, group=group, size=size, block_size=block_size)
    torch.testing.assert_close(step.found(window).double(), step.exact(window), rtol=0.02, atol=0.015)


@needs_unit
@pytest.mark.parametrize("window", [kernels.SEES_ALL, 20])
def test_attention_does_not_depend_on_the_step_nor_on_how_a_prompt_is_cut(window: int) -> None:
    torch.manual_seed(7)
    step = Step([(40, 53), (10, 1), (0, 21)], key_heads=2, group=3, size=64, block_size=16)
    together = step.found(window)
    assert not together.isnan().any()
    for span in step.spans:
        rows = slice(span.row, span.row + span.count)
        for cut in (1, 7, 16, span.count):
            parts = [
                Span(span.row + begin, span.start + begin, min(cut, span.count - begin), span.blocks)
                for begin in range(0, span.count, cut)
            ]
            assert torch.equal(step.found(window, parts)[rows], together[rows]), cut


@needs_unit
def test_attention_does_not_see_what_is_behind_a_token() -> None:
    """Whatever keys others left there; their values are finite, as blocks are cleared when they are given out."""
    torch.manual_seed(8)
    step = Step([(18, 3)], key_heads=1, group=2, size=32, block_size=16)
    (span,) = step.spans
    before = step.found(kernels.SEES_ALL)
    behind = int(span.blocks[1]) * 16 + 21 - 16
    step.keys_KSD[:, behind : behind + 11] = torch.inf
    torch.testing.assert_close(step.found(kernels.SEES_ALL), before, rtol=0, atol=0)


SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "head_dim": 32,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "qwen2, with a window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}


def hidden_after_steps(model: Any, steps: list[list[Entry]], block_size: int) -> list[torch.Tensor]:
    """What the layers give for each of the steps, with a store of their own."""
    tables = BlockTables(num_blocks=64, block_size=block_size, context_length=None)
    store = KvStore(64, block_size)
    found = []
    for entries in steps:
        placement = tables.apply(entries, ())
        plan = StepPlan(placement, block_size=block_size, device=torch.device("cpu"), dtype=torch.bfloat16)
        ids = torch.tensor([[(7 * entry.start + 13 * i + entry.sequence) % 96 for entry in entries
                             for i in range(entry.count)]])  # fmt: skip
        with torch.inference_mode():
            answer = model.base_model(
                input_ids=ids, position_ids=plan.positions_1T, paged=PagedStep(store, plan), use_cache=False
            )
        found.append(answer.last_hidden_state[0])
    return found


@needs_unit
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("block_size", [16, 4])  # blocks of 4 are smaller than a stretch
def test_a_stack_computes_what_its_layers_compute(name: str, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
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
                patch.setattr(bf16_attention, "is_ready", lambda: False)
            make_lean(model)
        assert isinstance(model.base_model.layers[0], LayerStack) is stacked
        found.append(hidden_after_steps(model, steps, block_size))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.03)


@needs_unit
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_a_step_to_the_same_bits(threads: int) -> None:
    if threads > bf16_unit.MOST_THREADS:
        pytest.skip("steps of this processor have one thread")
    steps = [
        [Entry(sequence=0, start=0, count=33, opens=True, new_blocks=(7, 1, 5))],
        [Entry(sequence=0, start=33, count=1), Entry(sequence=1, start=0, count=9, opens=True, new_blocks=(2,))],
        [Entry(sequence=one, start=34 if one == 0 else 9, count=1) for one in (0, 1)],
    ]
    found = []
    for number in (1, threads):
        torch.set_num_threads(number)
        try:
            torch.manual_seed(3)
            model = MODELS["qwen3"]().bfloat16().eval()
            model.set_attn_implementation(ATTENTION_NAME)
            make_lean(model)
            assert isinstance(model.base_model.layers[0], LayerStack)
            found.append(hidden_after_steps(model, steps, 16))
        finally:
            torch.set_num_threads(1)
    for alone, together in zip(*found, strict=True):
        assert torch.equal(alone, together)


@needs_unit
def test_no_step_compiles() -> None:
    """All is compiled when a model is loaded: what a step asks for has been there."""
    torch.manual_seed(3)
    model = MODELS["qwen3"]().bfloat16().eval()
    model.set_attn_implementation(ATTENTION_NAME)
    make_lean(model)
    loops = (bf16_layers.layers, bf16_attention.attend, bf16_attention.store, multiply)
    compiled = [list(loop.signatures) for loop in loops]
    entries = [Entry(sequence=0, start=0, count=20, opens=True, new_blocks=tuple(range(8)))]
    hidden = hidden_after_steps(model, [entries, [Entry(sequence=0, start=20, count=1)]], 16)[-1]
    with torch.inference_mode():
        model.get_output_embeddings()(hidden)
    assert [list(loop.signatures) for loop in loops] == compiled
