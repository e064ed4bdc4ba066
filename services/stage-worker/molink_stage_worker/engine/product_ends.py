"""What follows a product of bfloat16 matrices before it is rounded, in compiled loops.

All arrays are flat; bfloat16 as the integers of their bits.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from molink_stage_worker.engine.compiling import jit
from molink_stage_worker.engine.vectors import add_to, write, write_product, write_silu, write_sum


class Then(IntEnum):
    """What follows."""

    NOTHING = 0
    SILU = 1
    TIMES = 2
    """`other`, number by number."""
    PLUS = 3


@jit
def finish(sums: Any, at: Any, bias_O: Any, column: Any, then: Any, others: Any, outs: Any, to: Any) -> None:
    """The sums of a token to 16 of its outputs, from `column` on, rounded once, to place `to`.

    `others` are read at the same place. An empty bias is none.
    """
    if bias_O.size > 0:
        add_to(sums, at, bias_O, column)
    if then == Then.SILU:
        write_silu(sums, at, others, outs, to)
    elif then == Then.TIMES:
        write_product(sums, at, others, outs, to)
    elif then == Then.PLUS:
        write_sum(sums, at, others, outs, to)
    else:
        write(sums, at, others, outs, to)
