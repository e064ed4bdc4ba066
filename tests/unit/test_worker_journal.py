"""What a stage keeps of what it has sent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molink_stage_worker.journal import Journal

ROW = 3


def rows(start: int, count: int, version: int = 0) -> memoryview:
    return memoryview(
        b"".join(bytes([version, position % 256, position // 256]) for position in range(start, start + count))
    )


def kept_rows(start: int, count: int, version: int = 0) -> bytes:
    return bytes(rows(start, count, version))


def test_rows_come_back_whatever_chunks_they_came_in() -> None:
    journal = Journal()
    for start, count in ((0, 5), (5, 1), (6, 1), (7, 9)):
        journal.record(7, start, count, rows(start, count))
    assert journal.replay(7, 0, 16) == kept_rows(0, 16)
    assert journal.replay(7, 4, 3) == kept_rows(4, 3)
    assert journal.replay(7, 8, 8) == kept_rows(8, 8)
    assert journal.replay(7, 8, 9) is None
    assert journal.replay(8, 0, 1) is None
    journal.check_invariants()


def test_what_is_written_again_ends_the_prefix_there() -> None:
    journal = Journal()
    journal.record(7, 0, 8, rows(0, 8))
    journal.record(7, 8, 1, rows(8, 1))
    journal.record(7, 5, 2, rows(5, 2, version=1))
    assert journal.num_tokens(7) == 7
    assert journal.replay(7, 4, 3) == bytes(rows(4, 1)) + bytes(rows(5, 2, version=1))
    journal.record(7, 0, 1, rows(0, 1, version=2))
    assert journal.replay(7, 0, 1) == kept_rows(0, 1, version=2)
    assert journal.replay(7, 0, 2) is None
    journal.check_invariants()


def test_a_hole_drops_the_sequence_until_it_opens_again() -> None:
    journal = Journal()
    journal.record(7, 0, 4, rows(0, 4))
    journal.record(7, 5, 1, rows(5, 1))
    assert journal.num_tokens(7) == 0
    journal.record(7, 4, 1, rows(4, 1))
    assert journal.num_tokens(7) == 0
    journal.record(7, 0, 2, rows(0, 2))
    assert journal.num_tokens(7) == 2
    assert Journal(0).size_bytes == 0


def test_who_has_not_grown_for_longest_is_dropped_first() -> None:
    journal = Journal(1000)
    for sequence in (1, 2, 3):
        journal.record(sequence, 0, 40, rows(0, 40))
    journal.record(1, 40, 1, rows(40, 1))
    assert [journal.num_tokens(sequence) for sequence in (1, 2, 3)] == [41, 40, 40]
    journal.record(4, 0, 60, rows(0, 60))
    assert [journal.num_tokens(sequence) for sequence in (1, 2, 3, 4)] == [41, 0, 40, 60]
    journal.record(5, 0, 400, rows(0, 400))
    assert journal.size_bytes == 0, "larger than the whole journal"
    journal.forget((1, 9))
    journal.check_invariants()


def test_a_journal_without_room_keeps_nothing() -> None:
    journal = Journal(0)
    journal.record(1, 0, 1, rows(0, 1))
    assert journal.num_tokens(1) == 0
    with pytest.raises(ValueError, match="capacity"):
        Journal(-1)


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 30), st.integers(1, 12), st.booleans()), max_size=50),
    st.integers(0, 3000),
)
def test_what_is_replayed_is_what_was_recorded_last(moves: list[tuple[int, int, int, bool]], capacity: int) -> None:
    journal = Journal(capacity)
    written: dict[int, dict[int, int]] = {}
    for version, (sequence, start, count, forgets) in enumerate(moves):
        if forgets:
            journal.forget((sequence,))
        else:
            journal.record(sequence, start, count, rows(start, count, version % 256))
            written.setdefault(sequence, {}).update(dict.fromkeys(range(start, start + count), version % 256))
        journal.check_invariants()
        for one, versions in written.items():
            kept = journal.num_tokens(one)
            for first in range(0, kept, 5):
                found = journal.replay(one, first, kept - first)
                expected = b"".join(bytes(rows(position, 1, versions[position])) for position in range(first, kept))
                assert found == expected
