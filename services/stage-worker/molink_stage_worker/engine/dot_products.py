"""Products of a few rows with a large bfloat16 matrix, and those of attention, by dot products of pairs (see `dots`).

oneDNN uses the same instruction, but reads weights at half of the speed that memory has: 14 GB/s on a machine where
the loops here read 26.

Shapes: T tokens, I inputs, O outputs. bfloat16 as the integers of their bits; all of it lies flat.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from molink_stage_worker.engine.compiling import jit
from molink_stage_worker.engine.dots import (
    MOST_ROWS,
    VECTOR_BYTES,
    dots_1,
    dots_4_apart,
    dots_of_block,
    more_dots_2,
    more_dots_4,
)
from molink_stage_worker.engine.product_ends import Then, finish
from molink_stage_worker.engine.team import claim, done, size_of_team, wait
from molink_stage_worker.engine.twelve_bits import BLOCK, HEAD, PAIR
from molink_stage_worker.engine.vectors import LANES

_AHEAD = 256
"""How many numbers before their turn weights are fetched, where each is read once. More makes a few rows slower."""
_ITEMS_EACH = 4
_SILU, _TIMES = int(Then.SILU), int(Then.TIMES)
_STRETCHES_AHEAD = 3
"""How many stretches before their turn keys and values are fetched: they lie anywhere in memory."""


@jit
def _multiply_blocks(
    x: Any, weights: Any, bias_O: Any, then: Any, others: Any, outs: Any,
    num_tokens: Any, num_inputs: Any, num_outputs: Any, first_block: Any, end_block: Any, sums: Any,
) -> None:  # fmt: skip
    """Blocks of outputs, each for all tokens, some at a time; meanwhile the next block is fetched, by equal parts."""
    turns = (num_tokens + MOST_ROWS - 1) // MOST_ROWS
    pairs = num_inputs // 2
    block_numbers = HEAD + pairs * PAIR
    part = (pairs + turns - 1) // turns * PAIR
    for block in range(first_block, end_block):
        at, column = block * block_numbers, block * BLOCK
        first = 0
        for turn in range(turns):
            rows = (num_tokens - first) // (turns - turn)
            # weights that are read only once are fetched just before their turn
            fetch_at = at + _AHEAD if turns == 1 else at + block_numbers + turn * part
            dots_of_block(rows, x, first * num_inputs, num_inputs, weights, at, 2 * PAIR, pairs,
                          weights, fetch_at, turns, sums, 0, BLOCK)  # fmt: skip
            for row in range(rows):
                for vector in range(0, BLOCK, LANES):
                    to = (first + row) * num_outputs + column + vector
                    finish(sums, row * BLOCK + vector, bias_O, column + vector, then, others, outs, to)
            first += rows


@jit
def _blocks_of_an_item(num_blocks: Any, team_size: Any) -> Any:
    """All of them for one thread; else so few that nobody waits long for the last item, but neighbours if possible."""
    return num_blocks if team_size == 1 else max(num_blocks // (_ITEMS_EACH * team_size), 1)


@partial(jit, nogil=True)
def multiply(
    phase: Any, _configuration: Any, x: Any, weights: Any, bias_O: Any, then: Any,
    others: Any, outs: Any, num_tokens: Any, num_inputs: Any, num_outputs: Any,
) -> None:  # fmt: skip
    """``x W^T + bias``, then what `then` says, into `outs`, for one token or more; a phase of a `team`'s work.

    No configuration is looked at.
    """
    sums = np.empty(MOST_ROWS * BLOCK, np.float32)
    num_blocks = num_outputs // BLOCK
    each = _blocks_of_an_item(num_blocks, size_of_team(phase))
    num_items = (num_blocks + each - 1) // each
    item = claim(phase)
    while item < num_items:
        first, end = item * each, min((item + 1) * each, num_blocks)
        _multiply_blocks(x, weights, bias_O, then, others, outs, num_tokens, num_inputs, num_outputs, first, end, sums)
        done(phase)
        item = claim(phase)
    wait(phase, num_items)


@jit
def multiply_gate_and_up(
    phase: Any, _configuration: Any, x: Any, gate_weights: Any, gate_bias: Any,
    up_weights: Any, up_bias: Any, gate: Any, up: Any, num_tokens: Any, num_inputs: Any, num_outputs: Any,
) -> None:  # fmt: skip
    """``silu(x G^T + bias) * (x U^T + bias)`` into `up`, as one phase."""
    sums = np.empty(MOST_ROWS * BLOCK, np.float32)
    num_blocks = num_outputs // BLOCK
    each = _blocks_of_an_item(num_blocks, size_of_team(phase))
    num_items = (num_blocks + each - 1) // each
    item = claim(phase)
    while item < num_items:
        first, end = item * each, min((item + 1) * each, num_blocks)
        _multiply_blocks(
            x, gate_weights, gate_bias, _SILU, gate, gate, num_tokens, num_inputs, num_outputs, first, end, sums
        )
        _multiply_blocks(
            x, up_weights, up_bias, _TIMES, gate, up, num_tokens, num_inputs, num_outputs, first, end, sums
        )
        done(phase)
        item = claim(phase)
    wait(phase, num_items)


@jit
def copies_of(_num_keys: Any, _size: Any) -> Any:
    """See `amx_attention`: keys and values are read where they lie."""
    nothing = np.empty(0, np.uint32)
    return nothing, nothing


@jit
def make_ready(_seen: Any, _num_stretches: Any, _size: Any) -> None:
    """See `amx_attention`."""


@jit
def _four_places(seen: Any, stretch: Any) -> Any:
    """Where four stretches begin, from this one on."""
    places_N, head_at, at = seen[2], seen[3], seen[4] + stretch
    return (
        head_at + places_N[at],
        head_at + places_N[at + 1],
        head_at + places_N[at + 2],
        head_at + places_N[at + 3],
    )


@jit
def score(
    rows: Any, first: Any, apart: Any, num_rows: Any, seen: Any, num_stretches: Any, size: Any, scores: Any, width: Any
) -> None:
    """Scores, not scaled yet, of a tile of queries, which begin at number `first` and lie `apart`, `width` apart.

    The last turns fetch the first values.
    """
    keys, values, places_N, head_at, table = seen[:5]
    turns = (num_rows + MOST_ROWS - 1) // MOST_ROWS
    fours = num_stretches // 4 * 4
    for stretch in range(0, fours, 4):
        places = _four_places(seen, stretch)
        is_last = stretch + 4 == fours
        far, fetch_at = values if is_last else keys, _four_places(seen, 0 if is_last else stretch + 4)
        row = 0
        for turn in range(turns):
            count = (num_rows - row) // (turns - turn)
            dots_4_apart(count, rows, first + row * apart, apart, keys, places, VECTOR_BYTES, size // 2,
                         far, fetch_at, 1, scores, row * width + stretch * LANES, width)  # fmt: skip
            row += count
    for stretch in range(fours, num_stretches):
        soon = stretch + _STRETCHES_AHEAD
        far = keys if soon < num_stretches else values
        soon = soon if soon < num_stretches else min(soon - num_stretches, num_stretches - 1)
        fetch_at = head_at + places_N[table + soon]
        at = head_at + places_N[table + stretch]
        row = 0
        for turn in range(turns):
            count = (num_rows - row) // (turns - turn)
            dots_1(count, rows, first + row * apart, apart, keys, at, VECTOR_BYTES, size // 2,
                   far, fetch_at, 1, scores, row * width + stretch * LANES, width)  # fmt: skip
            row += count


@jit
def add_up(weights: Any, width: Any, num_rows: Any, seen: Any, num_stretches: Any, size: Any, sums: Any) -> None:
    """Of a tile of rows, the values by their weights. The last turns fetch the next head's first keys."""
    keys, values, places_N, head_at, table, next_head_at, next_table = seen[:7]
    turns = (num_rows + MOST_ROWS - 1) // MOST_ROWS
    sums[: num_rows * size] = np.float32(0.0)
    for stretch in range(num_stretches):
        soon = stretch + _STRETCHES_AHEAD
        if soon < num_stretches:
            far, fetch_at = values, head_at + places_N[table + soon]
        else:
            far = keys
            fetch_at = next_head_at + places_N[min(next_table + soon - num_stretches, places_N.size - 1)]
        at = head_at + places_N[table + stretch]
        row = 0
        for turn in range(turns):
            count = (num_rows - row) // (turns - turn)
            from_, to = row * width + stretch * LANES, row * size
            column = 0
            while column + BLOCK <= size:
                more_dots_4(count, weights, from_, width, values, at + 2 * column, 4 * size, LANES // 2,
                            far, fetch_at + LANES * column, 1, sums, to + column, size)  # fmt: skip
                column += BLOCK
            if column < size:
                more_dots_2(count, weights, from_, width, values, at + 2 * column, 4 * size, LANES // 2,
                            far, fetch_at + LANES * column, 1, sums, to + column, size)  # fmt: skip
            row += count
