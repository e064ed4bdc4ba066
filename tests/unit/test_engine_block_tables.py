"""Block tables: what a head may say, and that a contradiction changes nothing."""

from __future__ import annotations

import pytest

from molink_common.errors import ProtocolError
from molink_common.wire import Entry
from molink_stage_worker.engine.block_tables import BlockTables


def tables() -> BlockTables:
    return BlockTables(num_blocks=16, block_size=4, context_length=40)


def opening(sequence: int, count: int, *blocks: int, start: int = 0) -> Entry:
    return Entry(sequence=sequence, start=start, count=count, opens=True, new_blocks=blocks)


def test_rows_and_blocks_follow_the_entries() -> None:
    book = tables()
    book.apply([opening(1, 6, 3, 9)], ())
    placement = book.apply([Entry(sequence=1, start=6, count=1), opening(2, 5, 0, 5)], ())
    assert [(span.row, span.start, span.count, span.blocks.tolist()) for span in placement.spans] == [
        (0, 6, 1, [3, 9]),
        (1, 0, 5, [0, 5]),
    ]


def test_new_blocks_that_the_step_does_not_fill_are_cleared() -> None:
    book = tables()
    assert book.apply([opening(1, 6, 3, 9, 11)], ()).blocks_to_clear == (9, 11)
    assert book.apply([opening(2, 8, 1, 2)], ()).blocks_to_clear == ()


def test_blocks_of_a_shared_prefix_are_not_cleared() -> None:
    book = tables()
    book.apply([opening(1, 8, 3, 9)], ())
    assert book.apply([opening(2, 2, 3, 9, 4, start=8)], ()).blocks_to_clear == (4,)


def test_a_sequence_that_opens_again_in_its_middle_keeps_the_tokens_before() -> None:
    book = tables()
    book.apply([opening(1, 6, 3, 9)], ())
    assert book.apply([opening(1, 1, 3, 9, 4, start=6)], ()).blocks_to_clear == (4,)
    assert book.apply([opening(1, 1, 3, 9, 4, start=8)], ()).blocks_to_clear == (4,)


def test_a_sequence_may_go_back_and_write_over() -> None:
    book = tables()
    book.apply([opening(1, 7, 3, 9)], ())
    book.apply([Entry(sequence=1, start=4, count=2)], ())
    with pytest.raises(ProtocolError, match="only 6 tokens"):
        book.apply([Entry(sequence=1, start=7, count=1)], ())


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([Entry(sequence=9, start=0, count=1, new_blocks=(1,))], "not known"),
        ([Entry(sequence=1, start=6, count=1)], "only 5 tokens"),
        ([Entry(sequence=1, start=5, count=4)], "too few"),
        ([opening(3, 1, 16)], "KV block 16 of 16"),
        ([opening(3, 5, 2, 2)], "twice"),
        ([Entry(sequence=1, start=5, count=1, new_blocks=(3,))], "twice"),
        ([Entry(sequence=1, start=5, count=1), Entry(sequence=1, start=6, count=1)], "twice in a step"),
        ([opening(3, 4, 7), opening(4, 4, 7)], "of another"),
        ([opening(3, 41, *range(11))], "longer than the model"),
        ([Entry(sequence=1, start=5, count=1), Entry(sequence=2, start=0, count=1)], "not known"),
    ],
)
def test_a_contradiction_is_refused_and_changes_nothing(entries: list[Entry], says: str) -> None:
    book = tables()
    book.apply([opening(1, 5, 3, 9)], ())
    with pytest.raises(ProtocolError, match=says):
        book.apply(entries, [1] if entries[0].sequence == 9 else ())
    (span,) = book.apply([Entry(sequence=1, start=5, count=3)], ()).spans
    assert span.blocks.tolist() == [3, 9]
    assert len(book) == 1


def test_closing_forgets_and_ignores_strangers() -> None:
    book = tables()
    book.apply([opening(1, 5, 3, 9)], ())
    book.apply((), [1, 77])
    assert len(book) == 0
    with pytest.raises(ProtocolError, match="not known"):
        book.apply([Entry(sequence=1, start=5, count=1)], ())


def test_closing_and_going_on_in_one_step_contradict() -> None:
    book = tables()
    book.apply([opening(1, 5, 3, 9)], ())
    with pytest.raises(ProtocolError, match="not known"):
        book.apply([Entry(sequence=1, start=5, count=1)], [1])
    book.apply([Entry(sequence=1, start=5, count=1)], ())
