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
        self._bulk: deque[tuple[T, float]] = deque()
        self._passed_over = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._decode) + len(self._bulk)

    def put(self, item: T, traffic: Traffic, *, alone_from_s: float = 0.0) -> None:
        """Add one at the end of its class. Of class bulk: only from `alone_from_s` on may it go without company."""
        with self._lock:
            if traffic is Traffic.BULK:
                self._bulk.append((item, alone_from_s))
            else:
                self._decode.append(item)

    def take(self, now_s: float, pays_together: Callable[[Sequence[T], T], bool]) -> list[T]:
        """The one whose turn it is, and whatever waits and pays to be taken along. Nobody can go: an empty list."""
        with self._lock:
            first = self._first(now_s)
            if first is None:
                return []
            taken = [first]
            while self._decode and pays_together(taken, self._decode[0]):
                taken.append(self._decode.popleft())
            while self._bulk and pays_together(taken, self._bulk[0][0]):
                taken.append(self._bulk.popleft()[0])
                self._passed_over = 0
            return taken

    def _first(self, now_s: float) -> T | None:
        bulk_may_go = bool(self._bulk) and now_s >= self._bulk[0][1]
        if bulk_may_go and (not self._decode or self._passed_over >= self._patience):
            self._passed_over = 0
            return self._bulk.popleft()[0]
        if not self._decode:
            return None
        self._passed_over += bulk_may_go
        return self._decode.popleft()
