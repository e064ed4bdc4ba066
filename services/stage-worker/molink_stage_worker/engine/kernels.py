"""Norm, rotary embedding and attention of one step as loops, compiled for the processor at hand.

Between the matrix products of a small step torch needs some thirty calls a layer, most of which do less work than
they cost: a norm is eight of them, and attention copies every key and value out of the paged store before it looks
at them. Here the same is three calls a layer, and keys are read where they lie. numba brings the compiler along
(LLVM, in its wheel), so no toolchain is needed. Compiling takes about three seconds; what comes out is kept
in the cache folder, if that can be written.

Arithmetic is float32 inside, whatever the dtype of memory. A token's attention is computed alone, key after key:
it is the same whoever else is in the step. (Longer chunks, and long contexts where torch has several threads, do not
come here.)

Scalars in memory are float32, or bfloat16 as the integers of their bits. All arrays lie row after row, without gaps.

Shapes: T tokens of a step, R of them that are attended, H hidden size, W width of a row of queries, keys and values,
F half of a head's size D, K key heads, G queries a key head, S slots of the store, N blocks.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import numba
import numpy as np
import torch
from numba import float32, float64, int64, uint16

from molink_stage_worker.engine.compiling import exp, jit, narrow, prefetch, widen

SEES_ALL = 1 << 40
"""A window that no sequence outgrows."""

_AHEAD = 2
"""How many blocks before their turn keys and values are fetched: they lie anywhere in memory, so the processor
cannot guess, and waiting for each took three times as long as computing."""
_CACHE_LINE_BYTES = 64


def array_of(tensor: torch.Tensor) -> Any:
    """A tensor's own memory as the array that the functions take."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()


@cache
def compile_for(dtype: torch.dtype) -> bool:
    """Compile the functions for tensors of `dtype` on a CPU; whether they can be."""
    scalar = {torch.bfloat16: uint16, torch.float32: float32}.get(dtype)
    if scalar is None:
        return False
    rows, stored = scalar[:, ::1], scalar[:, :, ::1]
    floats, angles, integers = float32[::1], float32[:, ::1], int64[::1]
    norm.compile((rows, floats, float64, rows))
    rotate.compile((rows, angles, angles, floats, floats, float64, int64, int64))
    store.compile((rows, integers, stored, stored))
    attend.compile((rows, integers, integers, integers, integers, int64, int64, float64, stored, stored, rows))
    return True


@numba.njit(fastmath=True)  # a maximum in any order wants numbers without NaN: what it gives for others is any of them
def _largest(scores: Any) -> Any:
    largest = scores[0]
    for score in scores:
        largest = max(largest, score)
    return largest


@jit
def _softmax(scores: Any) -> None:
    largest = _largest(scores)
    total = float32(0.0)
    for key in range(scores.size):
        scores[key] = exp(scores[key] - largest)
        total += scores[key]
    share = float32(1.0) / total
    for key in range(scores.size):
        scores[key] *= share


@jit
def _norm_row(row: Any, weight: Any, epsilon: Any, out: Any) -> None:
    squares = float32(0.0)
    for i in range(row.size):
        squares += widen(row[i]) * widen(row[i])
    factor = float32(1.0 / math.sqrt(squares / float32(row.size) + float32(epsilon)))
    for i in range(row.size):
        out[i] = narrow(widen(row[i]) * factor * weight[i], out[i])


@jit
def norm(x_TH: Any, weight_H: Any, epsilon: Any, out_TH: Any) -> None:
    """Root mean square norm of each row into `out_TH`. The weight is float32."""
    for t in range(x_TH.shape[0]):
        _norm_row(x_TH[t], weight_H, epsilon, out_TH[t])


@jit
def store(rows_TW: Any, slots_T: Any, keys_KSD: Any, values_KSD: Any) -> None:
    """Put keys and values into their slots; in a row those of queries come first."""
    key_heads, _, size = keys_KSD.shape
    keys_at = rows_TW.shape[1] - 2 * key_heads * size
    for t in range(rows_TW.shape[0]):
        for k in range(key_heads):
            key = keys_at + k * size
            value = key + key_heads * size
            for i in range(size):
                keys_KSD[k, slots_T[t], i] = rows_TW[t, key + i]
                values_KSD[k, slots_T[t], i] = rows_TW[t, value + i]


@jit
def rotate(
    rows_TW: Any,
    cos_TF: Any,
    sin_TF: Any,
    query_norm_D: Any,
    key_norm_D: Any,
    epsilon: Any,
    key_heads: Any,
    size: Any,
) -> None:
    """Norm and turn queries and keys where they lie.

    Weights and angles are float32; empty ones mean that there is no such norm, or that nothing is turned.
    """
    query_heads = rows_TW.shape[1] // size - 2 * key_heads
    half = size // 2
    for t in range(rows_TW.shape[0]):
        for head in range(query_heads + key_heads):
            row = rows_TW[t, head * size : (head + 1) * size]
            weight = query_norm_D if head < query_heads else key_norm_D
            if weight.size > 0:
                _norm_row(row, weight, epsilon, row)
            if cos_TF.size > 0:
                for i in range(half):
                    low, high = widen(row[i]), widen(row[half + i])
                    # rounded in between as the calls of a `LeanLayer` are, lest a stage's text hang on its device
                    low_cos = widen(narrow(low * cos_TF[t, i], row[i]))
                    high_cos = widen(narrow(high * cos_TF[t, i], row[i]))
                    row[i] = narrow(low_cos - high * sin_TF[t, i], row[i])
                    row[half + i] = narrow(high_cos + low * sin_TF[t, i], row[i])


@jit
def _score(queries_GD: Any, keys_SD: Any, first: Any, count: Any, scores_GS: Any, at: Any) -> None:
    group, size = queries_GD.shape
    j = 0
    # four keys at a time: sums that do not wait for each other
    while j + 3 < count:
        s = first + j
        for g in range(group):
            a, b, c, d = float32(0.0), float32(0.0), float32(0.0), float32(0.0)
            for i in range(size):
                query = queries_GD[g, i]
                a += query * widen(keys_SD[s, i])
                b += query * widen(keys_SD[s + 1, i])
                c += query * widen(keys_SD[s + 2, i])
                d += query * widen(keys_SD[s + 3, i])
            scores_GS[g, at + j] = a
            scores_GS[g, at + j + 1] = b
            scores_GS[g, at + j + 2] = c
            scores_GS[g, at + j + 3] = d
        j += 4
    while j < count:
        for g in range(group):
            a = float32(0.0)
            for i in range(size):
                a += queries_GD[g, i] * widen(keys_SD[first + j, i])
            scores_GS[g, at + j] = a
        j += 1


@jit
def _add_values(sums_GD: Any, values_SD: Any, first: Any, count: Any, weights_GS: Any, at: Any) -> None:
    group, size = sums_GD.shape
    j = 0
    while j + 3 < count:
        s = first + j
        for g in range(group):
            a, b = weights_GS[g, at + j], weights_GS[g, at + j + 1]
            c, d = weights_GS[g, at + j + 2], weights_GS[g, at + j + 3]
            for i in range(size):
                left = a * widen(values_SD[s, i]) + b * widen(values_SD[s + 1, i])
                right = c * widen(values_SD[s + 2, i]) + d * widen(values_SD[s + 3, i])
                sums_GD[g, i] += left + right
        j += 4
    while j < count:
        for g in range(group):
            weight = weights_GS[g, at + j]
            for i in range(size):
                sums_GD[g, i] += weight * widen(values_SD[first + j, i])
        j += 1


@jit
def _prefetch_block(array_SD: Any, block: Any, block_size: Any) -> None:
    for j in range(block_size):
        for i in range(0, array_SD.shape[1], _CACHE_LINE_BYTES // array_SD.itemsize):
            prefetch(array_SD, block * block_size + j, i)


@jit
def _score_blocks(
    queries_GD: Any,
    keys_SD: Any,
    values_SD: Any,
    next_keys_SD: Any,
    next_block: Any,
    blocks_N: Any,
    block_size: Any,
    skipped: Any,
    num_keys: Any,
    scores_GS: Any,
) -> None:
    """All scores of one key head. The last turns fetch the first values, and the first keys of the head after it."""
    seen = -skipped
    for index in range(blocks_N.size):
        ahead = index + _AHEAD
        if ahead < blocks_N.size:
            _prefetch_block(keys_SD, blocks_N[ahead], block_size)
        else:
            _prefetch_block(values_SD, blocks_N[min(ahead - blocks_N.size, blocks_N.size - 1)], block_size)
            _prefetch_block(next_keys_SD, next_block, block_size)
        hidden = max(-seen, 0)
        count = min(block_size, num_keys - seen) - hidden
        _score(queries_GD, keys_SD, blocks_N[index] * block_size + hidden, count, scores_GS, seen + hidden)
        seen += block_size


@jit
def _add_blocks(
    sums_GD: Any, values_SD: Any, blocks_N: Any, block_size: Any, skipped: Any, num_keys: Any, weights_GS: Any
) -> None:
    seen = -skipped
    for index in range(blocks_N.size):
        if index + _AHEAD < blocks_N.size:
            _prefetch_block(values_SD, blocks_N[index + _AHEAD], block_size)
        hidden = max(-seen, 0)
        count = min(block_size, num_keys - seen) - hidden
        _add_values(sums_GD, values_SD, blocks_N[index] * block_size + hidden, count, weights_GS, seen + hidden)
        seen += block_size


@partial(jit, nogil=True)  # with many keys it takes a while, and an event loop wants to run beside it
def attend(
    rows_TW: Any,
    attended_R: Any,
    tables_R: Any,
    ends_R: Any,
    blocks_N: Any,
    block_size: Any,
    window: Any,
    scale: Any,
    keys_KSD: Any,
    values_KSD: Any,
    out_TH: Any,
) -> None:
    """Attention of the rows `attended_R`, each over the `window` keys before its end, into the same rows of `out_TH`.

    The block table of a row's sequence begins at the row's entry of `tables_R` in `blocks_N`.
    """
    key_heads, _, size = keys_KSD.shape
    group = (rows_TW.shape[1] // size - 2 * key_heads) // key_heads
    heads_GD = np.empty((group, size), np.float32)
    scores_GS = np.empty((group, min(ends_R.max(), window)), np.float32)
    for r in range(attended_R.size):
        start = max(ends_R[r] - window, 0)
        skipped = start % block_size
        first = tables_R[r] + start // block_size
        own_N = blocks_N[first : tables_R[r] + (ends_R[r] - 1) // block_size + 1]
        num_keys = ends_R[r] - start
        row_GD = rows_TW[attended_R[r], : key_heads * group * size].reshape(key_heads, group, size)
        out_GD = out_TH[attended_R[r]].reshape(key_heads, group, size)
        for k in range(key_heads):
            is_last = k + 1 == key_heads
            next_block = blocks_N[tables_R[min(r + 1, attended_R.size - 1)]] if is_last else own_N[0]
            next_keys_SD = keys_KSD[0 if is_last else k + 1]
            for g in range(group):
                for i in range(size):
                    heads_GD[g, i] = widen(row_GD[k, g, i]) * float32(scale)
            _score_blocks(
                heads_GD,
                keys_KSD[k],
                values_KSD[k],
                next_keys_SD,
                next_block,
                own_N,
                block_size,
                skipped,
                num_keys,
                scores_GS,
            )
            for g in range(group):
                _softmax(scores_GS[g, :num_keys])
            heads_GD[:] = float32(0.0)
            _add_blocks(heads_GD, values_KSD[k], own_N, block_size, skipped, num_keys, scores_GS)
            for g in range(group):
                for i in range(size):
                    out_GD[k, g, i] = narrow(heads_GD[g, i], out_GD[k, g, i])
