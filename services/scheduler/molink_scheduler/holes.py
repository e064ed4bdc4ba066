"""Sequences that have ended, and of whose tokens this scheduler has missed some: while none was active, say.

Their gateways have most likely all of them, and nobody wants them again. So they are only put aside; whoever asks for
one has missed the same tokens, or goes on in place of a gateway, and then they are made again, as the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

from molink_scheduler import sequence_moves
from molink_scheduler.books import Books, Sequence, SequencePhase
from molink_scheduler.instructions import DeleteSequence, Instruction

KEPT_S = 60.0
MOST_KEPT = 1024


def put_aside(books: Books, sequence: Sequence, now_s: float) -> Iterator[Instruction]:
    """It has ended with a hole; the oldest make room."""
    sequence.move(SequencePhase.WAITING, now_s)
    sequence.confirmed_s, sequence.is_restored = None, False
    del books.sequences[sequence.id]
    books.holed[sequence.id] = sequence
    while len(books.holed) > MOST_KEPT:
        yield from forget(books, next(iter(books.holed)))


def asked_for(books: Books, sequence_id: str, now_s: float) -> Iterator[Instruction]:
    """Somebody wants it: have the tokens that were missed made again. Unknown ids are ignored."""
    sequence = books.holed.pop(sequence_id, None)
    if sequence is not None:
        books.sequences[sequence_id] = sequence
        yield from sequence_moves.start(books, sequence, now_s)


def forget(books: Books, sequence_id: str) -> Iterator[Instruction]:
    """Nobody will want it any more. Unknown ids are ignored."""
    if books.holed.pop(sequence_id, None) is not None:
        yield DeleteSequence(sequence_id)


def time_passed(books: Books, now_s: float) -> Iterator[Instruction]:
    """Nobody has asked for these."""
    while books.holed and now_s - next(iter(books.holed.values())).since_s >= KEPT_S:
        yield from forget(books, next(iter(books.holed)))
