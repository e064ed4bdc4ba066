"""Compiled norm, rotation and attention give what the formulas give, in both dtypes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import rms_norm

from molink_stage_worker.engine import kernels

DTYPES = (torch.float32, torch.bfloat16)
KEY_HEADS, GROUP, HEAD_SIZE, BLOCK_SIZE = 2, 3, 12, 4
QUERY_HEADS = KEY_HEADS * GROUP
WIDTH = (QUERY_HEADS + 2 * KEY_HEADS) * HEAD_SIZE
NOTHING, NO_ANGLES = np.empty(0, np.float32), np.empty((0, 0), np.float32)


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    assert kernels.compile_for(found)
    return found


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.02, "rtol": 0.02}


def test_there_are_none_for_other_dtypes() -> None:
    assert not kernels.compile_for(torch.float16)


@pytest.mark.parametrize("size", [1, 15, 64, 577])
def test_norm(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(size)
    x, weight, out = torch.randn(5, size, dtype=dtype), torch.randn(size), torch.empty(5, size, dtype=dtype)
    kernels.norm(kernels.array_of(x), weight.numpy(), 1e-5, kernels.array_of(out))
    torch.testing.assert_close(out.float(), rms_norm(x.float(), (size,), weight, 1e-5), **tolerance(dtype))


def test_rounding_to_bfloat16_is_torchs() -> None:
    """To the nearest, ties to even; infinities stay and NaN is no number afterwards."""
    kernels.compile_for(torch.bfloat16)
    bits = np.random.default_rng(0).integers(0, 1 << 32, 500, dtype=np.uint32)
    special = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0x7F800001], np.uint32)
    one, out = torch.ones(1, 1, dtype=torch.bfloat16), torch.empty(1, 1, dtype=torch.bfloat16)
    for number in torch.from_numpy(np.concatenate([bits, special]).view(np.float32)):
        # a row of one is normed to 1 and then multiplied by its weight: what is rounded is the weight
        kernels.norm(kernels.array_of(one), number[None].numpy(), 0.0, kernels.array_of(out))
        expected = number.to(torch.bfloat16)
        assert torch.equal(out[0, 0], expected) or (out[0, 0].isnan() and expected.isnan()), number


def rows_of(num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(num_tokens, WIDTH).to(dtype)


def stores(num_blocks: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (KEY_HEADS, num_blocks * BLOCK_SIZE, HEAD_SIZE)
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize("is_turned", [False, True])
def test_rotate_and_store(dtype: torch.dtype, is_normed: bool, is_turned: bool) -> None:
    torch.manual_seed(1)
    rows, (keys, values) = rows_of(3, dtype), stores(3, dtype)
    heads = rows.clone().view(3, -1, HEAD_SIZE).float()
    weights = (torch.randn(HEAD_SIZE), torch.randn(HEAD_SIZE)) if is_normed else (torch.empty(0), torch.empty(0))
    angles = torch.randn(3, HEAD_SIZE // 2)
    cos, sin = (angles.cos().numpy(), angles.sin().numpy()) if is_turned else (NO_ANGLES, NO_ANGLES)
    slots = np.array([7, 2, 11], np.int64)
    array = kernels.array_of(rows)
    kernels.rotate(array, cos, sin, weights[0].numpy(), weights[1].numpy(), 1e-5, KEY_HEADS, HEAD_SIZE)
    kernels.store(array, slots, kernels.array_of(keys), kernels.array_of(values))
    turned = heads[:, : QUERY_HEADS + KEY_HEADS]
    if is_normed:
        queries = rms_norm(turned[:, :QUERY_HEADS], (HEAD_SIZE,), weights[0], 1e-5)
        turned = torch.cat([queries, rms_norm(turned[:, QUERY_HEADS:], (HEAD_SIZE,), weights[1], 1e-5)], dim=1)
    if is_turned:
        both = torch.cat([angles, angles], dim=-1)[:, None]
        low, high = turned.chunk(2, dim=-1)
        turned = turned * both.cos() + torch.cat([-high, low], dim=-1) * both.sin()
    given = rows.view(3, -1, HEAD_SIZE).float()
    given_keys = given[:, QUERY_HEADS : QUERY_HEADS + KEY_HEADS]
    torch.testing.assert_close(given[:, : QUERY_HEADS + KEY_HEADS], turned, **tolerance(dtype))
    torch.testing.assert_close(keys[:, slots], given_keys.transpose(0, 1).to(dtype))
    torch.testing.assert_close(values[:, slots], heads[:, QUERY_HEADS + KEY_HEADS :].transpose(0, 1).to(dtype))


def attended(
    rows: torch.Tensor, ends: list[int], window: int, keys: torch.Tensor, values: torch.Tensor, blocks: Any
) -> torch.Tensor:
    """All rows; each sequence has a table of as many blocks as the longest needs."""
    out = torch.zeros(len(rows), QUERY_HEADS * HEAD_SIZE, dtype=rows.dtype)
    table = len(blocks) // len(rows)
    kernels.attend(
        kernels.array_of(rows),
        np.arange(len(rows)),
        np.arange(len(rows)) * table,
        np.array(ends, np.int64),
        blocks,
        BLOCK_SIZE,
        window,
        0.3,
        kernels.array_of(keys),
        kernels.array_of(values),
        kernels.array_of(out),
    )
    return out


@pytest.mark.parametrize("window", [1, 3, 10, kernels.SEES_ALL])
def test_attend(dtype: torch.dtype, window: int) -> None:
    torch.manual_seed(2)
    ends = [1, 4, 5, 18, 7, 32]
    rows, (keys, values) = rows_of(len(ends), dtype), stores(48, dtype)
    blocks = np.random.default_rng(3).permutation(48).astype(np.int64)
    found = attended(rows, ends, window, keys, values, blocks).view(len(ends), QUERY_HEADS, HEAD_SIZE)
    for row, end in enumerate(ends):
        positions = np.arange(max(end - window, 0), end)
        slots = blocks[row * 8 + positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        for head in range(QUERY_HEADS):
            query = rows[row, head * HEAD_SIZE : (head + 1) * HEAD_SIZE].float()
            weights = torch.softmax(keys[head // GROUP, slots].float() @ query * 0.3, dim=0)
            wanted = weights @ values[head // GROUP, slots].float()
            torch.testing.assert_close(found[row, head].float(), wanted, **tolerance(dtype))


def test_a_token_gets_the_same_bits_whoever_is_beside_it(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    ends = [30, 9, 17]
    rows, (keys, values) = rows_of(3, dtype), stores(24, dtype)
    blocks = np.arange(24, dtype=np.int64)
    together = attended(rows, ends, kernels.SEES_ALL, keys, values, blocks)
    for row, end in enumerate(ends):
        alone = attended(rows[row : row + 1], [end], kernels.SEES_ALL, keys, values, blocks[row * 8 : row * 8 + 8])
        assert torch.equal(alone[0], together[row])


def test_scores_far_apart_and_values_that_are_no_numbers(dtype: torch.dtype) -> None:
    rows, keys, values = (torch.zeros(shape, dtype=dtype) for shape in ((1, WIDTH), (2, 8, 12), (2, 8, 12)))
    rows[0, : QUERY_HEADS * HEAD_SIZE] = 100
    keys[:, 3] = 100
    values[:, 3] = 5
    blocks = np.array([0, 1], np.int64)
    assert torch.equal(attended(rows, [8], kernels.SEES_ALL, keys, values, blocks), torch.full((1, 72), 5, dtype=dtype))
    values[1, 6, 2] = float("nan")
    found = attended(rows, [8], kernels.SEES_ALL, keys, values, blocks).view(KEY_HEADS, GROUP, HEAD_SIZE)
    assert found[1, :, 2].isnan().all()
    assert not found[0].isnan().any()
