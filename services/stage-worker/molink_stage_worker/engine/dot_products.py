"""Products of a few rows with a large bfloat16 matrix, and those of attention, by dot products of pairs (see `dots`).

oneDNN uses the same instruction, but reads weights at half of the speed that memory has: 14 GB/s on a machine where
the loops here read 26.

Shapes: T tokens, I inputs, O outputs. bfloat16 as the integers of their bits; all of it lies flat.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from molink_stage_worker.engine.compiling import jit
from molink_stage_worker.engine.dots import MOST_ROWS, VECTOR_BYTES, dots_2, dots_4, stream_4
from molink_stage_worker.engine.product_ends import finish
from molink_stage_worker.engine.vectors import LANES

BLOCK = 64
"""Outputs that oneDNN lays side by side: four vectors."""
_PAIR_NUMBERS = 2 * BLOCK
_AHEAD = 256
"""How many numbers before their turn weights are fetched, where each is read once. More makes a few rows slower."""
_NEVER = 1 << 40
_TWO_VECTORS = 2 * LANES
_STRETCHES_AT_ONCE = 4


@jit
def multiply(
    _configuration: Any, x: Any, weights: Any, bias_O: Any, then: Any, others: Any, outs: Any,
    num_tokens: Any, num_inputs: Any, num_outputs: Any,
) -> None:  # fmt: skip
    """``x W^T + bias``, then what `then` says, into `outs`, for one token or more.

    The block of weights that is at hand is for all tokens, some at a time; meanwhile the next block is fetched, an
    equal part each time. No configuration is looked at.
    """
    turns = (num_tokens + MOST_ROWS - 1) // MOST_ROWS
    pairs = num_inputs // 2
    block_numbers = pairs * _PAIR_NUMBERS
    part = (pairs + turns - 1) // turns * _PAIR_NUMBERS
    sums = np.empty(MOST_ROWS * BLOCK, np.float32)
    for column in range(0, num_outputs, BLOCK):
        at = column // BLOCK * block_numbers
        first = 0
        for turn in range(turns):
            rows = (num_tokens - first) // (turns - turn)
            fetch_at = at + _AHEAD if turns == 1 else at + block_numbers + turn * part
            stream_4(rows, x, first * num_inputs, num_inputs, weights, at, VECTOR_BYTES, 2 * _PAIR_NUMBERS, pairs,
                     fetch_at, turns, sums, 0, BLOCK)  # fmt: skip
            for row in range(rows):
                for vector in range(0, BLOCK, LANES):
                    to = (first + row) * num_outputs + column + vector
                    finish(sums, row * BLOCK + vector, bias_O, column + vector, then, others, outs, to)
            first += rows


@jit
def score(
    rows: Any, first: Any, apart: Any, num_rows: Any, key_words: Any, num_stretches: Any, size: Any, scores: Any,
    width: Any,
) -> None:  # fmt: skip
    """See `amx_products.score`."""
    step = size // 2 * LANES
    turns = (num_rows + MOST_ROWS - 1) // MOST_ROWS
    for stretch in range(0, num_stretches, _STRETCHES_AT_ONCE):
        row = 0
        for turn in range(turns):
            count = (num_rows - row) // (turns - turn)
            dots_4(count, rows, first + row * apart, apart, key_words, stretch * step, 4 * step, VECTOR_BYTES,
                   size // 2, 0, _NEVER, scores, row * width + stretch * LANES, width)  # fmt: skip
            row += count


@jit
def add_up(weights: Any, width: Any, num_rows: Any, value_words: Any, num_stretches: Any, size: Any, sums: Any) -> None:
    """See `amx_products.add_up`."""
    turns = (num_rows + MOST_ROWS - 1) // MOST_ROWS
    for column in range(0, size, _TWO_VECTORS):
        row = 0
        for turn in range(turns):
            count = (num_rows - row) // (turns - turn)
            dots_2(count, weights, row * width, width, value_words, column, VECTOR_BYTES, 4 * size,
                   num_stretches * LANES // 2, 0, _NEVER, sums, row * size + column, size)  # fmt: skip
            row += count
