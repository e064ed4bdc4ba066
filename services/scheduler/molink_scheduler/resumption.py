"""Streams that another gateway takes up: while they run, and for a minute after their end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from molink_common.messages import Failed, Resumed, ResumeSequence
from molink_scheduler.books import Books, EndedSequence, SequencePhase
from molink_scheduler.instructions import DeleteSequence, Instruction, ReplyTo, SaveSequence
from molink_scheduler.records import SequenceRecord

KEPT_S = 60.0
MOST_KEPT = 1024


def keep(books: Books, record: SequenceRecord, generated: Sequence[int], now_s: float) -> Iterator[Instruction]:
    """Have an ended sequence ready for whoever comes back for it; the oldest make room."""
    books.ended[record.request.sequence] = EndedSequence(record=record, generated=tuple(generated), ended_s=now_s)
    while len(books.ended) > MOST_KEPT:
        yield from forget(books, next(iter(books.ended)))


def time_passed(books: Books, now_s: float) -> Iterator[Instruction]:
    """Nobody has come back for these."""
    for sequence_id, ended in list(books.ended.items()):
        if now_s - ended.ended_s < KEPT_S:
            return
        yield from forget(books, sequence_id)


def forget(books: Books, sequence_id: str) -> Iterator[Instruction]:
    """Nobody will want an ended sequence any more. Unknown ids are ignored."""
    if books.ended.pop(sequence_id, None) is not None:
        yield DeleteSequence(sequence_id)


def resume(books: Books, asked: ResumeSequence, reply: int, now_s: float) -> Iterator[Instruction]:
    """Hand over what there is of a sequence; what comes later goes to the gateway that asks."""
    books.gateways_heard_s[asked.gateway] = now_s
    ended, sequence = books.ended.get(asked.sequence), books.sequences.get(asked.sequence)
    if ended is not None:
        finish = ended.record.finish
        assert finish is not None, "kept because it has ended"
        yield ReplyTo(reply, Resumed(request=ended.record.request, generated=ended.generated, finish=finish))
    elif sequence is None or sequence.phase is SequencePhase.SAVING or not sequence.is_resumable:
        yield ReplyTo(reply, Failed(message=f"there is no stream of the sequence {asked.sequence} to go on with"))
    else:
        if sequence.gateway != asked.gateway:
            request = sequence.record.request.model_copy(update={"gateway": asked.gateway})
            sequence.record = sequence.record.model_copy(update={"request": request})
            yield SaveSequence(sequence.record)
        yield ReplyTo(reply, Resumed(request=sequence.record.request, generated=tuple(sequence.generated)))
