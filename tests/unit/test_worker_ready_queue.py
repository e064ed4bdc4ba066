"""Whose turn it is in a stage's compute thread."""

from __future__ import annotations

from collections.abc import Sequence

from molink_common.wire import Traffic
from molink_stage_worker.ready_queue import ReadyQueue


def alone(_taken: Sequence[str], _other: str) -> bool:
    return False


def test_decode_goes_first_and_each_class_keeps_its_order() -> None:
    queue: ReadyQueue[str] = ReadyQueue()
    for item, traffic in (("a", Traffic.BULK), ("b", Traffic.DECODE), ("c", Traffic.BULK), ("d", Traffic.DECODE)):
        queue.put(item, traffic)
    assert [queue.take(alone) for _ in range(5)] == [["b"], ["d"], ["a"], ["c"], []]


def test_a_chunk_is_passed_over_so_often_and_no_more() -> None:
    queue: ReadyQueue[str] = ReadyQueue(patience=2)
    for _ in range(5):
        queue.put("decode", Traffic.DECODE)
    queue.put("one", Traffic.BULK)
    queue.put("two", Traffic.BULK)
    taken = [queue.take(alone)[0] for _ in range(7)]
    assert taken == ["decode", "decode", "one", "decode", "decode", "two", "decode"]


def test_whatever_pays_is_taken_along() -> None:
    queue: ReadyQueue[int] = ReadyQueue()
    for item, traffic in ((1, Traffic.DECODE), (2, Traffic.DECODE), (3, Traffic.BULK), (4, Traffic.BULK)):
        queue.put(item, traffic)
    assert queue.take(lambda taken, other: sum(taken) + other <= 6) == [1, 2, 3]
    assert queue.take(lambda *_: True) == [4]
