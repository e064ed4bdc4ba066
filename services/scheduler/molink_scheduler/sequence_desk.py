"""Decisions about sequences: admission, start, tokens, end, and comparing the books with the head's."""

from __future__ import annotations

from collections.abc import Iterator

from molink_common.messages import (
    Admitted,
    FinishReason,
    RefusalCode,
    Refused,
    SequencesHeld,
    StepTokens,
    StopSequence,
    SubmitSequence,
    TokenEvent,
)
from molink_scheduler import holes, resumption, sequence_moves
from molink_scheduler.admission import first_token_came, why_refused
from molink_scheduler.books import Books, Pipeline, Sequence, SequencePhase
from molink_scheduler.fitness import pool_card
from molink_scheduler.instructions import (
    AppendTokens,
    AskSequencesOf,
    Instruction,
    ReplyTo,
    SaveSequence,
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
    yield from resumption.forget(books, request.sequence)
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
    books.keys.admitted(request, now_s)
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
    yield from sequence_moves.start(books, sequence, now_s)


def restore(books: Books, stored: StoredSequence, now_s: float) -> Iterator[Instruction]:
    """Take a sequence up again as it was kept."""
    record = stored.record
    if record.finish is not None:
        yield from resumption.keep(books, record, stored.tokens[: record.num_generated], now_s)
        return
    at_head = next((one for one in books.pipelines.values() if _has_taken(one, record)), None)
    layout = at_head.layout if at_head is not None else None
    books.gateways_heard_s[record.request.gateway] = now_s
    books.sequences[record.request.sequence] = Sequence(
        record=record,
        phase=SequencePhase.WAITING if layout is None else SequencePhase.RUNNING,
        since_s=now_s,
        generated=list(stored.tokens),
        pipeline=None if layout is None else layout.pipeline,
        epoch=None if layout is None else layout.epoch,
        confirmed_s=None if layout is None else now_s,
        is_restored=layout is not None,
    )


def _has_taken(pipeline: Pipeline, record: SequenceRecord) -> bool:
    return pipeline.layout is not None and record.started_epoch in pipeline.layout.lives


def start_waiting(books: Books, now_s: float) -> Iterator[Instruction]:
    """A pipeline is ready: start whatever waits for it."""
    for sequence in list(books.sequences.values()):
        if sequence.phase is SequencePhase.WAITING:
            yield from sequence_moves.start(books, sequence, now_s)


def pipeline_lost(books: Books, pipeline: Pipeline, now_s: float) -> None:
    """Whatever was at its head waits for another one, with the tokens it has so far."""
    for sequence in books.sequences.values():
        if sequence.pipeline != pipeline.number:
            continue
        if sequence.phase in (SequencePhase.STARTING, SequencePhase.RUNNING):
            sequence.move(SequencePhase.WAITING, now_s)
        sequence.interruptions += 1
        sequence.pipeline, sequence.epoch = None, None
        sequence.confirmed_s, sequence.attempts, sequence.is_restored = None, 0, False


def pipeline_continued(books: Books, pipeline: Pipeline, now_s: float) -> None:
    """Its head goes on in the new epoch with what it holds; what it has not confirmed is started again."""
    layout = pipeline.layout
    assert layout is not None, "a pipeline that goes on has a layer map"
    for sequence in books.sequences.values():
        if sequence.pipeline != pipeline.number:
            continue
        if sequence.phase is SequencePhase.STARTING:
            sequence.move(SequencePhase.WAITING, now_s)
        sequence.interruptions += 1
        # also of those that wait: if the head has them after all, their tokens are tokens
        sequence.epoch, sequence.attempts = layout.epoch, 0


def start_answered(
    books: Books, sequence_id: str, epoch: int, problem: str | None, now_s: float
) -> Iterator[Instruction]:
    """The head has it, or it is tried again a moment later."""
    sequence = books.sequences.get(sequence_id)
    if sequence is None or sequence.epoch != epoch:
        return
    if problem is None and sequence.phase in (SequencePhase.STARTING, SequencePhase.RUNNING):
        yield from sequence_moves.confirm(sequence, epoch, now_s)
    elif problem is not None and sequence.phase is SequencePhase.STARTING:
        if sequence.attempts >= START_ATTEMPTS:
            yield from sequence_moves.fail(books, sequence, f"the head does not take it: {problem}", now_s)
        else:
            sequence.move(SequencePhase.WAITING, now_s)


def tokens(books: Books, step: StepTokens, now_s: float) -> Iterator[Instruction]:
    """Take a step's tokens into the books. Other epochs, unknown sequences and indices seen are dropped.

    After tokens that were missed, later ones are not kept: a new start makes them again, as the same tokens.
    """
    pipeline = books.pipelines.get(step.pipeline)
    layout = pipeline.layout if pipeline is not None else None
    if pipeline is None or layout is None or step.epoch not in (layout.epoch, pipeline.continued_epoch):
        return
    pipeline.stepped_s = now_s
    for event in step.events:
        sequence = books.sequences.get(event.sequence)
        if sequence is None or (sequence.pipeline, sequence.epoch) != (step.pipeline, layout.epoch):
            continue
        is_next = event.index == len(sequence.generated)
        if is_next and event.index == 0:
            first_token_came(books, sequence, now_s)
        if event.finish is not None:
            yield from _finish(books, sequence, event, now_s)
            continue
        sequence.attempts = sequence.interruptions = 0
        if step.epoch == layout.epoch:
            yield from sequence_moves.confirm(sequence, step.epoch, now_s)
        if is_next:
            _append(books, sequence, event.token, now_s)
            yield AppendTokens(event.sequence, event.index, (event.token,))
        elif event.index > len(sequence.generated):
            sequence.has_hole = True
        yield from _end_where_told(books, sequence, now_s)
    for failed in step.failed:
        sequence = books.sequences.get(failed)
        if sequence is not None and (sequence.pipeline, sequence.epoch) == (step.pipeline, layout.epoch):
            yield from sequence_moves.fail(
                books,
                sequence,
                "the pipeline gave it up: its output was not finite, its grammar failed, or its steps were lost again "
                "and again",
                now_s,
                is_at_head=False,
            )


def _append(books: Books, sequence: Sequence, token: int, now_s: float) -> None:
    """Keep a token, at its tenant's cost; with the first one the prompt has been computed."""
    request = sequence.record.request
    if request.tenant:
        books.keys.charge(request.tenant, 1 if sequence.generated else 1 + len(request.prompt), now_s)
    sequence.generated.append(token)


def _finish(books: Books, sequence: Sequence, event: TokenEvent, now_s: float) -> Iterator[Instruction]:
    assert event.finish is not None, "called at the end"
    if event.index > len(sequence.generated):
        yield from holes.put_aside(books, sequence, now_s)
        return
    if event.index == len(sequence.generated):
        _append(books, sequence, event.token, now_s)
        if sequence.is_resumable:
            yield AppendTokens(event.sequence, event.index, (event.token,))
    yield from sequence_moves.keep(books, sequence, event.finish, now_s)


def _end_where_told(books: Books, sequence: Sequence, now_s: float) -> Iterator[Instruction]:
    """End it after the tokens that its gateway has use for, once they are here."""
    if sequence.ends_after is None:
        return
    if len(sequence.generated) >= sequence.ends_after:
        yield from sequence_moves.stop_at_head(books, sequence)
        yield from sequence_moves.keep(books, sequence, FinishReason.STOP, now_s)
    else:
        yield from mend(books, sequence.id, now_s)


def cancel(
    books: Books, sequence_id: str, reason: str, now_s: float, *, after_tokens: int | None = None
) -> Iterator[Instruction]:
    """Free everything of a sequence, or keep it with the tokens that count. Unknown ids are ignored."""
    sequence = books.sequences.get(sequence_id)
    if after_tokens is None:
        yield from resumption.forget(books, sequence_id)
        yield from holes.forget(books, sequence_id)
    elif sequence is not None and sequence.is_resumable and sequence.phase is not SequencePhase.SAVING:
        sequence.ends_after = after_tokens
        yield from _end_where_told(books, sequence, now_s)
        return
    if sequence is None:
        return
    for reply in sequence.replies:
        message = f"cancelled before it was admitted: {reason}"
        yield ReplyTo(reply, Refused(sequence=sequence_id, code=RefusalCode.NO_PIPELINE, message=message))
    yield from sequence_moves.stop_at_head(books, sequence)
    yield from sequence_moves.end(books, sequence, now_s)


def gateway_gone(books: Books, gateway: str, now_s: float) -> Iterator[Instruction]:
    """Nobody waits for a silent gateway's sequences, but for those that another gateway may go on with."""
    del books.gateways_heard_s[gateway]
    for sequence in [one for one in books.sequences.values() if one.gateway == gateway and not one.is_resumable]:
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
            yield from sequence_moves.end(books, sequence, now_s)
        elif sequence.phase is SequencePhase.WAITING:
            if books.ready_pipelines and waited_s >= START_AGAIN_S:
                yield from sequence_moves.start(books, sequence, now_s)
            elif not books.ready_pipelines and waited_s >= books.settings.pipeline_wait_s:
                problem = (
                    f"no pipeline could go on with it within {books.settings.pipeline_wait_s:g} s"
                    f" ({books.pipeline.lost_because or 'there is none'})"
                )
                yield from sequence_moves.fail(books, sequence, problem, now_s)
    running = {one.pipeline for one in books.sequences.values() if one.phase is SequencePhase.RUNNING}
    is_deaf = books.deaf_until_s == now_s
    for pipeline in books.ready_pipelines:
        if pipeline.number in running and not is_deaf and now_s - pipeline.compared_s >= COMPARE_EVERY_S:
            yield from ask_head(pipeline, now_s)


def ask_head(pipeline: Pipeline, now_s: float) -> Iterator[Instruction]:
    """Ask which sequences the head of a pipeline holds, if it serves."""
    if pipeline.is_ready and pipeline.layout is not None:
        pipeline.compared_s = now_s
        yield AskSequencesOf(pipeline.layout.head, pipeline.number)


def compare(books: Books, held: SequencesHeld, asked_at_s: float, now_s: float) -> Iterator[Instruction]:
    """Put a head's books and these in agreement.

    What the head should have had when asked and has not: it ended while this scheduler was away if that was
    so, else it is started again. What only the head has is stopped.
    """
    pipeline = books.pipelines.get(held.pipeline)
    layout = pipeline.layout if pipeline is not None and pipeline.is_ready else None
    if layout is None or held.epoch != layout.epoch:
        return
    at_head = frozenset(held.sequences)
    for sequence in [one for one in books.sequences.values() if one.pipeline == held.pipeline]:
        if sequence.phase is not SequencePhase.RUNNING or (sequence.confirmed_s or now_s) > asked_at_s:
            continue
        if sequence.id in at_head:
            sequence.is_restored = False
        elif sequence.is_restored and not sequence.is_resumable:
            yield from sequence_moves.end(books, sequence, now_s)
        elif sequence.attempts >= START_ATTEMPTS:
            yield from sequence_moves.fail(books, sequence, "the head loses it again and again", now_s)
        else:
            yield from sequence_moves.start_again(books, sequence, now_s)
    for sequence_id in held.sequences:
        known = books.sequences.get(sequence_id)
        if known is None or known.pipeline not in (held.pipeline, None):
            yield StopSequenceAt(layout.head, StopSequence(pipeline=layout.pipeline, sequence=sequence_id))


def mend(books: Books, sequence_id: str, now_s: float) -> Iterator[Instruction]:
    """Have the tokens that were missed made again, for a gateway that has not seen them either."""
    sequence = books.sequences.get(sequence_id)
    if sequence is not None and sequence.has_hole and sequence.phase is SequencePhase.RUNNING:
        yield from sequence_moves.stop_at_head(books, sequence)
        yield from sequence_moves.start_again(books, sequence, now_s)
