"""What a stage keeps of what it has sent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molink_common.wire import Entry
from molink_stage_worker.journal import Journal

ROW = 3
BLOCK = 4


class Written:
    """A journal, and a table for each sequence as the head would give it: block 0 of sequence 7 is 700."""

    def __init__(self, capacity_bytes: int = 1 << 20) -> None:
        self.journal = Journal(capacity_bytes, BLOCK)
        self.tables: dict[int, list[int]] = {}

    def record(self, sequence: int, start: int, count: int, version: int = 0, *, opens: bool = False) -> None:
        table = self.tables.setdefault(sequence, [])
        opens = opens or not table or not start
        needed = range(len(table), -(-(start + count) // BLOCK))
        table += [sequence * 100 + index for index in needed]
        new_blocks = tuple(table) if opens else tuple(table[needed.start :])
        entry = Entry(sequence=sequence, start=start, count=count, opens=opens, new_blocks=new_blocks)
        self.journal.record(entry, rows(start, count, version))
        self.journal.check_invariants()


def rows(start: int, count: int, version: int = 0) -> memoryview:
    return memoryview(
        b"".join(bytes([version, position % 256, position // 256]) for position in range(start, start + count))
    )


def kept_rows(start: int, count: int, version: int = 0) -> bytes:
    return bytes(rows(start, count, version))


def test_rows_come_back_whatever_chunks_they_came_in() -> None:
    written = Written()
    for start, count in ((0, 5), (5, 1), (6, 1), (7, 9)):
        written.record(7, start, count)
    journal = written.journal
    assert journal.replay(7, 0, 16) == kept_rows(0, 16)
    assert journal.replay(7, 4, 3) == kept_rows(4, 3)
    assert journal.replay(7, 5, 9) == kept_rows(5, 9)
    assert journal.replay(7, 8, 9) is None
    assert journal.replay(8, 0, 1) is None


def test_what_is_written_again_ends_the_prefix_there() -> None:
    written = Written()
    written.record(7, 0, 8)
    written.record(7, 8, 1)
    written.record(7, 5, 2, version=1)
    journal = written.journal
    assert journal.num_tokens(7) == 7
    assert journal.replay(7, 4, 3) == kept_rows(4, 1) + kept_rows(5, 2, version=1)
    written.record(7, 0, 1, version=2)
    assert journal.replay(7, 0, 1) == kept_rows(0, 1, version=2)
    assert journal.replay(7, 0, 2) is None


def test_who_opens_again_in_its_middle_keeps_what_is_before() -> None:
    written = Written()
    written.record(7, 0, 11)
    written.record(7, 6, 1, version=1, opens=True)
    assert written.journal.num_tokens(7) == 7
    assert written.journal.replay(7, 2, 5) == kept_rows(2, 4) + kept_rows(6, 1, version=1)


def test_a_hole_ends_the_prefix_until_it_opens_again() -> None:
    written = Written()
    written.record(7, 0, 4)
    written.record(7, 5, 1)
    assert written.journal.num_tokens(7) == 4
    written.record(7, 6, 6)
    assert written.journal.num_tokens(7) == 4
    written.record(7, 4, 2, opens=True)
    assert written.journal.num_tokens(7) == 6


def test_who_has_not_grown_for_longest_is_dropped_first_from_its_end_on() -> None:
    written = Written(2000)
    journal = written.journal
    for sequence in (1, 2, 3):
        written.record(sequence, 0, 8)
    written.record(1, 8, 1)
    assert [journal.num_tokens(sequence) for sequence in (1, 2, 3)] == [9, 8, 8]
    written.record(4, 0, 4)
    assert [journal.num_tokens(sequence) for sequence in (1, 2, 3, 4)] == [9, 4, 8, 4]
    written.record(2, 8, 4)
    assert journal.num_tokens(2) == 4, "it has a hole"
    written.record(5, 0, 100)
    assert journal.num_tokens(5) == 28, "as much as there is room for"


def test_what_one_leaves_another_may_begin_with() -> None:
    journal = Journal(1 << 20, BLOCK)
    journal.record(Entry(sequence=1, start=0, count=10, opens=True, new_blocks=(5, 6, 7)), rows(0, 10))
    journal.forget((1, 9))
    assert journal.replay(1, 0, 1) is None
    journal.record(Entry(sequence=2, start=8, count=3, opens=True, new_blocks=(5, 6, 8)), rows(8, 3, 1))
    assert journal.replay(2, 0, 11) == kept_rows(0, 8) + kept_rows(8, 3, version=1)
    journal.record(Entry(sequence=3, start=0, count=1, opens=True, new_blocks=(6, 7)), rows(0, 1, 2))
    assert journal.num_tokens(3) == 1, "what a block held before is of no use"
    assert journal.replay(2, 0, 8) is None
    journal.record(Entry(sequence=4, start=4, count=1, opens=True, new_blocks=(9, 10)), rows(4, 1))
    assert journal.replay(4, 4, 1) is None, "nobody has filled its first block"
    journal.check_invariants()


def test_a_journal_without_room_keeps_nothing() -> None:
    written = Written(0)
    written.record(1, 0, 1)
    assert written.journal.num_tokens(1) == written.journal.size_bytes == 0
    with pytest.raises(ValueError, match="capacity"):
        Journal(-1, BLOCK)


@given(
    st.lists(
        st.tuples(
            st.integers(1, 3), st.integers(0, 30), st.integers(1, 12), st.sampled_from(("grow", "open", "forget"))
        ),
        max_size=50,
    ),
    st.integers(0, 3000),
)
def test_what_is_replayed_is_what_was_recorded_last(moves: list[tuple[int, int, int, str]], capacity: int) -> None:
    written = Written(capacity)
    versions: dict[int, dict[int, int]] = {}
    for version, (sequence, start, count, move) in enumerate(moves):
        if move == "forget":
            written.journal.forget((sequence,))
            written.tables.pop(sequence, None)
        else:
            written.record(sequence, start, count, version % 256, opens=move == "open")
            versions.setdefault(sequence, {}).update(dict.fromkeys(range(start, start + count), version % 256))
        for one, known in versions.items():
            kept = written.journal.num_tokens(one)
            for first in range(0, kept, 5):
                found = written.journal.replay(one, first, kept - first)
                assert found == b"".join(kept_rows(position, 1, known[position]) for position in range(first, kept))
