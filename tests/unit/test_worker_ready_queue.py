"""Whose turn it is in a stage's compute thread."""

from __future__ import annotations

from collections.abc import Sequence

from molink_common.wire import Traffic
from molink_stage_worker.company import DecodeRhythm
from molink_stage_worker.ready_queue import ReadyQueue


def alone(_taken: Sequence[str], _other: str) -> bool:
    return False


def test_decode_goes_first_and_each_class_keeps_its_order() -> None:
    queue: ReadyQueue[str] = ReadyQueue()
    for item, traffic in (("a", Traffic.BULK), ("b", Traffic.DECODE), ("c", Traffic.BULK), ("d", Traffic.DECODE)):
        queue.put(item, traffic)
    assert [queue.take(0.0, alone) for _ in range(5)] == [["b"], ["d"], ["a"], ["c"], []]


def test_a_chunk_is_passed_over_so_often_and_no_more() -> None:
    queue: ReadyQueue[str] = ReadyQueue(patience=2)
    for _ in range(5):
        queue.put("decode", Traffic.DECODE)
    queue.put("one", Traffic.BULK)
    queue.put("two", Traffic.BULK)
    taken = [queue.take(0.0, alone)[0] for _ in range(7)]
    assert taken == ["decode", "decode", "one", "decode", "decode", "two", "decode"]


def test_whatever_pays_is_taken_along() -> None:
    queue: ReadyQueue[int] = ReadyQueue()
    for item, traffic in ((1, Traffic.DECODE), (2, Traffic.DECODE), (3, Traffic.BULK), (4, Traffic.BULK)):
        queue.put(item, traffic)
    assert queue.take(0.0, lambda taken, other: sum(taken) + other <= 6) == [1, 2, 3]
    assert queue.take(0.0, lambda *_: True) == [4]


def test_a_chunk_waits_for_company_but_not_for_ever() -> None:
    queue: ReadyQueue[str] = ReadyQueue()
    queue.put("chunk", Traffic.BULK, alone_from_s=5.0)
    assert queue.take(4.9, alone) == []
    queue.put("decode", Traffic.DECODE)
    assert queue.take(4.9, alone) == ["decode"]
    assert queue.take(5.0, alone) == ["chunk"]
    queue.put("chunk", Traffic.BULK, alone_from_s=9.0)
    queue.put("decode", Traffic.DECODE)
    assert queue.take(6.0, lambda *_: True) == ["decode", "chunk"]


def test_company_is_waited_for_only_where_decode_steps_come_again_and_again() -> None:
    rhythm = DecodeRhythm()
    assert rhythm.patience_s(0.0) == 0.0
    for beat in range(20):
        rhythm.on_decode(0.03 * beat)
    last_s = 0.03 * 19
    assert 0.04 < rhythm.patience_s(last_s + 0.01) < 0.05
    assert 0.009 < rhythm.patience_s(last_s + 0.05) < 0.011
    assert rhythm.patience_s(last_s + 0.07) == 0.0
    rhythm.on_decode(last_s + 60.0)
    assert rhythm.patience_s(last_s + 60.0) <= 0.15
