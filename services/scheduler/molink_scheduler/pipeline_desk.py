"""Decisions about pipelines: the next step in the life of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from molink_common.messages import Heartbeat, StagePhase
from molink_scheduler import detection, draining, forming, regrouping, replacement, sequence_desk, standby
from molink_scheduler.books import Books, Pipeline, PipelinePhase, Worker
from molink_scheduler.instructions import (
    BroadcastState,
    Instruction,
    NoteLoss,
    ReleaseStageOf,
    SaveWorker,
    TakeEpoch,
)
from molink_scheduler.records import PipelineRecord

REFUSED_BARRED_S = 5.0
"""How long a worker that did not take its stage is left out."""
RELEASE_AGAIN_S = 5.0
EPOCH_TIMEOUT_S = 15.0
RESTORED_WAIT_S = 5.0
"""How long after a restart a worker of the layer map may be unheard of."""


def heartbeat(books: Books, beat: Heartbeat, now_s: float) -> Iterator[Instruction]:
    """Take a worker's words into the books."""
    worker = books.workers.get(beat.worker)
    before = worker.heartbeat if worker is not None else None
    if worker is None:
        worker = books.workers[beat.worker] = Worker(heartbeat=beat, heard_s=now_s, progress_s=now_s)
    worker.heartbeat, worker.heard_s = beat, now_s
    detection.beat(books, beat.worker, beat.sent_s, now_s)
    if before is None or _loading(before) != _loading(beat):
        worker.progress_s = now_s
    if beat.card is None:
        worker.preload = None  # it has started again
    if not beat.leaving:
        worker.leaving_since_s = None
    elif worker.leaving_since_s is None:
        worker.leaving_since_s = now_s
    if beat.stage is not None:
        books.highest_epoch = max(books.highest_epoch, beat.stage.epoch)
    yield SaveWorker(beat)
    yield from _release_if_unneeded(books, worker, now_s)
    if before is None or _visible(before) != _visible(beat):
        yield BroadcastState()


def assign_answered(books: Books, name: str, epoch: int, problem: str | None, now_s: float) -> None:
    """A worker took its stage, or it is left out for a while, or it cannot go on with what it held."""
    pipeline, worker = books.pipeline_of(name), books.workers.get(name)
    if pipeline is None or pipeline.layout is None or pipeline.layout.epoch != epoch or worker is None:
        return
    if problem is None:
        pipeline.accepted_s[name] = now_s
    elif pipeline.continued_epoch is not None and name not in pipeline.newcomers:
        pipeline.refused_because = f"worker {name} cannot go on with its stage: {problem}"
    else:
        detection.bar(worker, f"it did not take its stage: {problem}", now_s + REFUSED_BARRED_S)


def plan(books: Books, now_s: float) -> Iterator[Instruction]:
    """The next step of each pipeline's life, if it is due."""
    yield from forming.form_further(books, now_s)
    for pipeline in list(books.pipelines.values()):
        yield from _plan_one(books, pipeline, now_s)
    yield from standby.preload(books, now_s)


def epoch_taken(books: Books, number: int, epoch: int, now_s: float) -> Iterator[Instruction]:
    """Assign stages in the new epoch: the old ones to others, or all of them anew."""
    pipeline = books.pipelines.get(number)
    is_newest = epoch > books.highest_epoch
    books.highest_epoch = max(books.highest_epoch, epoch)
    if pipeline is None or pipeline.phase not in (PipelinePhase.FORMING, PipelinePhase.REPLACING):
        return
    if not is_newest:
        # meanwhile a worker has told of a later one, which it would not give up for this
        yield TakeEpoch(books.highest_epoch, number)
    elif pipeline.phase is PipelinePhase.FORMING:
        yield from forming.place_and_assign(books, pipeline, epoch, now_s)
    else:
        yield from _replace(books, pipeline, epoch, now_s)
    for worker in books.workers.values():
        yield from _release_if_unneeded(books, worker, now_s)


def restore(books: Books, layout: PipelineRecord, now_s: float) -> None:
    """Take a pipeline up as it was kept; the workers' heartbeats decide whether it still serves."""
    pipeline = books.pipelines.setdefault(layout.pipeline, Pipeline(number=layout.pipeline))
    pipeline.layout, pipeline.card, pipeline.is_kept = layout, layout.card, True
    pipeline.lost_s, pipeline.lost_because = now_s, "the scheduler has started again"
    pipeline.accepted_s = {stage.worker: now_s for stage in layout.stages}
    pipeline.awaited_until_s = now_s + RESTORED_WAIT_S
    pipeline.move(PipelinePhase.LOADING, now_s)


def _plan_one(books: Books, pipeline: Pipeline, now_s: float) -> Iterator[Instruction]:
    if forming.is_given_up(books, pipeline):
        del books.pipelines[pipeline.number]
        return
    forming.look_around(books, pipeline, now_s)
    match pipeline.phase:
        case PipelinePhase.WAITING:
            yield from forming.form_when_settled(books, pipeline, now_s)
        case PipelinePhase.FORMING:
            if now_s - pipeline.phase_since_s >= EPOCH_TIMEOUT_S:
                pipeline.move(PipelinePhase.WAITING, now_s)
        case PipelinePhase.REPLACING:
            if now_s - pipeline.phase_since_s >= EPOCH_TIMEOUT_S:
                yield from _lose(books, pipeline, pipeline.lost_because, now_s)
        case PipelinePhase.LOADING | PipelinePhase.READY:
            yield from _look_after(books, pipeline, now_s)
        case _:
            assert_never(pipeline.phase)


def _look_after(books: Books, pipeline: Pipeline, now_s: float) -> Iterator[Instruction]:
    lost = detection.losses(books, pipeline, now_s)
    if lost or pipeline.refused_because is not None:
        yield from _part_lost(books, pipeline, lost, now_s)
        return
    leaving = draining.who_leaves(books, pipeline, now_s)
    pipeline.is_draining = pipeline.is_ready and leaving is not None and draining.can_take_over(books, pipeline)
    if pipeline.is_draining and not draining.is_done(books, pipeline):
        yield from draining.move(books, pipeline, now_s)
        return
    reason = _why_place_anew(books, pipeline, leaving, now_s)
    if reason is not None:
        yield from _lose(books, pipeline, reason, now_s)
    elif pipeline.is_ready:
        yield from replacement.leave(books, pipeline, now_s)
        yield from _regroup(books, pipeline, now_s)
    elif _all_ready(books, pipeline):
        yield from _become_ready(books, pipeline, now_s)


def _regroup(books: Books, pipeline: Pipeline, now_s: float) -> Iterator[Instruction]:
    if not pipeline.is_ready:
        return
    yield from regrouping.prepare(books, pipeline, now_s)
    better = pipeline.better
    if better is not None and regrouping.is_prepared(books, pipeline):
        regrouping.give_up(pipeline)
        pipeline.better = better
        yield from _lose(books, pipeline, "a faster layer map is ready", now_s)


def _part_lost(books: Books, pipeline: Pipeline, lost: dict[str, str], now_s: float) -> Iterator[Instruction]:
    layout = pipeline.layout
    assert layout is not None, "a pipeline that loads or serves has a layer map"
    for name, problem in lost.items():
        worker = books.workers.get(name)
        if worker is not None:  # else it was noted when it was found to be gone
            yield NoteLoss(name, problem, now_s - worker.heard_s)
    index_of = {stage.worker: index for index, stage in enumerate(layout.stages)}
    each = [f"worker {name} (stage {index_of[name]}): {problem}" for name, problem in lost.items()]
    reason = "; ".join(each) or pipeline.refused_because or ""
    names = frozenset(lost)
    if pipeline.is_kept and replacement.successors(books, pipeline, names, now_s) is not None:
        yield from replacement.begin(books, pipeline, names, reason, now_s)
    else:
        yield from _lose(books, pipeline, reason, now_s)


def _replace(books: Books, pipeline: Pipeline, epoch: int, now_s: float) -> Iterator[Instruction]:
    lost = detection.losses(books, pipeline, now_s)
    others = replacement.successors(books, pipeline, pipeline.replaced | lost.keys(), now_s)
    if others is not None:
        yield from replacement.assign(books, pipeline, others, epoch, now_s)
    elif not lost and pipeline.may_continue:
        # somebody is leaving, and whoever was to take over is gone: nothing has happened yet
        yield from _become_ready(books, pipeline, now_s)
    else:
        yield from _lose(books, pipeline, pipeline.lost_because, now_s)


def _become_ready(books: Books, pipeline: Pipeline, now_s: float) -> Iterator[Instruction]:
    is_continued = pipeline.continued_epoch is not None
    pipeline.move(PipelinePhase.READY, now_s)
    pipeline.lost_s, pipeline.lost_because = None, ""
    pipeline.stepped_s = pipeline.compared_s = now_s
    pipeline.is_kept, pipeline.continued_epoch, pipeline.may_continue = True, None, False
    yield BroadcastState()
    if is_continued or any(sequence.is_restored for sequence in books.sequences.values()):
        yield from sequence_desk.ask_head(pipeline, now_s)
    yield from sequence_desk.start_waiting(books, now_s)


def _lose(books: Books, pipeline: Pipeline, reason: str, now_s: float) -> Iterator[Instruction]:
    if pipeline.is_ready:
        pipeline.lost_s = now_s
    pipeline.lost_because = reason
    pipeline.move(PipelinePhase.WAITING, now_s)
    pipeline.layout, pipeline.placement, pipeline.refused_for = None, None, None
    pipeline.is_kept, pipeline.refused_because, pipeline.continued_epoch = False, None, None
    pipeline.may_continue, pipeline.replaced, pipeline.gone = False, frozenset(), {}
    pipeline.is_draining = False
    sequence_desk.pipeline_lost(books, pipeline, now_s)
    yield BroadcastState()
    yield from sequence_desk.start_waiting(books, now_s)
    yield from _plan_one(books, pipeline, now_s)


def _why_place_anew(books: Books, pipeline: Pipeline, leaving: str | None, now_s: float) -> str | None:
    """`leaving` leaves without a successor."""
    if pipeline.is_ready and detection.is_stuck(books, pipeline, now_s):
        return f"no step has come out for {detection.STUCK_S:g} s"
    if leaving is not None and (
        pipeline.is_draining or forming.can_do_without(books, pipeline, books.workers[leaving], now_s)
    ):
        return f"worker {leaving} is leaving"
    return forming.why_anew(books, pipeline, now_s)


def _all_ready(books: Books, pipeline: Pipeline) -> bool:
    layout = pipeline.layout
    assert layout is not None, "a pipeline that loads has a layer map"
    for name in layout.workers:
        worker = books.workers.get(name)
        report = worker.report_of(layout) if worker is not None else None
        if report is None or report.phase is not StagePhase.READY:
            return False
    return True


def _release_if_unneeded(books: Books, worker: Worker, now_s: float) -> Iterator[Instruction]:
    """A stage that is in no layer map is let go, unless a pipeline that is to be formed may want its weights."""
    stage = worker.heartbeat.stage
    if stage is None or books.pipeline_of(worker.name) is not None:
        return
    is_any_unformed = any(one.layout is None for one in books.pipelines.values())
    if is_any_unformed and worker.leaving_since_s is None:
        return
    if worker.released_s is None or now_s - worker.released_s >= RELEASE_AGAIN_S:
        worker.released_s = now_s
        yield ReleaseStageOf(worker.name, stage.pipeline)


def _loading(beat: Heartbeat) -> object:
    return (beat.stage.epoch, beat.stage.phase, beat.stage.progress) if beat.stage is not None else None


def _visible(beat: Heartbeat) -> object:
    """What a reader of the state wants to hear of at once."""
    stage = (beat.stage.epoch, beat.stage.phase) if beat.stage is not None else None
    return (beat.card is None, beat.problem, beat.leaving, stage, beat.preloaded)
