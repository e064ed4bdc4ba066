"""Several threads for one call of compiled loops.

All of them run the same function on the same arguments. Its work comes in phases, a phase in items, and whoever is free
claims the next item; a phase has ended when all its items are done, which is what everybody waits for, and not when
everybody has come. So a thread that wakes up late, or whose processor is somebody else's just now, holds nobody up but
for the item in its hand: what others have done before it came it only runs past. What it reads meanwhile may be of a
later phase; it has no item to use it for.

Between two calls the helpers sleep. Within one they wait by turning round, since a phase takes microseconds; for longer
than some of them they let others have the processor.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import int32, int64, types
from numba.core import cgutils
from numba.extending import intrinsic

from molink_stage_worker.engine.compiling import jit

_LINE = 8
"""Numbers of a cache line: counters that are written together with others would be waited for together."""
_CLAIMED, _DONE = 0, _LINE
_PHASE = 2 * _LINE
PHASE = types.Tuple((int64[::1], int64, int64))
"""What functions whose work is shared take first: the counters of all phases, the team's size, the phase's number."""
_TURNS = 500
"""Of waiting before the processor is offered to others: some ten microseconds."""


class Team:
    """A number of threads, the caller's own included. Of calls at the same time, helpers take one after the other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._calls: list[queue.SimpleQueue[tuple[Any, ...]]] = [queue.SimpleQueue() for _ in range(size - 1)]
        for number, calls in enumerate(self._calls):
            threading.Thread(target=_help, args=(calls,), name=f"loops-{number + 1}", daemon=True).start()

    def run(self, function: Callable[..., None], num_phases: int, *arguments: Any, owner: object) -> None:
        """Call ``function(phase, *arguments)`` with the first phase in all threads; returns when its work is done.

        Arguments, and the owner of what they only point to, are kept until the last thread has left.
        """
        first = (np.zeros(num_phases * _PHASE, np.int64), self.size, 0)
        for calls in self._calls:
            calls.put((owner, function, first, *arguments))
        function(first, *arguments)


@cache
def team_of(size: int) -> Team:
    """The process's team of that size."""
    return Team(size)


def _help(calls: queue.SimpleQueue[tuple[Any, ...]]) -> None:
    while True:
        owner, function, *arguments = calls.get()
        function(*arguments)
        del owner, arguments


@intrinsic
def _add(_context: Any, counters: Any, place: Any, number: Any) -> Any:
    """Add to a counter that others add to as well; gives what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", builder.gep(view.data, [arguments[1]]), arguments[2], "seq_cst")

    return int64(counters, int64, int64), generate


@intrinsic
def _read(_context: Any, counters: Any, place: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.load_atomic(builder.gep(view.data, [arguments[1]]), "seq_cst", 8)

    return int64(counters, int64), generate


@intrinsic
def _pause(_context: Any) -> Any:
    """Tell the processor that this turn is only waiting."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        function_type = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, function_type, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.none(), generate


if sys.platform == "win32":

    @jit
    def _let_others() -> None:
        _pause()

else:
    _yield = types.ExternalFunction("sched_yield", int32())

    @jit
    def _let_others() -> None:
        _yield()


@jit
def later(phase: Any, count: Any) -> Any:
    """The phase that comes so many after this one."""
    return phase[0], phase[1], phase[2] + count


@jit
def size_of_team(phase: Any) -> Any:
    """How many share it."""
    return phase[1]


@jit
def claim(phase: Any) -> Any:
    """The next item of a phase; it may be one that there is not."""
    return _add(phase[0], phase[2] * _PHASE + _CLAIMED, 1)


@jit
def done(phase: Any) -> None:
    """An item that was claimed is done."""
    _add(phase[0], phase[2] * _PHASE + _DONE, 1)


@jit
def wait(phase: Any, num_items: Any) -> None:
    """Until all items of a phase are done."""
    turns = 0
    while _read(phase[0], phase[2] * _PHASE + _DONE) < num_items:
        turns += 1
        if turns < _TURNS:
            _pause()
        else:
            _let_others()
