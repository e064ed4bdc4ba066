"""The moves that a sequence makes, whatever brings them about: start, stop, fail, end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from molink_common.messages import FinishReason, SequenceFailed, StartSequence, StopSequence
from molink_scheduler import resumption
from molink_scheduler.books import Books, Pipeline, Sequence, SequencePhase
from molink_scheduler.instructions import (
    DeleteSequence,
    FailSequence,
    Instruction,
    SaveSequence,
    StartSequenceAt,
    StopSequenceAt,
)
from molink_scheduler.prediction import Load, first_to_finish


def start(books: Books, sequence: Sequence, now_s: float) -> Iterator[Instruction]:
    """Send it to the head of a pipeline that serves; without one it waits."""
    if not books.ready_pipelines:
        return
    pipeline = choose(books, sequence)
    if pipeline is None:
        yield from _fail_if_hopeless(books, sequence, now_s)
        return
    layout = pipeline.layout
    assert layout is not None, "a pipeline that is ready has a layer map"
    request = sequence.record.request
    sequence.move(SequencePhase.STARTING, now_s)
    sequence.pipeline, sequence.epoch = layout.pipeline, layout.epoch
    sequence.has_hole = False
    sequence.attempts += 1
    start = StartSequence(
        pipeline=layout.pipeline,
        epoch=layout.epoch,
        sequence=sequence.id,
        prompt=request.prompt,
        generated=tuple(sequence.generated),
        options=request.options,
        tenant=request.tenant,
        priority=request.priority,
        interruptions=sequence.interruptions,
        trace=request.trace,
    )
    yield StartSequenceAt(layout.head, start)


def choose(books: Books, sequence: Sequence) -> Pipeline | None:
    """Who is to serve a sequence: where it is finished first. None when none that is ready can.

    A pipeline that drains is the last resort.
    """
    able: dict[int, Pipeline] = {}
    for pipeline in sorted(books.ready_pipelines, key=lambda one: one.is_draining):
        if pipeline.is_draining and able:
            break
        layout = pipeline.layout
        assert layout is not None, "a pipeline that is ready has a layer map"
        has_room = sequence.most_tokens <= layout.kv_capacity_tokens
        if has_room and sequence.record.fingerprint == layout.card.fingerprint:
            able[pipeline.number] = pipeline
    if len(able) < 2:
        return next(iter(able.values()), None)
    assigned = Counter(one.pipeline for one in books.sequences.values())
    loads = [_load(books, pipeline, assigned[number]) for number, pipeline in able.items()]
    tokens = sequence.record.request.options.max_tokens - len(sequence.generated)
    return able[first_to_finish(loads, tokens=tokens)]


def _load(books: Books, pipeline: Pipeline, assigned: int) -> Load:
    layout = pipeline.layout
    assert layout is not None, "a pipeline that is ready has a layer map"
    worker = books.workers.get(layout.head)
    report = worker.report_of(layout) if worker is not None else None
    head = report.head if report is not None else None
    return Load(
        pipeline=pipeline.number,
        assigned=assigned,
        reported=head.running + head.waiting if head is not None else 0,
        cycle_s=head.cycle_s if head is not None else None,
    )


def _fail_if_hopeless(books: Books, sequence: Sequence, now_s: float) -> Iterator[Instruction]:
    layouts = [one.layout for one in books.pipelines.values() if one.layout is not None]
    if all(sequence.record.fingerprint != layout.card.fingerprint for layout in layouts):
        yield from fail(books, sequence, "the pool has changed to another model", now_s)
        return
    most = max(layout.kv_capacity_tokens for layout in layouts)
    if sequence.most_tokens > most:
        problem = f"the pipeline that is left holds {most} tokens, this request may need {sequence.most_tokens}"
        yield from fail(books, sequence, problem, now_s)


def start_again(books: Books, sequence: Sequence, now_s: float) -> Iterator[Instruction]:
    """Its head has lost it, or tokens of it were missed: begin with the tokens that are here."""
    sequence.move(SequencePhase.WAITING, now_s)
    sequence.confirmed_s, sequence.is_restored = None, False
    yield from start(books, sequence, now_s)


def stop_at_head(books: Books, sequence: Sequence) -> Iterator[Instruction]:
    """Have its KV blocks freed, if it may be at a head."""
    pipeline = books.pipelines.get(sequence.pipeline) if sequence.pipeline is not None else None
    layout = pipeline.layout if pipeline is not None else None
    if layout is not None and sequence.epoch == layout.epoch:
        yield StopSequenceAt(layout.head, StopSequence(pipeline=layout.pipeline, sequence=sequence.id))


def fail(
    books: Books, sequence: Sequence, problem: str, now_s: float, *, is_at_head: bool = True
) -> Iterator[Instruction]:
    """Give it up, with words for its gateway."""
    yield FailSequence(sequence.gateway, SequenceFailed(sequence=sequence.id, message=problem))
    if is_at_head:
        yield from stop_at_head(books, sequence)
    yield from end(books, sequence, now_s)


def end(books: Books, sequence: Sequence, now_s: float) -> Iterator[Instruction]:
    """Forget it."""
    sequence.move(SequencePhase.ENDED, now_s)
    del books.sequences[sequence.id]
    yield DeleteSequence(sequence.id)


def confirm(sequence: Sequence, epoch: int, now_s: float) -> Iterator[Instruction]:
    """Its head has it."""
    if sequence.phase is SequencePhase.STARTING:
        sequence.move(SequencePhase.RUNNING, now_s)
    if sequence.confirmed_s is None:
        sequence.confirmed_s = now_s
        sequence.record = sequence.record.model_copy(update={"started_epoch": epoch})
        yield SaveSequence(sequence.record)


def keep(books: Books, sequence: Sequence, finish: FinishReason, now_s: float) -> Iterator[Instruction]:
    """It has ended as it should, and may be asked for."""
    books.finished_s.append(now_s)
    sequence.move(SequencePhase.ENDED, now_s)
    del books.sequences[sequence.id]
    generated = sequence.generated[: sequence.ends_after]
    record = sequence.record.model_copy(update={"finish": finish, "num_generated": len(generated)})
    if sequence.is_resumable:
        yield SaveSequence(record)
    yield from resumption.keep(books, record, generated, now_s)
