"""A CPU's matrix tiles (AMX: Intel since Sapphire Rapids) for compiled loops.

Instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18. A tile has 16 rows of
64 bytes; one instruction adds the product of 16 rows of 32 activations and a tile of 32 × 16 weights to 16 × 16 sums in
float32. Which of the eight tiles is which: see `configuration`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import int64, types
from numba.core import cgutils
from numba.extending import intrinsic

from molink_stage_worker.engine.vectors import address_in

ROWS = 16
"""Tokens of a tile of activations, outputs of a tile of weights."""
DEPTH = 32
"""Inputs of a tile."""
ROW_BYTES = 64
BLOCK = 32
"""Outputs that oneDNN lays side by side: two tiles, whose rows take turns."""
BLOCK_ROW_BYTES = 128
BLOCK_NUMBERS = BLOCK * DEPTH


@cache
def configurations() -> Any:
    """`configuration` for 0 to 16 rows, one after the other."""
    return np.stack([configuration(rows) for rows in range(ROWS + 1)])


@cache
def configuration(num_rows: int) -> Any:
    """How the eight tiles are used: 0 to 3 sums and 4, 5 activations of `num_rows` rows; 6, 7 weights."""
    words = np.zeros(64, np.uint8)
    words[0] = 1  # the only palette there is
    row_bytes, rows = words[16:32].view(np.uint16), words[48:56]
    row_bytes[:] = ROW_BYTES
    rows[:6], rows[6:] = num_rows, ROWS
    return words


def _call(builder: Any, name: str, arguments: Any) -> None:
    function_type = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, function_type, f"llvm.x86.{name}"), arguments)


def _tile(number: int) -> Any:
    return ir.IntType(8)(number)


def _moving(name: str, number: int) -> Any:
    @intrinsic
    def move(_context: Any, array: Any, place: Any, row_bytes: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address = address_in(context, builder, signature.args[0], arguments[0], arguments[1])
            _call(builder, name, [_tile(number), address, arguments[2]])
            return context.get_dummy_value()

        return types.none(array, int64, int64), generate

    return move


def _on_tiles(name: str, *numbers: int) -> Any:
    @intrinsic
    def act(_context: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
            _call(builder, name, [_tile(number) for number in numbers])
            return context.get_dummy_value()

        return types.none(), generate

    return act


@intrinsic
def configure(_context: Any, words: Any) -> Any:
    """Take `configuration` into use; clears all tiles."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = address_in(context, builder, signature.args[0], arguments[0], ir.IntType(64)(0))
        _call(builder, "ldtilecfg", [address])
        return context.get_dummy_value()

    return types.none(words), generate


release = _on_tiles("tilerelease")
clear_0, clear_1, clear_2, clear_3 = (_on_tiles("tilezero", number) for number in range(4))
store_0, store_1, store_2, store_3 = (_moving("tilestored64", number) for number in range(4))
load_4, load_5, load_6, load_7 = (_moving("tileloadd64", number) for number in range(4, 8))
add_0_of_4_6, add_1_of_4_7, add_2_of_4_6, add_3_of_4_7, add_2_of_5_6, add_3_of_5_7 = (
    _on_tiles("tdpbf16ps", *numbers) for numbers in ((0, 4, 6), (1, 4, 7), (2, 4, 6), (3, 4, 7), (2, 5, 6), (3, 5, 7))
)
