"""Calls that descend further on the stack than an ordinary thread's has room for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

STACK_BYTES = 64 << 20
"""Reserved, not used: only what a call touches takes memory."""

T = TypeVar("T")
_starting = threading.Lock()


def call_on_deep_stack(function: Callable[[], T]) -> T:
    """What `function` returns or raises, run in a thread of its own with `STACK_BYTES` of stack. Blocks.

    For compilers in other languages that descend with what they are given: where the stack ends, so does the process,
    and an ordinary thread has between 0.5 and 8 MiB, as the platform likes.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # for the caller, who raises it again
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="deep-stack", daemon=True)
    with _starting:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return outcome.result()
