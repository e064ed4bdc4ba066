"""Sequences that are asked for again: by a gateway that missed tokens, or by one that goes on in place of another.

While a sequence runs, and after its end: for a minute if its client knows how to come back, else for seconds and in
memory only, for its own gateway.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from molink_common.messages import Failed, Resumed, ResumeSequence
from molink_scheduler.books import Books, EndedSequence, SequencePhase
from molink_scheduler.instructions import DeleteSequence, Instruction, ReplyTo, SaveSequence
from molink_scheduler.records import SequenceRecord

KEPT_S = 60.0
MOST_KEPT = 1024
RECENT_S = 15.0
MOST_RECENT = 1024


def keep(books: Books, record: SequenceRecord, generated: Sequence[int], now_s: float) -> Iterator[Instruction]:
    """Have a sequence ready that has ended; the oldest make room."""
    ended = EndedSequence(record=record, generated=tuple(generated), ended_s=now_s)
    if record.request.resume_state is not None:
        books.ended[record.request.sequence] = ended
    else:
        books.recent[record.request.sequence] = ended
        yield DeleteSequence(record.request.sequence)
    while len(books.recent) > MOST_RECENT:
        del books.recent[next(iter(books.recent))]
    while len(books.ended) > MOST_KEPT:
        yield from forget(books, next(iter(books.ended)))


def time_passed(books: Books, now_s: float) -> Iterator[Instruction]:
    """Nobody has asked for these."""
    while books.recent and now_s - next(iter(books.recent.values())).ended_s >= RECENT_S:
        del books.recent[next(iter(books.recent))]
    while books.ended and now_s - next(iter(books.ended.values())).ended_s >= KEPT_S:
        yield from forget(books, next(iter(books.ended)))


def forget(books: Books, sequence_id: str) -> Iterator[Instruction]:
    """Nobody will want an ended sequence any more. Unknown ids are ignored."""
    books.recent.pop(sequence_id, None)
    if books.ended.pop(sequence_id, None) is not None:
        yield DeleteSequence(sequence_id)


def resume(books: Books, asked: ResumeSequence, reply: int, now_s: float) -> Iterator[Instruction]:
    """Hand over what there is of a sequence; what comes later goes to the gateway that asks."""
    books.gateways_heard_s[asked.gateway] = now_s
    ended = books.ended.get(asked.sequence) or books.recent.get(asked.sequence)
    sequence = books.sequences.get(asked.sequence)
    record = ended.record if ended is not None else sequence.record if sequence is not None else None
    is_theirs = record is not None and asked.gateway == record.request.gateway
    is_anothers = record is not None and asked.tenant not in (None, record.request.tenant)
    if record is None or is_anothers or not (is_theirs or record.request.resume_state is not None):
        yield ReplyTo(reply, Failed(message=f"there is no sequence {asked.sequence} to go on with"))
    elif ended is not None:
        assert record.finish is not None, "kept because it has ended"
        yield ReplyTo(reply, Resumed(request=record.request, generated=ended.generated, finish=record.finish))
    elif sequence is None or sequence.phase is SequencePhase.SAVING:
        yield ReplyTo(reply, Failed(message=f"the sequence {asked.sequence} is not admitted yet"))
    else:
        if not is_theirs:
            request = record.request.model_copy(update={"gateway": asked.gateway})
            sequence.record = record.model_copy(update={"request": request})
            yield SaveSequence(sequence.record)
        yield ReplyTo(reply, Resumed(request=sequence.record.request, generated=tuple(sequence.generated)))
