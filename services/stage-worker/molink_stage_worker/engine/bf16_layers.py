"""All layers of a stage as one compiled call in bfloat16.

A product streams its weights through the processor's cache and drives everything else out of it. Back in Python, the
interpreter has to be fetched again line by line: some 40 µs after each call, eleven times a layer.

Arrays come as addresses, since numba takes no lists of them without looking at each. Shapes: as in `kernels`; I inner
size, L layers, C columns of `Column`.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache, partial
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import float32, float64, int64, types, uint8, uint16
from numba.extending import intrinsic

from molink_stage_worker.engine import bf16_attention, bf16_unit
from molink_stage_worker.engine.bf16_attention import attend, store
from molink_stage_worker.engine.bf16_unit import ROWS, multiply, multiply_gate_and_up
from molink_stage_worker.engine.compiling import jit
from molink_stage_worker.engine.kernels import norm, rotate
from molink_stage_worker.engine.product_ends import Then
from molink_stage_worker.engine.team import PHASE, claim, done, later, size_of_team, wait


class Column(IntEnum):
    """What a row of the table of a layer holds: addresses, 0 for what the layer does not have; then numbers."""

    QUERY_KEY_VALUE = 0
    OUTPUT = 1
    GATE = 2
    UP = 3
    DOWN = 4
    QUERY_KEY_VALUE_BIAS = 5
    """Biases and norms are float32."""
    OUTPUT_BIAS = 6
    GATE_BIAS = 7
    UP_BIAS = 8
    DOWN_BIAS = 9
    INPUT_NORM = 10
    POST_ATTENTION_NORM = 11
    QUERY_NORM = 12
    KEY_NORM = 13
    KEYS = 14
    VALUES = 15
    WINDOW = 16
    """Tokens that it sees."""
    TURNS = 17
    """Whether queries and keys are rotated."""


PHASES = 7
"""Of a layer, as a team shares it."""
_NOTHING, _PLUS = int(Then.NOTHING), int(Then.PLUS)
_QKV, _OUTPUT, _GATE, _UP, _DOWN = (int(column) for column in list(Column)[:5])
_QKV_B, _OUTPUT_B, _GATE_B, _UP_B, _DOWN_B = (int(column) for column in list(Column)[5:10])
_NORM_1, _NORM_2, _QUERY_NORM, _KEY_NORM = (int(column) for column in list(Column)[10:14])
_KEYS, _VALUES, _WINDOW, _TURNS = (int(column) for column in list(Column)[14:])


def _pointing_to(scalar: Any, kind: Any) -> Any:
    @intrinsic
    def pointer(_context: Any, address: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], kind.as_pointer())

        return types.CPointer(scalar)(int64), generate

    return pointer


_numbers_at = _pointing_to(uint16, ir.IntType(16))
_floats_at = _pointing_to(float32, ir.FloatType())


@jit
def _numbers(address: Any, count: Any) -> Any:
    """`count` at an address. Of weights, which may lie in 12 bits, it is the most that there are."""
    return numba.carray(_numbers_at(address), (count,))


@jit
def _floats(address: Any, count: Any) -> Any:
    return numba.carray(_floats_at(address), (count if address != 0 else 0,))


@jit
def _store(own: Any, key_heads: Any, num_slots: Any, head_size: Any) -> Any:
    """Keys and values of a layer."""
    shape = (key_heads, num_slots, head_size)
    count = key_heads * num_slots * head_size
    return _numbers(own[_KEYS], count).reshape(shape), _numbers(own[_VALUES], count).reshape(shape)


@jit
def _project(
    clearing: Any,
    projecting: Any,
    tiles: Any,
    own: Any,
    hidden_TH: Any,
    epsilon: Any,
    cleared: Any,
    block_size: Any,
    key_heads: Any,
    head_size: Any,
    num_slots: Any,
    rows_TW: Any,
) -> None:
    """Queries, keys and values of the layer of row `own` into `rows_TW`; one thread empties the blocks `cleared`."""
    tokens, size = hidden_TH.shape
    width = rows_TW.shape[1]
    if claim(clearing) == 0:
        keys_KSD, values_KSD = _store(own, key_heads, num_slots, head_size)
        for block in cleared:
            keys_KSD[:, block * block_size : (block + 1) * block_size] = 0
            values_KSD[:, block * block_size : (block + 1) * block_size] = 0
        done(clearing)
    normed_TH = np.empty((tokens, size), np.uint16)
    norm(hidden_TH, _floats(own[_NORM_1], size), epsilon, normed_TH)
    rows, normed = rows_TW.reshape(-1), normed_TH.reshape(-1)
    weights, bias = _numbers(own[_QKV], width * size), _floats(own[_QKV_B], width)
    multiply(projecting, tiles, normed, weights, bias, _NOTHING, rows, rows, tokens, size, width)
    wait(clearing, 1)


@jit
def _rotate_and_store(
    phase: Any,
    own: Any,
    epsilon: Any,
    cos_TF: Any,
    sin_TF: Any,
    slots_T: Any,
    key_heads: Any,
    head_size: Any,
    num_slots: Any,
    rows_TW: Any,
) -> None:
    """Turn queries and keys of the layer of row `own`, and store keys and values: some tokens are an item."""
    keys_KSD, values_KSD = _store(own, key_heads, num_slots, head_size)
    query_norm, key_norm = _floats(own[_QUERY_NORM], head_size), _floats(own[_KEY_NORM], head_size)
    no_angles = np.empty((0, 0), np.float32)
    cos_TF, sin_TF = cos_TF if own[_TURNS] else no_angles, sin_TF if own[_TURNS] else no_angles
    tokens, team_size = slots_T.size, size_of_team(phase)
    each = tokens if team_size == 1 else max(tokens // (4 * team_size), 1)
    item = claim(phase)
    while item * each < tokens:
        begin, end = item * each, min((item + 1) * each, tokens)
        own_rows = rows_TW[begin:end]
        rotate(
            own_rows, cos_TF[begin:end], sin_TF[begin:end], query_norm, key_norm, epsilon, key_heads, head_size
        )  # fmt: skip
        store(own_rows, slots_T[begin:end], keys_KSD, values_KSD)
        done(phase)
        item = claim(phase)
    wait(phase, (tokens + each - 1) // each)


@jit
def _after_attention(
    attended: Any, gated: Any, ending: Any, tiles: Any, own: Any, hidden_TH: Any, epsilon: Any, found_TQ: Any,
    room: Any, inner: Any,
) -> None:  # fmt: skip
    """The rest of the layer of row `own`, three phases: takes `hidden_TH`, what went into it, to what comes out of it.

    `room` is memory for T × (H + 2 I) numbers.
    """
    tokens, size = hidden_TH.shape
    queries = found_TQ.shape[1]
    normed_TH = np.empty((tokens, size), np.uint16)
    after, gate, up = room[: tokens * size], room[tokens * size :], room[tokens * (size + inner) :]
    hidden, found, normed = hidden_TH.reshape(-1), found_TQ.reshape(-1), normed_TH.reshape(-1)
    w_output, b_output = _numbers(own[_OUTPUT], size * queries), _floats(own[_OUTPUT_B], size)
    w_gate, b_gate = _numbers(own[_GATE], inner * size), _floats(own[_GATE_B], inner)
    w_up, b_up = _numbers(own[_UP], inner * size), _floats(own[_UP_B], inner)
    w_down, b_down = _numbers(own[_DOWN], size * inner), _floats(own[_DOWN_B], size)
    multiply(attended, tiles, found, w_output, b_output, _PLUS, hidden, after, tokens, queries, size)
    norm(after.reshape((tokens, size)), _floats(own[_NORM_2], size), epsilon, normed_TH)
    multiply_gate_and_up(gated, tiles, normed, w_gate, b_gate, w_up, b_up, gate, up, tokens, size, inner)
    multiply(ending, tiles, up, w_down, b_down, _PLUS, after, hidden, tokens, inner, size)


@partial(jit, nogil=True)
def layers(  # noqa: PLR0917  numba takes no names
    first: Any,
    tiles: Any,
    table_LC: Any,
    hidden_TH: Any,
    epsilon: Any,
    cos_TF: Any,
    sin_TF: Any,
    slots_T: Any,
    cleared: Any,
    block_size: Any,
    key_heads: Any,
    head_size: Any,
    num_slots: Any,
    rows_TW: Any,
    firsts_B: Any,
    counts_B: Any,
    starts_B: Any,
    tables_B: Any,
    slots_N: Any,
    scale: Any,
    found_TQ: Any,
    room: Any,
    inner: Any,
) -> None:
    """Take `hidden_TH` through all layers, in place. `tiles` are `bf16_unit.configurations`.

    To be called by each of a `team`, with the first of `PHASES` a layer; `rows_TW`, `found_TQ` and `room` are memory
    that all of them share.
    """
    tokens = hidden_TH.shape[0]
    of_products = tiles[min(tokens, ROWS)]
    for layer in range(len(table_LC)):
        own, clearing = table_LC[layer], later(first, layer * PHASES)
        projecting, storing, attending = later(clearing, 1), later(clearing, 2), later(clearing, 3)
        attended, gated, ending = later(clearing, 4), later(clearing, 5), later(clearing, 6)
        _project(
            clearing, projecting, of_products, own, hidden_TH, epsilon, cleared, block_size,
            key_heads, head_size, num_slots, rows_TW,
        )  # fmt: skip
        _rotate_and_store(storing, own, epsilon, cos_TF, sin_TF, slots_T, key_heads, head_size, num_slots, rows_TW)
        keys_KSD, values_KSD = _store(own, key_heads, num_slots, head_size)
        attend(
            attending, tiles, rows_TW, firsts_B, counts_B, starts_B, tables_B, slots_N,
            own[_WINDOW], scale, keys_KSD, values_KSD, found_TQ,
        )  # fmt: skip
        _after_attention(attended, gated, ending, of_products, own, hidden_TH, epsilon, found_TQ, room, inner)


@cache
def are_ready() -> bool:
    """Whether `layers` can be used. Compiles, some seconds."""
    if not (bf16_unit.is_ready() and bf16_attention.is_ready()):
        return False
    integers, angles, rows = int64[::1], float32[:, ::1], uint16[:, ::1]
    before: Any = (angles, angles, integers, integers, int64, int64, int64, int64, rows)
    after: Any = (float64, rows, uint16[::1], int64)
    layers.compile((PHASE, uint8[:, ::1], int64[:, ::1], rows, float64, *before, *(integers,) * 5, *after))
    return True
