"""Packed and plain projections compute the same, and only layers of a known shape are exchanged."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, silu
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from molink_stage_worker.engine.lean_layers import LeanLayer
from molink_stage_worker.engine.lean_model import make_lean
from molink_stage_worker.engine.projections import OneDnnProjection, PlainProjection, can_pack, project

CPU = torch.device("cpu")
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def kinds() -> list[tuple[type[PlainProjection] | type[OneDnnProjection], torch.dtype]]:
    packed = [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(dtype, CPU)]
    return [(PlainProjection, torch.float32), *((OneDnnProjection, dtype) for dtype in packed)]


@pytest.mark.parametrize(("kind", "dtype"), kinds())
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_every_form_of_a_product(
    kind: type[PlainProjection] | type[OneDnnProjection], dtype: torch.dtype, with_bias: bool, rows: int
) -> None:
    torch.manual_seed(rows)
    weight, bias = torch.randn(24, 16, dtype=dtype), torch.randn(24, dtype=dtype) if with_bias else None
    x, other = torch.randn(rows, 16, dtype=dtype), torch.randn(rows, 24, dtype=dtype)
    projection = kind(weight, bias)
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    for ours, theirs in (
        (projection(x), exact),
        (projection.with_silu(x), silu(exact)),
        (projection.times(x, other), exact * other.double()),
        (projection.plus(x, other), exact + other.double()),
    ):
        assert ours.dtype is dtype
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance)


def test_several_layers_become_one_product() -> None:
    first, second = nn.Linear(8, 3), nn.Linear(8, 5)
    x = torch.randn(4, 8)
    torch.testing.assert_close(project(first, second)(x), torch.cat([first(x), second(x)], dim=-1))


def test_float64_and_other_devices_are_not_packed() -> None:
    assert not can_pack(torch.float64, CPU)
    assert not can_pack(torch.float32, torch.device("meta"))


def test_layers_of_the_llama_shape_are_exchanged() -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    make_lean(model)
    assert all(isinstance(layer, LeanLayer) for layer in model.model.layers)


@pytest.mark.parametrize("odd", [{"hidden_act": "gelu"}, {"pretraining_tp": 2}])
def test_a_llama_that_is_none_keeps_its_layers(odd: dict[str, object]) -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY, **odd))
    make_lean(model)
    assert not any(isinstance(layer, LeanLayer) for layer in model.model.layers)


def test_other_families_keep_their_layers() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64))
    make_lean(model)
    assert not any(isinstance(module, LeanLayer) for module in model.modules())
