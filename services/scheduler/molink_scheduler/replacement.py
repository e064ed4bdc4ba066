"""A lost stage is given to another worker; the layer map stays.

    READY ─▶ REPLACING, TakeEpoch ─▶ EpochTaken ─▶ AssignStage × stages in the new epoch, LOADING ─▶ READY

One lost stage behind the head leaves the rest of the pipeline whole: it goes on with its KV blocks and sequences, and
has those of the new stage rebuilt. With the head, or with two stages, too much is lost for that: the stages that are
left keep their weights, and the sequences are computed again from their tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

from molink_scheduler import sequence_desk
from molink_scheduler.books import Books, Pipeline, PipelinePhase
from molink_scheduler.fitness import fit_workers
from molink_scheduler.instructions import BroadcastState, Instruction, SavePipeline, TakeEpoch
from molink_scheduler.layouts import assignments, with_others
from molink_scheduler.standby import best_for, has_loaded, idle_workers, preload_first

LEAVE_PATIENCE_S = 5.0
"""How long a leaving worker's successor is given to load: half of what a worker waits for by default."""


def successors(books: Books, pipeline: Pipeline, lost: frozenset[str], now_s: float) -> dict[str, str] | None:
    """Who takes the place of each lost worker; None when for one of them there is nobody.

    A worker that has come back without its stage may be its own successor.
    """
    layout = pipeline.layout
    assert layout is not None, "asked of a pipeline with a layer map"
    among = idle_workers(books, now_s) + [one for one in fit_workers(books, now_s) if one.name in lost]
    chosen: dict[str, str] = {}
    for stage in layout.stages:
        if stage.worker in lost:
            best = best_for(books, layout, stage, among)
            if best is None:
                return None
            chosen[stage.worker] = best.name
            among.remove(best)
    return chosen


def begin(books: Books, pipeline: Pipeline, lost: frozenset[str], reason: str, now_s: float) -> Iterator[Instruction]:
    """Ask for the epoch in which others take the lost stages over."""
    if pipeline.is_ready:
        pipeline.lost_s = now_s
    pipeline.may_continue = pipeline.is_ready
    pipeline.replaced, pipeline.lost_because = lost, reason
    pipeline.move(PipelinePhase.REPLACING, now_s)
    yield TakeEpoch(books.highest_epoch, pipeline.number)
    yield BroadcastState()


def assign(books: Books, pipeline: Pipeline, others: dict[str, str], epoch: int, now_s: float) -> Iterator[Instruction]:
    """Swap the workers in, in the new epoch."""
    before = pipeline.layout
    assert before is not None, "a pipeline whose stages are replaced has a layer map"
    is_continued = pipeline.may_continue and len(others) == 1 and before.head not in others
    pipeline.layout = layout = with_others(before, others, epoch=epoch, is_continued=is_continued)
    pipeline.accepted_s, pipeline.gone, pipeline.replaced = {}, {}, frozenset()
    pipeline.refused_because, pipeline.may_continue = None, False
    pipeline.newcomers = frozenset(others.values())
    pipeline.continued_epoch = before.epoch if is_continued else None
    pipeline.awaited_until_s = now_s
    pipeline.move(PipelinePhase.LOADING, now_s)
    if is_continued:
        sequence_desk.pipeline_continued(books, pipeline, now_s)
    else:
        sequence_desk.pipeline_lost(books, pipeline, now_s)
    yield SavePipeline(layout)
    for name in layout.workers & books.workers.keys():
        books.workers[name].progress_s = now_s
    for name in others.values():
        books.workers[name].preload = None
    yield from assignments(layout, new_workers=pipeline.newcomers)
    yield from sequence_desk.start_waiting(books, now_s)
    yield BroadcastState()


def leave(books: Books, pipeline: Pipeline, now_s: float) -> Iterator[Instruction]:
    """Let a leaving worker's successor load first; it takes over when it has, or when that takes too long."""
    layout = pipeline.layout
    assert layout is not None, "asked of a pipeline with a layer map"
    for stage in layout.stages:
        worker = books.workers.get(stage.worker)
        if worker is None or worker.leaving_since_s is None:
            continue
        successor = best_for(books, layout, stage, idle_workers(books, now_s))
        if successor is None:
            continue
        is_loaded = has_loaded(successor, (stage.first_layer, stage.last_layer))
        if is_loaded or now_s - worker.leaving_since_s >= LEAVE_PATIENCE_S:
            yield from begin(books, pipeline, frozenset({worker.name}), f"worker {worker.name} is leaving", now_s)
            return  # one after the other: so the rest of the pipeline is whole each time
        yield from preload_first(books, stage, successor, now_s)
