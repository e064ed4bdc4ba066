"""What follows a product of bfloat16 matrices before it is rounded, in compiled loops.

All arrays are flat; bfloat16 as the integers of their bits.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any

from llvmlite import ir
from numba import int64, types
from numba.core import cgutils
from numba.extending import intrinsic

from molink_stage_worker.engine.instructions import rounded, silu, widened
from molink_stage_worker.engine.vectors import FLOATS, HALVES, place_of


class Then(IntEnum):
    """What follows."""

    NOTHING = 0
    SILU = 1
    TIMES = 2
    """`other`, number by number."""
    PLUS = 3


@intrinsic
def finish(
    _context: Any, sums: Any, at: Any, bias_O: Any, column: Any, then: Any, others: Any, outs: Any, to: Any
) -> Any:
    """The sums of a token to 16 of its outputs, from `column` on, rounded once, to place `to`.

    `others` are read at the same place. An empty bias is none. Not a function that numba compiles: it would count who
    refers to each array at every call, which takes longer than all the rest.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums_kind, _, bias_kind, _, _, others_kind, outs_kind, _ = signature.args
        sums, at, bias_O, column, then, others, outs, to = arguments

        def at_place(kind: Any, array: Any, at: Any, vector: Any) -> Any:
            return place_of(builder, context, kind, array, at, vector)

        value = cgutils.alloca_once(builder, FLOATS)
        builder.store(builder.load(at_place(sums_kind, sums, at, FLOATS), align=4), value)
        size = context.make_array(bias_kind)(context, builder, bias_O).nitems
        with builder.if_then(builder.icmp_signed(">", size, ir.IntType(64)(0))):
            bias = builder.load(at_place(bias_kind, bias_O, column, FLOATS), align=4)
            builder.store(builder.fadd(builder.load(value), bias), value)

        def other() -> Any:
            return widened(builder, builder.load(at_place(others_kind, others, to, HALVES), align=2))

        ends: dict[Then, Callable[[Any], Any]] = {
            Then.SILU: lambda x: silu(builder, x),
            Then.TIMES: lambda x: builder.fmul(x, other()),
            Then.PLUS: lambda x: builder.fadd(x, other()),
        }
        for which, end in ends.items():
            with builder.if_then(builder.icmp_signed("==", then, ir.IntType(64)(int(which)))):
                builder.store(end(builder.load(value)), value)
        builder.store(rounded(builder, builder.load(value)), at_place(outs_kind, outs, to, HALVES), align=2)
        return context.get_dummy_value()

    return types.none(sums, int64, bias_O, int64, int64, others, outs, int64), generate
