"""Decisions about sequences: admission, start, tokens, end, and comparing the books with the head's."""

from __future__ import annotations

from collections.abc import Iterator

from molink_common.messages import (
    Admitted,
    RefusalCode,
    Refused,
    SequenceFailed,
    SequencesHeld,
    StartSequence,
    StepTokens,
    StopSequence,
    SubmitSequence,
)
from molink_scheduler.admission import why_refused
from molink_scheduler.books import PIPELINE, Books, Sequence, SequencePhase
from molink_scheduler.fitness import pool_card
from molink_scheduler.instructions import (
    AppendTokens,
    AskSequencesOf,
    DeleteSequence,
    FailSequence,
    Instruction,
    ReplyTo,
    SaveSequence,
    StartSequenceAt,
    StopSequenceAt,
)
from molink_scheduler.records import SequenceRecord, StoredSequence

SAVE_TIMEOUT_S = 2.0
"""How long a submission waits for the store."""
START_ATTEMPTS = 6
START_AGAIN_S = 0.5
COMPARE_EVERY_S = 15.0


def submit(books: Books, request: SubmitSequence, reply: int, now_s: float) -> Iterator[Instruction]:
    """Admit once the store has it, or refuse."""
    books.gateways_heard_s[request.gateway] = now_s
    known = books.sequences.get(request.sequence)
    if known is not None and known.phase is SequencePhase.SAVING:
        known.replies.append(reply)
        return
    if known is not None:
        yield ReplyTo(reply, Admitted(sequence=request.sequence))
        return
    refused = why_refused(request, books, now_s)
    if refused is not None:
        yield ReplyTo(reply, refused)
        return
    card = pool_card(books)
    assert card is not None, "without a card there is no pipeline"
    record = SequenceRecord(request=request, fingerprint=card.fingerprint)
    books.sequences[request.sequence] = Sequence(
        record=record, phase=SequencePhase.SAVING, since_s=now_s, replies=[reply]
    )
    yield SaveSequence(record)


def saved(books: Books, sequence_id: str, now_s: float) -> Iterator[Instruction]:
    """The store has it: it is admitted. Ids that do not wait for this are ignored."""
    sequence = books.sequences.get(sequence_id)
    if sequence is None or sequence.phase is not SequencePhase.SAVING:
        return
    for reply in sequence.replies:
        yield ReplyTo(reply, Admitted(sequence=sequence_id))
    sequence.replies.clear()
    sequence.move(SequencePhase.WAITING, now_s)
    yield from _start(books, sequence, now_s)


def restore(books: Books, stored: StoredSequence, now_s: float) -> None:
    """Take a sequence up again as it was kept."""
    record = stored.record
    layout = books.pipeline.layout
    is_at_head = layout is not None and record.started_epoch == layout.epoch
    books.gateways_heard_s[record.request.gateway] = now_s
    books.sequences[record.request.sequence] = Sequence(
        record=record,
        phase=SequencePhase.RUNNING if is_at_head else SequencePhase.WAITING,
        since_s=now_s,
        generated=list(stored.tokens),
        epoch=record.started_epoch if is_at_head else None,
        confirmed_s=now_s if is_at_head else None,
        is_restored=is_at_head,
    )


def start_waiting(books: Books, now_s: float) -> Iterator[Instruction]:
    """The pipeline is ready: start whatever waits for it."""
    for sequence in list(books.sequences.values()):
        if sequence.phase is SequencePhase.WAITING:
            yield from _start(books, sequence, now_s)


def pipeline_lost(books: Books, now_s: float) -> None:
    """Whatever was at the head waits for the next one, with the tokens it has so far."""
    for sequence in books.sequences.values():
        if sequence.phase in (SequencePhase.STARTING, SequencePhase.RUNNING):
            sequence.move(SequencePhase.WAITING, now_s)
        sequence.epoch, sequence.confirmed_s, sequence.attempts, sequence.is_restored = None, None, 0, False


def _start(books: Books, sequence: Sequence, now_s: float) -> Iterator[Instruction]:
    layout = books.pipeline.layout
    if not books.pipeline.is_ready or layout is None:
        return
    request = sequence.record.request
    if sequence.record.fingerprint != layout.card.fingerprint:
        yield from _fail(books, sequence, "the pool has changed to another model", now_s)
        return
    if sequence.most_tokens > layout.kv_capacity_tokens:
        problem = (
            f"the pipeline that is left holds {layout.kv_capacity_tokens} tokens, this request may need "
            f"{sequence.most_tokens}"
        )
        yield from _fail(books, sequence, problem, now_s)
        return
    sequence.move(SequencePhase.STARTING, now_s)
    sequence.epoch = layout.epoch
    sequence.attempts += 1
    start = StartSequence(
        pipeline=layout.pipeline,
        epoch=layout.epoch,
        sequence=sequence.id,
        prompt=request.prompt,
        generated=tuple(sequence.generated),
        options=request.options,
        trace=request.trace,
    )
    yield StartSequenceAt(layout.head, start)


def start_answered(
    books: Books, sequence_id: str, epoch: int, problem: str | None, now_s: float
) -> Iterator[Instruction]:
    """The head has it, or it is tried again a moment later."""
    sequence = books.sequences.get(sequence_id)
    if sequence is None or sequence.epoch != epoch:
        return
    if problem is None and sequence.phase in (SequencePhase.STARTING, SequencePhase.RUNNING):
        yield from _confirm(sequence, epoch, now_s)
    elif problem is not None and sequence.phase is SequencePhase.STARTING:
        if sequence.attempts >= START_ATTEMPTS:
            yield from _fail(books, sequence, f"the head does not take it: {problem}", now_s)
        else:
            sequence.move(SequencePhase.WAITING, now_s)


def _confirm(sequence: Sequence, epoch: int, now_s: float) -> Iterator[Instruction]:
    if sequence.phase is SequencePhase.STARTING:
        sequence.move(SequencePhase.RUNNING, now_s)
    if sequence.confirmed_s is None:
        sequence.confirmed_s = now_s
        sequence.record = sequence.record.model_copy(update={"started_epoch": epoch})
        yield SaveSequence(sequence.record)


def tokens(books: Books, step: StepTokens, now_s: float) -> Iterator[Instruction]:
    """Take a step's tokens into the books. Other epochs, unknown sequences and indices seen are dropped.

    After tokens that were missed, later ones are not kept: a new start makes them again, as the same tokens.
    """
    layout = books.pipeline.layout
    if layout is None or (step.pipeline, step.epoch) != (layout.pipeline, layout.epoch):
        return
    books.pipeline.stepped_s = now_s
    for event in step.events:
        sequence = books.sequences.get(event.sequence)
        if sequence is None or sequence.epoch != step.epoch:
            continue
        if event.finish is not None:
            books.finished_s.append(now_s)
            yield from _end(books, sequence, now_s)
            continue
        sequence.attempts = 0
        yield from _confirm(sequence, step.epoch, now_s)
        if event.index == len(sequence.generated):
            sequence.generated.append(event.token)
            yield AppendTokens(event.sequence, event.index, (event.token,))
    for failed in step.failed:
        sequence = books.sequences.get(failed)
        if sequence is not None and sequence.epoch == step.epoch:
            yield from _fail(
                books,
                sequence,
                "the pipeline gave it up: its output was not finite, or its steps were lost again and again",
                now_s,
                is_at_head=False,
            )


def cancel(books: Books, sequence_id: str, reason: str, now_s: float) -> Iterator[Instruction]:
    """Free everything of a sequence. Unknown ids are ignored."""
    sequence = books.sequences.get(sequence_id)
    if sequence is None:
        return
    for reply in sequence.replies:
        message = f"cancelled before it was admitted: {reason}"
        yield ReplyTo(reply, Refused(sequence=sequence_id, code=RefusalCode.NO_PIPELINE, message=message))
    yield from _stop_at_head(books, sequence)
    yield from _end(books, sequence, now_s)


def gateway_gone(books: Books, gateway: str, now_s: float) -> Iterator[Instruction]:
    """Nobody waits for a silent gateway's sequences."""
    del books.gateways_heard_s[gateway]
    for sequence in [one for one in books.sequences.values() if one.gateway == gateway]:
        yield from cancel(books, sequence.id, f"gateway {gateway} is silent", now_s)


def time_passed(books: Books, now_s: float) -> Iterator[Instruction]:
    """Waits that have come to their end, and starts to be tried again."""
    for sequence in list(books.sequences.values()):
        waited_s = now_s - sequence.since_s
        if sequence.phase is SequencePhase.SAVING and waited_s >= SAVE_TIMEOUT_S:
            refused = Refused(
                sequence=sequence.id,
                code=RefusalCode.NO_PIPELINE,
                message="the scheduler's Redis did not take the request in time",
                retry_after_s=5.0,
            )
            for reply in sequence.replies:
                yield ReplyTo(reply, refused)
            yield from _end(books, sequence, now_s)
        elif sequence.phase is SequencePhase.WAITING:
            if books.pipeline.is_ready and waited_s >= START_AGAIN_S:
                yield from _start(books, sequence, now_s)
            elif not books.pipeline.is_ready and waited_s >= books.settings.pipeline_wait_s:
                problem = (
                    f"no pipeline could go on with it within {books.settings.pipeline_wait_s:g} s"
                    f" ({books.pipeline.lost_because or 'there is none'})"
                )
                yield from _fail(books, sequence, problem, now_s)
    is_any_running = any(one.phase is SequencePhase.RUNNING for one in books.sequences.values())
    is_deaf = books.deaf_until_s == now_s
    if is_any_running and not is_deaf and now_s - books.compared_s >= COMPARE_EVERY_S:
        yield from ask_head(books, now_s)


def ask_head(books: Books, now_s: float) -> Iterator[Instruction]:
    """Ask which sequences the head holds, if there is a head."""
    layout = books.pipeline.layout
    if books.pipeline.is_ready and layout is not None:
        books.compared_s = now_s
        yield AskSequencesOf(layout.head, layout.pipeline)


def compare(books: Books, held: SequencesHeld, asked_at_s: float, now_s: float) -> Iterator[Instruction]:
    """Put the head's books and these in agreement.

    What the head should have had when asked and has not: it ended while this scheduler was away if that was
    so, else it is started again. What only the head has is stopped.
    """
    layout = books.pipeline.layout
    if layout is None or not books.pipeline.is_ready or held.epoch != layout.epoch:
        return
    at_head = frozenset(held.sequences)
    for sequence in list(books.sequences.values()):
        if sequence.phase is not SequencePhase.RUNNING or (sequence.confirmed_s or now_s) > asked_at_s:
            continue
        if sequence.id in at_head:
            sequence.is_restored = False
        elif sequence.is_restored:
            yield from _end(books, sequence, now_s)
        elif sequence.attempts >= START_ATTEMPTS:
            yield from _fail(books, sequence, "the head loses it again and again", now_s)
        else:
            sequence.move(SequencePhase.WAITING, now_s)
            sequence.confirmed_s = None
            yield from _start(books, sequence, now_s)
    for unknown in held.sequences:
        if unknown not in books.sequences:
            yield StopSequenceAt(layout.head, StopSequence(pipeline=layout.pipeline, sequence=unknown))


def _stop_at_head(books: Books, sequence: Sequence) -> Iterator[Instruction]:
    layout = books.pipeline.layout
    if layout is not None and sequence.epoch == layout.epoch:
        yield StopSequenceAt(layout.head, StopSequence(pipeline=PIPELINE, sequence=sequence.id))


def _fail(
    books: Books, sequence: Sequence, problem: str, now_s: float, *, is_at_head: bool = True
) -> Iterator[Instruction]:
    yield FailSequence(sequence.gateway, SequenceFailed(sequence=sequence.id, message=problem))
    if is_at_head:
        yield from _stop_at_head(books, sequence)
    yield from _end(books, sequence, now_s)


def _end(books: Books, sequence: Sequence, now_s: float) -> Iterator[Instruction]:
    sequence.move(SequencePhase.ENDED, now_s)
    del books.sequences[sequence.id]
    yield DeleteSequence(sequence.id)
