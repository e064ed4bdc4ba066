"""What multiplies bfloat16 on this processor: AMX tiles, else dot products of pairs, else nothing that loops can use.

Both have the same functions; which ones they are is settled when this module is loaded. Tiles read weights where oneDNN
has laid them out, so nothing is held twice. How it does that is its own business, so it is looked at for every matrix.
Pairs read them in 12 bits each (`twelve_bits`), and then oneDNN has none.

Shapes: T tokens, I inputs, O outputs. bfloat16 as the integers of their bits.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import float32, int64, uint8, uint16

from molink_stage_worker.engine import amx_attention, amx_products, amx_tiles, dot_products, twelve_bits
from molink_stage_worker.engine.compiling import jit
from molink_stage_worker.engine.processor import has_pairs, has_tiles
from molink_stage_worker.engine.product_ends import Then
from molink_stage_worker.engine.team import PHASE, team_of

ROWS = amx_tiles.ROWS
"""Queries that attention takes at a time."""
DEPTH = amx_tiles.DEPTH
"""What inputs, and the numbers of a head, come in."""

_HAS_TILES = has_tiles()
MOST_ROWS = 256 if _HAS_TILES else sys.maxsize
"""More than that oneDNN computes faster on tiles: 512 take it 126 ms where the loops here need 163."""
BLOCK = amx_tiles.BLOCK if _HAS_TILES else twelve_bits.BLOCK
"""Outputs that lie side by side."""


@jit
def _configure_nothing(_configuration: Any) -> None:
    pass


@jit
def _release_nothing() -> None:
    pass


MOST_THREADS = 1 if _HAS_TILES else sys.maxsize
"""That share the work of a call. Tiles are so fast that one thread takes all that memory gives; more were not tried."""
multiply = amx_products.multiply if _HAS_TILES else dot_products.multiply
multiply_gate_and_up = amx_products.multiply_gate_and_up if _HAS_TILES else dot_products.multiply_gate_and_up
copies_of = amx_attention.copies_of if _HAS_TILES else dot_products.copies_of
make_ready = amx_attention.make_ready if _HAS_TILES else dot_products.make_ready
"""Before `score` and `add_up` of a key head's queries; `amx_attention` says what is seen."""
score = amx_attention.score if _HAS_TILES else dot_products.score
add_up = amx_attention.add_up if _HAS_TILES else dot_products.add_up
configure = amx_tiles.configure if _HAS_TILES else _configure_nothing
"""Before `score` and `add_up`: the one of `configurations` for their number of rows."""
release = amx_tiles.release if _HAS_TILES else _release_nothing
"""After them."""
configurations = amx_tiles.configurations


def is_here() -> bool:
    """Whether this processor has either."""
    return _HAS_TILES or has_pairs()


def may_share() -> bool:
    """Whether this thread's number of torch threads may share the work of a call."""
    return torch.get_num_threads() <= MOST_THREADS


@cache
def is_ready() -> bool:
    """Whether `product` can be used. Compiles, some seconds: not to be done by the first step."""
    if not is_here():
        return False
    numbers = uint16[::1]
    multiply.compile((PHASE, uint8[::1], numbers, numbers, float32[::1], int64, numbers, numbers, int64, int64, int64))
    return True


def product(
    x_TI: torch.Tensor, weights: Any, bias_O: Any, out_TO: torch.Tensor,
    then: Then = Then.NOTHING, other_TO: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """``x W^T + bias``, then what `then` says with `other_TO`, into `out_TO`, for 1 to `MOST_ROWS` tokens.

    Only where `may_share` allows it. Tensors lie row after row, without gaps. `weights` are those of `laid_out` or of
    `memory_of`; an empty bias, in float32, is none.
    """
    tokens, inputs = x_TI.shape
    other_TO = out_TO if other_TO is None else other_TO
    x, other, out = (tensor.view(torch.uint16).numpy().reshape(-1) for tensor in (x_TI, other_TO, out_TO))
    configuration = amx_tiles.configuration(min(tokens, ROWS))
    team_of(torch.get_num_threads()).run(
        multiply, 1, configuration, x, weights, bias_O, int(then), other, out, tokens, inputs, out_TO.shape[1],
        owner=weights,
    )  # fmt: skip


def laid_out(weight_OI: torch.Tensor) -> Any:
    """The numbers of a bfloat16 matrix as the loops read them; None where they want oneDNN's, or cannot read it."""
    return None if _HAS_TILES or not is_ready() else twelve_bits.pack(weight_OI)


def memory_of(packed: torch.Tensor, weight_OI: torch.Tensor) -> Any:
    """The numbers of a matrix that oneDNN has packed; None unless tiles can read them, lying as `in_blocks` has them.

    The first and the last block are looked at.
    """
    outputs, inputs = weight_OI.shape
    if not (_HAS_TILES and is_ready()) or outputs % BLOCK or inputs % DEPTH:
        return None
    if torch.ops.mkldnn._nbytes(packed) != 2 * weight_OI.numel():
        return None
    address = torch.ops.mkldnn.data_ptr(packed)
    numbers = np.ctypeslib.as_array((ctypes.c_uint16 * weight_OI.numel()).from_address(address))
    first, last = (in_blocks(part).numpy() for part in (weight_OI[:BLOCK], weight_OI[-BLOCK:]))
    lies_so = np.array_equal(numbers[: first.size], first) and np.array_equal(numbers[-last.size :], last)
    return numbers if lies_so else None


def in_blocks(weight_OI: torch.Tensor) -> torch.Tensor:
    """Weights as tiles read them: all inputs of a block of outputs, then of the next block.

    Within a block two inputs of an output are neighbours, as the instructions want them.
    """
    outputs, inputs = weight_OI.shape
    parts = weight_OI.contiguous().view(torch.uint16).view(outputs // BLOCK, BLOCK, inputs // 2, 2)
    return parts.permute(0, 2, 1, 3).reshape(-1)
