"""Weights in 12 bits are the weights, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from molink_stage_worker.engine import bf16_unit, twelve_bits
from molink_stage_worker.engine.processor import has_pairs, has_tiles
from molink_stage_worker.engine.projections import LoopProjection, projection_of
from molink_stage_worker.engine.twelve_bits import BLOCK, HEAD, LEFT_OUT, PAIR

needs_pairs = pytest.mark.skipif(not has_pairs() or has_tiles(), reason="only pairs are multiplied from 12 bits")


def unpacked(packed: Any, outputs: int, inputs: int) -> Any:
    """The bits of the weights, ``[O, I]``, as the module's text says that they lie."""
    bits = np.zeros((outputs, inputs), np.uint16)
    block_numbers = HEAD + inputs // 2 * PAIR
    for block in range(outputs // BLOCK):
        own = packed[block * block_numbers : (block + 1) * block_numbers]
        uppers, (count, place) = own.view(np.uint8)[:16], own[8:16].view(np.int64)
        for pair in range(inputs // 2):
            lines = own[HEAD + pair * PAIR : HEAD + (pair + 1) * PAIR].view(np.uint8).reshape(3, 4, 2, 8)
            for vector in range(4):
                lower = lines[vector // 2, :, vector % 2].reshape(-1)
                number = (lines[2, :, vector % 2].reshape(-1) >> (4 * (vector // 2))) & 15
                words = lower.astype(np.uint16) | uppers[number].astype(np.uint16) << 8
                first = block * BLOCK + vector * 16
                bits[first : first + 16, 2 * pair : 2 * pair + 2] = words.reshape(16, 2)
        left_out = packed[block * block_numbers + place :][: count * LEFT_OUT].reshape(-1, LEFT_OUT)
        for i, output, weight in left_out:
            assert bits[block * BLOCK + output, i] == 0
            bits[block * BLOCK + output, i] = weight
    return bits


def weights(outputs: int, inputs: int, seed: int) -> torch.Tensor:
    """As a model has them: many near 0, some zeros, a few much larger."""
    torch.manual_seed(seed)
    weight = torch.randn(outputs, inputs) * 0.02
    weight[torch.rand(outputs, inputs) < 0.01] = 0.0
    weight[3, : inputs // 2] *= 1e4
    return weight.bfloat16()


@pytest.mark.parametrize(("outputs", "inputs"), [(BLOCK, 40), (3 * BLOCK, 576)])
def test_nothing_is_lost(outputs: int, inputs: int) -> None:
    weight = weights(outputs, inputs, seed=outputs + inputs)
    # what is rare: the smallest and the largest numbers, what is none, and a zero with a sign
    rare = torch.tensor([1e-38, -3e38, torch.inf, -torch.inf, torch.nan, -0.0]).bfloat16()
    weight.view(-1)[torch.randperm(weight.numel())[: len(rare)]] = rare
    packed = twelve_bits.pack(weight)
    assert np.array_equal(unpacked(packed, outputs, inputs), weight.view(torch.uint16).numpy())


def test_it_is_a_quarter_less() -> None:
    weight = weights(3 * BLOCK, 576, seed=1)
    packed = twelve_bits.pack(weight)
    assert packed.nbytes < 0.76 * weight.nbytes
    assert packed.ctypes.data % 64 == 0


def test_weights_with_too_many_exponents_stay_as_they_are() -> None:
    bits = torch.randint(0, 1 << 16, (BLOCK, 64), dtype=torch.int32).to(torch.uint16)
    assert twelve_bits.pack(bits.view(torch.bfloat16)) is None


@pytest.mark.parametrize("shape", [(BLOCK - 1, 64), (BLOCK + 16, 64), (BLOCK, 63), (BLOCK, (1 << 16) + 2)])
def test_odd_shapes_stay_as_they_are(shape: tuple[int, int]) -> None:
    assert twelve_bits.pack(torch.zeros(shape).bfloat16()) is None


@needs_pairs
@pytest.mark.parametrize("rows", [1, 4, 6, 7, 12, 13, 600])
def test_the_loops_multiply_by_them(rows: int) -> None:
    """Each output is one weight, so that nothing is rounded."""
    outputs, inputs = 2 * BLOCK, 600
    weight = weights(outputs, inputs, seed=rows)
    projection = projection_of(weight, None)
    assert isinstance(projection, LoopProjection)
    one_of = torch.arange(rows) % inputs
    x = torch.zeros(rows, inputs).bfloat16()
    x[torch.arange(rows), one_of] = 1.0
    assert torch.equal(projection(x), weight[:, one_of].T)


@needs_pairs
def test_what_is_left_out_counts_alike_for_all() -> None:
    """A token's product is the same in every row of every step."""
    weight = weights(BLOCK, 64, seed=5)
    weight[7, 11], weight[7, 12], weight[40, 63] = 1e-20, -1e20, 3e-25
    projection = projection_of(weight, None)
    assert isinstance(projection, LoopProjection)
    x = torch.randn(25, 64).bfloat16()
    together = projection(x)
    assert all(torch.equal(together[t], projection(x[t : t + 1])[0]) for t in range(25))
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(together.double(), exact, rtol=2**-8, atol=1e-4)


@needs_pairs
def test_what_cannot_be_packed_is_left_to_onednn() -> None:
    assert bf16_unit.laid_out(torch.randn(BLOCK + 8, 32).bfloat16()) is None
    x, weight = torch.randn(3, 32).bfloat16(), torch.randn(BLOCK + 8, 32).bfloat16()
    torch.testing.assert_close(projection_of(weight, None)(x), x @ weight.T, rtol=2e-2, atol=2e-2)
