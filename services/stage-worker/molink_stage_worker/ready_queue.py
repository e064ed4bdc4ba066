"""Steps that wait for a stage's compute thread: decode first, but a prompt's chunk is not passed over for ever."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from molink_common.wire import Traffic

T = TypeVar("T")


class ReadyQueue(Generic[T]):
    """First in first out within a class. Filled by one thread and emptied by another.

    After `patience` decode steps in a row one of class bulk goes first: a stage that is busy with decode all the
    time would else never get on with prompts.
    """

    def __init__(self, patience: int = 8) -> None:
        self._patience = patience
        self._decode: deque[T] = deque()
        self._bulk: deque[T] = deque()
        self._passed_over = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._decode) + len(self._bulk)

    def put(self, item: T, traffic: Traffic) -> None:
        """Add one at the end of its class."""
        with self._lock:
            (self._bulk if traffic is Traffic.BULK else self._decode).append(item)

    def take(self, pays_together: Callable[[Sequence[T], T], bool]) -> list[T]:
        """The one whose turn it is, and whatever waits and pays to be taken along. Nobody waits: an empty list."""
        with self._lock:
            if not self._decode and not self._bulk:
                return []
            taken = [self._first()]
            for waiting in (self._decode, self._bulk):
                while waiting and pays_together(taken, waiting[0]):
                    taken.append(waiting.popleft())
                    if waiting is self._bulk:
                        self._passed_over = 0
            return taken

    def _first(self) -> T:
        if self._bulk and (not self._decode or self._passed_over >= self._patience):
            self._passed_over = 0
            return self._bulk.popleft()
        self._passed_over += bool(self._bulk)
        return self._decode.popleft()
