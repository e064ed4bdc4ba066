"""Products of a few rows with a large bfloat16 matrix, and those of attention, on AMX tiles.

A decode step reads every weight once and computes little with it, so what counts is how fast weights come from
memory. oneDNN's kernel, which long prompts are computed with, waits for most of them: 8 GB/s on a machine whose core
reads 15 and more if lines are fetched before they are needed. The loops here do that, over the memory that oneDNN laid
out.

Shapes: T tokens, I inputs, O outputs. bfloat16 as the integers of their bits; all of it lies flat.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from molink_stage_worker.engine.amx_tiles import (
    BLOCK,
    BLOCK_NUMBERS,
    BLOCK_ROW_BYTES,
    DEPTH,
    ROW_BYTES,
    ROWS,
    add_0_of_4_6,
    add_1_of_4_7,
    add_2_of_4_6,
    add_2_of_5_6,
    add_3_of_4_7,
    add_3_of_5_7,
    clear_0,
    clear_1,
    clear_2,
    clear_3,
    configure,
    load_4,
    load_5,
    load_6,
    load_7,
    release,
    store_0,
    store_1,
    store_2,
    store_3,
)
from molink_stage_worker.engine.compiling import jit
from molink_stage_worker.engine.product_ends import Then, finish
from molink_stage_worker.engine.team import claim, done, wait
from molink_stage_worker.engine.vectors import fetch_line

_AHEAD = 4 * BLOCK_NUMBERS
"""How far ahead of its turn a tile of each stream is fetched."""
_TILE_WORDS = 256
_TILES_AT_ONCE = 4
_SILU, _TIMES = int(Then.SILU), int(Then.TIMES)


@jit
def _fetch(weights: Any, tile: Any) -> None:
    for row in range(ROWS):
        fetch_line(weights, tile + row * BLOCK_ROW_BYTES // 2)


@jit
def _finish(
    sums: Any, bias_O: Any, then: Any, others: Any, outs: Any, first: Any, num_rows: Any, num_outputs: Any, column: Any
) -> None:
    """The sums of some tokens to 16 of their outputs, rounded once: from row `first` and from `column` on."""
    for row in range(num_rows):
        to = (first + row) * num_outputs + column
        finish(sums, row * ROWS, bias_O, column, then, others, outs, to)


@jit
def _of_16(
    configuration: Any, x: Any, weights: Any, bias_O: Any, then: Any, others: Any, outs: Any,
    num_tokens: Any, num_inputs: Any, num_outputs: Any,
) -> None:  # fmt: skip
    """The product for up to 16 tokens: two streams of blocks, each row of tiles used once."""
    depth = num_inputs // DEPTH
    num_blocks = num_outputs // BLOCK
    half = (num_blocks + 1) // 2
    sums = np.empty((4, ROWS * ROWS), np.float32)
    sums_0, sums_1, sums_2, sums_3 = sums[0], sums[1], sums[2], sums[3]
    configure(configuration)
    for block in range(half):
        # the second half may be shorter: its last block is then computed again, to the same end
        other_block = min(half + block, num_blocks - 1)
        one, two = block * depth * BLOCK_NUMBERS, other_block * depth * BLOCK_NUMBERS
        clear_0()
        clear_1()
        clear_2()
        clear_3()
        for k in range(depth):
            load_4(x, k * DEPTH, num_inputs * 2)
            _fetch(weights, one + _AHEAD)
            load_6(weights, one, BLOCK_ROW_BYTES)
            add_0_of_4_6()
            _fetch(weights, one + DEPTH + _AHEAD)
            load_7(weights, one + DEPTH, BLOCK_ROW_BYTES)
            add_1_of_4_7()
            _fetch(weights, two + _AHEAD)
            load_6(weights, two, BLOCK_ROW_BYTES)
            add_2_of_4_6()
            _fetch(weights, two + DEPTH + _AHEAD)
            load_7(weights, two + DEPTH, BLOCK_ROW_BYTES)
            add_3_of_4_7()
            one += BLOCK_NUMBERS
            two += BLOCK_NUMBERS
        store_0(sums_0, 0, ROW_BYTES)
        store_1(sums_1, 0, ROW_BYTES)
        store_2(sums_2, 0, ROW_BYTES)
        store_3(sums_3, 0, ROW_BYTES)
        column, other_column = block * BLOCK, other_block * BLOCK
        _finish(sums_0, bias_O, then, others, outs, 0, num_tokens, num_outputs, column)
        _finish(sums_1, bias_O, then, others, outs, 0, num_tokens, num_outputs, column + ROWS)
        _finish(sums_2, bias_O, then, others, outs, 0, num_tokens, num_outputs, other_column)
        _finish(sums_3, bias_O, then, others, outs, 0, num_tokens, num_outputs, other_column + ROWS)
    release()


@jit
def _of_more(
    configuration: Any, x: Any, weights: Any, bias_O: Any, then: Any, others: Any, outs: Any,
    num_tokens: Any, num_inputs: Any, num_outputs: Any,
) -> None:  # fmt: skip
    """The product for more than 16 tokens: each block of weights for all of them, 32 at a time.

    A block comes from memory once; while it is multiplied, the next one is fetched, an equal part by each 32 tokens.
    """
    depth = num_inputs // DEPTH
    num_turns = (num_tokens + 2 * ROWS - 1) // (2 * ROWS)
    sums = np.empty((4, ROWS * ROWS), np.float32)
    sums_0, sums_1, sums_2, sums_3 = sums[0], sums[1], sums[2], sums[3]
    configure(configuration)
    for block in range(num_outputs // BLOCK):
        column = block * BLOCK
        fetched = (block + 1) * depth * BLOCK_NUMBERS
        wait = 0
        for turn in range(num_turns):
            # the last rows may overlap with those before, to the same end
            first = min(turn * 2 * ROWS, num_tokens - ROWS)
            second = min(first + ROWS, num_tokens - ROWS)
            at = block * depth * BLOCK_NUMBERS
            clear_0()
            clear_1()
            clear_2()
            clear_3()
            for k in range(depth):
                if wait == 0:
                    _fetch(weights, fetched)
                    _fetch(weights, fetched + DEPTH)
                    fetched += BLOCK_NUMBERS
                    wait = num_turns
                wait -= 1
                load_4(x, first * num_inputs + k * DEPTH, num_inputs * 2)
                load_6(weights, at, BLOCK_ROW_BYTES)
                add_0_of_4_6()
                load_7(weights, at + DEPTH, BLOCK_ROW_BYTES)
                add_1_of_4_7()
                if second > first:
                    load_5(x, second * num_inputs + k * DEPTH, num_inputs * 2)
                    add_2_of_5_6()
                    add_3_of_5_7()
                at += BLOCK_NUMBERS
            store_0(sums_0, 0, ROW_BYTES)
            store_1(sums_1, 0, ROW_BYTES)
            _finish(sums_0, bias_O, then, others, outs, first, ROWS, num_outputs, column)
            _finish(sums_1, bias_O, then, others, outs, first, ROWS, num_outputs, column + ROWS)
            if second > first:
                store_2(sums_2, 0, ROW_BYTES)
                store_3(sums_3, 0, ROW_BYTES)
                _finish(sums_2, bias_O, then, others, outs, second, ROWS, num_outputs, column)
                _finish(sums_3, bias_O, then, others, outs, second, ROWS, num_outputs, column + ROWS)
    release()


@partial(jit, nogil=True)
def multiply(
    phase: Any, configuration: Any, x: Any, weights: Any, bias_O: Any, then: Any, others: Any,
    outs: Any, num_tokens: Any, num_inputs: Any, num_outputs: Any,
) -> None:  # fmt: skip
    """``x W^T + bias``, then what `then` says, into `outs`, for one token or more; a phase of one item.

    `configuration` is that of ``min(T, 16)`` rows.

    Some outputs may be computed twice, so what `then` reads of `others` must be memory of its own.
    Whoever else uses tiles in this thread has to configure them again.
    """
    if claim(phase) == 0:
        _multiply(configuration, x, weights, bias_O, then, others, outs, num_tokens, num_inputs, num_outputs)
        done(phase)
    wait(phase, 1)


@jit
def multiply_gate_and_up(
    phase: Any, configuration: Any, x: Any, gate_weights: Any, gate_bias: Any, up_weights: Any,
    up_bias: Any, gate: Any, up: Any, num_tokens: Any, num_inputs: Any, num_outputs: Any,
) -> None:  # fmt: skip
    """``silu(x G^T + bias) * (x U^T + bias)`` into `up`, as one phase of one item."""
    if claim(phase) == 0:
        _multiply(configuration, x, gate_weights, gate_bias, _SILU, gate, gate, num_tokens, num_inputs, num_outputs)
        _multiply(configuration, x, up_weights, up_bias, _TIMES, gate, up, num_tokens, num_inputs, num_outputs)
        done(phase)
    wait(phase, 1)


@jit
def _multiply(
    configuration: Any, x: Any, weights: Any, bias_O: Any, then: Any, others: Any, outs: Any,
    num_tokens: Any, num_inputs: Any, num_outputs: Any,
) -> None:  # fmt: skip
    if num_tokens <= ROWS:
        _of_16(configuration, x, weights, bias_O, then, others, outs, num_tokens, num_inputs, num_outputs)
    else:
        _of_more(configuration, x, weights, bias_O, then, others, outs, num_tokens, num_inputs, num_outputs)


@jit
def score(
    rows: Any, first: Any, apart: Any, _num_rows: Any, key_words: Any, num_stretches: Any, size: Any, scores: Any,
    width: Any,
) -> None:  # fmt: skip
    """Scores, not scaled yet, of a tile of queries, which begin at number `first` and lie `apart`, `width` apart.

    A stretch is 16 keys, turned: pairs of their numbers, each of all 16 side by side. There is room for four at a time.
    """
    parts = size // DEPTH
    step = parts * _TILE_WORDS
    for stretch in range(0, num_stretches, _TILES_AT_ONCE):
        clear_0()
        clear_1()
        clear_2()
        clear_3()
        for part in range(parts):
            at = stretch * step + part * _TILE_WORDS
            load_4(rows, first + part * DEPTH, 2 * apart)
            load_6(key_words, at, ROW_BYTES)
            add_0_of_4_6()
            load_7(key_words, at + step, ROW_BYTES)
            add_1_of_4_7()
            load_6(key_words, at + 2 * step, ROW_BYTES)
            add_2_of_4_6()
            load_7(key_words, at + 3 * step, ROW_BYTES)
            add_3_of_4_7()
        to = stretch * ROWS
        store_0(scores, to, 4 * width)
        store_1(scores, to + ROWS, 4 * width)
        store_2(scores, to + 2 * ROWS, 4 * width)
        store_3(scores, to + 3 * ROWS, 4 * width)


@jit
def add_up(
    weights: Any, width: Any, _num_rows: Any, value_words: Any, num_stretches: Any, size: Any, sums: Any
) -> None:
    """Of a tile of rows, the values by their weights, of an even number of stretches.

    Values lie in pairs of keys: the numbers of both side by side.
    """
    for column in range(0, size, DEPTH):
        clear_0()
        clear_1()
        for stretch in range(0, num_stretches, 2):
            at = stretch * (ROWS // 2) * size + column
            load_4(weights, stretch * ROWS, 2 * width)
            load_6(value_words, at, 4 * size)
            add_0_of_4_6()
            load_7(value_words, at + ROWS, 4 * size)
            add_1_of_4_7()
        store_0(sums, column, 4 * size)
        store_1(sums, column + ROWS, 4 * size)
