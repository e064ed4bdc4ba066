"""A cancellation that comes while a library waits must not get lost.

`asyncio.wait_for` of Python 3.11 hands over a result that arrives at the same moment and forgets the cancellation, and
a connection that breaks while it is closed for one raises an error of its own instead. A task that was told to end and
was not heard works on for ever, and whoever waits for its end with it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def heeding_cancellation() -> Iterator[None]:
    """Around what awaits a library: leave with `CancelledError` if the task was cancelled, whatever else came out."""
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        yield
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError from error
        raise
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError
