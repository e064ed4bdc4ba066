"""Whose turn it is in a stage's compute thread."""

from __future__ import annotations

import pytest

from molink_common.wire import Traffic
from molink_stage_worker.ready_queue import ReadyQueue


def test_decode_goes_first_and_each_class_keeps_its_order() -> None:
    queue: ReadyQueue[str] = ReadyQueue()
    for item, traffic in (("a", Traffic.BULK), ("b", Traffic.DECODE), ("c", Traffic.BULK), ("d", Traffic.DECODE)):
        queue.put(item, traffic)
    assert [queue.take() for _ in range(4)] == ["b", "d", "a", "c"]
    with pytest.raises(IndexError):
        queue.take()


def test_a_chunk_is_passed_over_so_often_and_no_more() -> None:
    queue: ReadyQueue[str] = ReadyQueue(patience=2)
    for _ in range(5):
        queue.put("decode", Traffic.DECODE)
    queue.put("one", Traffic.BULK)
    queue.put("two", Traffic.BULK)
    assert [queue.take() for _ in range(7)] == ["decode", "decode", "one", "decode", "decode", "two", "decode"]
