"""A worker leaves and nobody can take its stage over: its pipeline's sequences move to the other pipelines.

They move a few at a time, those with the fewest tokens first: each pauses for as long as its own tokens take to be
computed again, and the others go on where they are until it is their turn. What has not moved when the worker goes is
recovered all at once.
"""

from __future__ import annotations

from collections.abc import Iterator

from molink_scheduler import sequence_moves
from molink_scheduler.books import Books, Pipeline, Sequence, SequencePhase
from molink_scheduler.instructions import Instruction
from molink_scheduler.standby import best_for, idle_workers

MOST_MOVING = 2
"""Sequences on their way at the same time: one is computed while the next one is sent."""


def who_leaves(books: Books, pipeline: Pipeline, now_s: float) -> str | None:
    """A worker of the layer map that leaves without a successor."""
    layout = pipeline.layout
    assert layout is not None, "asked of a pipeline with a layer map"
    idle = idle_workers(books, now_s)
    for stage in layout.stages:
        worker = books.workers.get(stage.worker)
        if worker is None or worker.leaving_since_s is None:
            continue
        if not pipeline.is_kept or best_for(books, layout, stage, idle) is None:
            return stage.worker
    return None


def can_take_over(books: Books, pipeline: Pipeline) -> bool:
    """Whether another pipeline that serves, and goes on doing so, has the same model."""
    layout = pipeline.layout
    assert layout is not None, "asked of a pipeline with a layer map"
    return any(
        other is not pipeline
        and not _has_leaving(books, other)
        and other.layout is not None
        and other.layout.card.fingerprint == layout.card.fingerprint
        for other in books.ready_pipelines
    )


def move(books: Books, pipeline: Pipeline, now_s: float) -> Iterator[Instruction]:
    """Let the next sequences go to other pipelines."""
    pipeline.is_draining = True
    here = [
        one
        for one in books.sequences.values()
        if one.pipeline == pipeline.number and one.phase in (SequencePhase.STARTING, SequencePhase.RUNNING)
    ]
    room = MOST_MOVING - sum(is_moving(one) for one in books.sequences.values())
    for sequence in sorted(here, key=lambda one: one.num_tokens)[: max(room, 0)]:
        to = sequence_moves.choose(books, sequence)
        if to is None or to is pipeline:
            continue
        yield from sequence_moves.stop_at_head(books, sequence)
        sequence.moved_with = len(sequence.generated)
        yield from sequence_moves.start_again(books, sequence, now_s)


def is_done(books: Books, pipeline: Pipeline) -> bool:
    """Whether nobody is served here any more."""
    return all(one.pipeline != pipeline.number for one in books.sequences.values())


def is_moving(sequence: Sequence) -> bool:
    """Whether it was moved and has not had a token since."""
    return sequence.moved_with is not None and len(sequence.generated) <= sequence.moved_with


def _has_leaving(books: Books, pipeline: Pipeline) -> bool:
    names = pipeline.layout.workers if pipeline.layout is not None else frozenset()
    return any(books.workers[name].leaving_since_s is not None for name in names & books.workers.keys())
