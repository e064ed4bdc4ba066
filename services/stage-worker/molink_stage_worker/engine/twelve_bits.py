"""bfloat16 weights in 12 bits each, without loss.

A decode step reads every weight once, and memory is slower than the processor. The upper byte of a weight, its sign and
most of its exponent, hardly ever is anything else than one of some fifteen: a quarter of all bytes says nothing. So a
number of four bits stands for it, and two instructions for 64 weights look it up. The weights that no number stands for
(one in some thousand) are 0 where they should be, and come after the others, each with its place.

Memory, in numbers of 16 bits: *blocks* of `BLOCK` outputs one after the other, then what is left out. A block is a
head of `HEAD` numbers and, for every pair of inputs, `PAIR` numbers: the lower bytes of 128 weights, then 64 bytes with
the four-bit numbers of two weights each. They lie so that interleaving lower and upper bytes gives four *vectors*, each
the pairs of 16 outputs, as `dots` multiplies them.

Shapes: O outputs, I inputs. bfloat16 as the integers of their bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils

from molink_stage_worker.engine.compiling import jit
from molink_stage_worker.engine.instructions import call, widened

BLOCK = 64
"""Outputs."""
HEAD = 32
"""Numbers of a block's head, a cache line: 16 upper bytes; then in 64 bits each, how many weights are left out, and how
many numbers behind the head's beginning the first of them is."""
PAIR = 96
"""Numbers of two inputs of a block: three cache lines."""
LINES = 3
LEFT_OUT = 3
"""Numbers of a weight that is left out: its input, its output in the block, its bits."""
_COUNT_AT, _PLACE_AT = 8, 12
_UPPER_BYTES = 16
_NOT_THERE = 255
_MOST_LEFT_OUT = 1 / 128
"""Of all weights. Each costs as much as some ten others; trained weights have a tenth of that."""
_MOST_INPUTS = 1 << 16
_LINE_NUMBERS = 32


def pack(weight_OI: torch.Tensor) -> Any:
    """The memory of a matrix, or None where its weights are not for 12 bits: the shape is odd, or too much left out."""
    outputs, inputs = weight_OI.shape
    if outputs % BLOCK or inputs % 2 or inputs > _MOST_INPUTS:
        return None
    bits_OI = weight_OI.detach().contiguous().view(torch.uint16).numpy()
    blocks = outputs // BLOCK
    uppers_BU, counts_B = np.zeros((blocks, _UPPER_BYTES), np.uint8), np.zeros(blocks, np.int64)
    _look(bits_OI, uppers_BU, counts_B)
    if counts_B.sum() > weight_OI.numel() * _MOST_LEFT_OUT:
        return None
    block_numbers = HEAD + inputs // 2 * PAIR
    size = blocks * block_numbers + int(counts_B.sum()) * LEFT_OUT
    # torch's memory begins with a cache line
    packed = torch.zeros(-(-size // _LINE_NUMBERS) * _LINE_NUMBERS, dtype=torch.uint16).numpy()
    _fill(bits_OI, uppers_BU, counts_B, block_numbers, packed)
    return packed


@jit
def _look(bits_OI: Any, uppers_BU: Any, counts_B: Any) -> None:
    """The upper bytes that each block has a number for, 0 first and the most frequent next, and how many are left."""
    inputs = bits_OI.shape[1]
    for block in range(len(uppers_BU)):
        often = np.zeros(256, np.int64)
        for output in range(block * BLOCK, (block + 1) * BLOCK):
            for i in range(inputs):
                often[bits_OI[output, i] >> 8] += 1
        often[0] = 0
        for number in range(1, _UPPER_BYTES):
            most = np.argmax(often)
            uppers_BU[block, number] = most
            often[most] = 0
        counts_B[block] = often.sum()


@jit
def _fill(bits_OI: Any, uppers_BU: Any, counts_B: Any, block_numbers: Any, packed: Any) -> None:
    inputs = bits_OI.shape[1]
    bytes_ = packed.view(np.uint8)
    left_out_at = len(uppers_BU) * block_numbers
    for block in range(len(uppers_BU)):
        at = block * block_numbers
        number_of = np.full(256, _NOT_THERE, np.uint8)
        for number in range(_UPPER_BYTES - 1, -1, -1):
            upper = uppers_BU[block, number]
            bytes_[2 * at + number] = upper
            number_of[upper] = number
        for part in range(4):
            packed[at + _COUNT_AT + part] = (counts_B[block] >> (16 * part)) & 0xFFFF
            packed[at + _PLACE_AT + part] = ((left_out_at - at) >> (16 * part)) & 0xFFFF
        for output in range(BLOCK):
            vector, lane = output // 16, output % 16
            for i in range(inputs):
                bits = bits_OI[block * BLOCK + output, i]
                number = number_of[bits >> 8]
                lower = bits & 0xFF
                if number == _NOT_THERE:
                    packed[left_out_at], packed[left_out_at + 1], packed[left_out_at + 2] = i, output, bits
                    left_out_at += LEFT_OUT
                    number, lower = 0, 0
                # within 16 bytes, interleaving takes the first eight to one vector and the others to the next
                word = 2 * lane + i % 2
                byte = word // 8 * 16 + vector % 2 * 8 + word % 8
                begin = 2 * (at + HEAD + i // 2 * PAIR)
                bytes_[begin + vector // 2 * 64 + byte] = lower
                bytes_[begin + 128 + byte] |= number << (4 * (vector // 2))


_BYTE, _NUMBER, _WORD, _PLACE = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_LANES, _BYTES = 16, 64
_SIXTEEN, _MANY, _NUMBERS = ir.VectorType(_BYTE, _LANES), ir.VectorType(_BYTE, _BYTES), ir.VectorType(_NUMBER, 32)
_PAIRS = ir.VectorType(_WORD, _LANES)


class Reader:
    """Writes down, for LLVM, how a block is read."""

    def __init__(self, builder: Any, block: Any) -> None:
        """`block` is its address."""
        self._builder, self._block = builder, block
        uppers = self._load(block, 0, _SIXTEEN)
        everywhere = ir.Constant(ir.VectorType(_WORD, _BYTES), list(range(_LANES)) * 4)
        self._uppers = builder.shuffle_vector(uppers, uppers, everywhere)

    def vectors_at(self, pair: Any) -> list[Any]:
        """The four vectors of a pair of inputs, by its number."""
        builder = self._builder
        begin = builder.gep(self._block, [builder.mul(pair, _PLACE(2 * PAIR))])
        lower_1, lower_2, numbers = (self._load(begin, 2 * HEAD + _BYTES * line, _MANY) for line in range(LINES))
        shifted = builder.bitcast(builder.lshr(builder.bitcast(numbers, _NUMBERS), _NUMBERS([4] * 32)), _MANY)
        vectors = []
        for lower, number in ((lower_1, numbers), (lower_2, shifted)):
            upper = self._looked_up(builder.and_(number, _MANY([15] * _BYTES)))
            vectors += [self._interleaved(lower, upper, half) for half in range(2)]
        return vectors

    def add_left_out(self, rows: list[Any], sums: list[Any]) -> None:
        """To the sums of each row of activations, what the weights add that are left out; both are addresses."""
        builder = self._builder
        count, place = (self._load(self._block, 2 * at, _PLACE) for at in (_COUNT_AT, _PLACE_AT))
        first = builder.gep(self._block, [builder.mul(place, _PLACE(2))])
        with cgutils.for_range(builder, count) as loop:
            one = builder.gep(first, [builder.mul(loop.index, _PLACE(2 * LEFT_OUT))])
            i, output, weight = (self._load(one, 2 * part, _NUMBER) for part in range(LEFT_OUT))
            x_at, sum_at = (
                builder.mul(builder.zext(index, _PLACE), _PLACE(size)) for index, size in ((i, 2), (output, 4))
            )
            for row, sums_of_row in zip(rows, sums, strict=True):
                x = self._load(builder.gep(row, [x_at]), 0, _NUMBER)
                there = builder.bitcast(builder.gep(sums_of_row, [sum_at]), ir.FloatType().as_pointer())
                # not left to LLVM, which could join both operations for some numbers of rows and not for others
                sum_ = call(builder, "fma", widened(builder, x), widened(builder, weight), builder.load(there, align=4))
                builder.store(sum_, there, align=4)

    def _load(self, address: Any, offset: int, kind: Any) -> Any:
        there = self._builder.gep(address, [_PLACE(offset)])
        return self._builder.load(self._builder.bitcast(there, kind.as_pointer()), align=1)

    def _looked_up(self, numbers: Any) -> Any:
        function_type = ir.FunctionType(_MANY, [_MANY, _MANY])
        look_up = cgutils.get_or_insert_function(self._builder.module, function_type, "llvm.x86.avx512.pshuf.b.512")
        return self._builder.call(look_up, [self._uppers, numbers])

    def _interleaved(self, lower: Any, upper: Any, half: int) -> Any:
        """Of each 16 bytes the first or the second half."""
        places = [16 * (byte // 16) + 8 * half + byte % 16 // 2 + _BYTES * (byte % 2) for byte in range(_BYTES)]
        mask = ir.Constant(ir.VectorType(_WORD, _BYTES), places)
        return self._builder.bitcast(self._builder.shuffle_vector(lower, upper, mask), _PAIRS)
