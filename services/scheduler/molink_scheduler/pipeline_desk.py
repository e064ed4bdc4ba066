"""Decisions about the pipeline: when to form it, when it is ready, when it is lost, when to form it anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from molink_common.messages import AssignStage, Heartbeat, LinkCodec, StagePhase
from molink_scheduler import sequence_desk
from molink_scheduler.books import PIPELINE, Books, PipelinePhase, Worker
from molink_scheduler.fitness import fit_workers, place_over
from molink_scheduler.instructions import (
    AssignStageTo,
    BroadcastState,
    Instruction,
    ReleaseStageOf,
    SavePipeline,
    SaveWorker,
    TakeEpoch,
)
from molink_scheduler.records import PipelineRecord, StageRecord

WORKER_SILENT_S = 5.0
STUCK_S = 30.0
"""No step came out and the head's oldest is this old: frames were lost."""
LOAD_STALLED_S = 600.0
"""A stage that gets on with loading no more."""
UNREPORTED_S = 3.0
"""How long after a worker took its stage the heartbeats may not speak of it."""
FAILED_BARRED_S = 30.0
"""How long a worker whose stage failed is left out."""
REFUSED_BARRED_S = 5.0
"""How long a worker that did not take its stage is left out."""
REGROUP_S = 10.0
"""How long a lost pipeline that nobody waits for is given to find as many workers as it is to have."""
RELEASE_AGAIN_S = 5.0
EPOCH_TIMEOUT_S = 15.0


def heartbeat(books: Books, beat: Heartbeat, now_s: float) -> Iterator[Instruction]:
    """Take a worker's words into the books."""
    worker = books.workers.get(beat.worker)
    before = worker.heartbeat if worker is not None else None
    if worker is None:
        worker = books.workers[beat.worker] = Worker(heartbeat=beat, heard_s=now_s, progress_s=now_s)
    worker.heartbeat, worker.heard_s = beat, now_s
    if before is None or _loading(before) != _loading(beat):
        worker.progress_s = now_s
    if beat.stage is not None:
        books.highest_epoch = max(books.highest_epoch, beat.stage.epoch)
    yield SaveWorker(beat)
    yield from _release_if_unneeded(books, worker, now_s)
    if before is None or _visible(before) != _visible(beat):
        yield BroadcastState()


def assign_answered(books: Books, name: str, epoch: int, problem: str | None, now_s: float) -> None:
    """A worker took its stage, or is left out for a while."""
    layout = books.pipeline.layout
    worker = books.workers.get(name)
    if layout is None or layout.epoch != epoch or worker is None or name not in layout.workers:
        return
    if problem is None:
        books.pipeline.accepted_s[name] = now_s
    else:
        _bar(worker, f"it did not take its stage: {problem}", now_s + REFUSED_BARRED_S)


def forget_silent(books: Books, now_s: float) -> Iterator[Instruction]:
    """A worker that has not been heard of for some seconds is gone."""
    for worker in list(books.workers.values()):
        if now_s - max(worker.heard_s, books.deaf_until_s) >= WORKER_SILENT_S:
            del books.workers[worker.name]
            yield BroadcastState()


def plan(books: Books, now_s: float) -> Iterator[Instruction]:
    """The next step of the pipeline's life, if it is due."""
    pipeline = books.pipeline
    fit = tuple(worker.name for worker in fit_workers(books, now_s))
    if fit != pipeline.fit:
        pipeline.fit, pipeline.fit_since_s = fit, now_s
        if pipeline.phase is PipelinePhase.WAITING:
            pipeline.placement, pipeline.refused_for = None, None
    match pipeline.phase:
        case PipelinePhase.WAITING:
            yield from _form_when_settled(books, now_s)
        case PipelinePhase.FORMING:
            if now_s - pipeline.phase_since_s >= EPOCH_TIMEOUT_S:
                pipeline.move(PipelinePhase.WAITING, now_s)
        case PipelinePhase.LOADING | PipelinePhase.READY:
            lost = _why_lost(books, now_s) or _why_anew(books, now_s)
            if lost is not None:
                yield from _lose(books, lost, now_s)
                yield from plan(books, now_s)
            elif pipeline.phase is PipelinePhase.LOADING and _all_ready(books):
                yield from _become_ready(books, now_s)
        case _:
            assert_never(pipeline.phase)


def epoch_taken(books: Books, epoch: int, now_s: float) -> Iterator[Instruction]:
    """Place over the workers that are fit now, and assign every stage."""
    pipeline = books.pipeline
    is_newest = epoch > books.highest_epoch
    books.highest_epoch = max(books.highest_epoch, epoch)
    if pipeline.phase is not PipelinePhase.FORMING:
        return
    if not is_newest:
        # meanwhile a worker has told of a later one, which it would not give up for this
        yield TakeEpoch(books.highest_epoch)
        return
    workers = fit_workers(books, now_s)
    if not workers:
        pipeline.move(PipelinePhase.WAITING, now_s)
        return
    placement, dtype, card = place_over(books, workers, at_least=_least_stages(books, now_s))
    pipeline.placement = placement
    if not placement.pipelines:
        pipeline.move(PipelinePhase.WAITING, now_s)
        return
    layer_map = placement.pipelines[0]
    sites = [books.workers[stage.worker].heartbeat.site for stage in layer_map.stages]
    layout = PipelineRecord(
        pipeline=PIPELINE,
        epoch=epoch,
        card=card,
        dtype=dtype,
        num_blocks=layer_map.num_blocks,
        block_size=books.settings.block_size,
        policy=books.settings.policy(),
        stages=tuple(
            StageRecord(
                worker=stage.worker,
                first_layer=stage.first_layer,
                last_layer=stage.last_layer,
                # within a site the bytes that a codec saves are worth less than its time
                codec=books.settings.link_codec if site != next_site else LinkCodec.RAW,
            )
            for stage, site, next_site in zip(layer_map.stages, sites, [*sites[1:], sites[-1]], strict=True)
        ),
    )
    pipeline.layout, pipeline.card = layout, layout.card
    pipeline.accepted_s, pipeline.awaited_until_s = {}, now_s
    pipeline.move(PipelinePhase.LOADING, now_s)
    yield SavePipeline(layout)
    for worker in books.workers.values():
        yield from _release_if_unneeded(books, worker, now_s)
    for index, stage in enumerate(layout.stages):
        books.workers[stage.worker].progress_s = now_s
        assignment = AssignStage(
            pipeline=layout.pipeline,
            epoch=epoch,
            fingerprint=card.fingerprint,
            index=index,
            num_stages=len(layout.stages),
            first_layer=stage.first_layer,
            last_layer=stage.last_layer,
            dtype=dtype,
            num_blocks=layout.num_blocks,
            block_size=layout.block_size,
            policy=layout.policy,
            codec=stage.codec,
        )
        yield AssignStageTo(stage.worker, assignment)
    yield BroadcastState()


def restore(books: Books, layout: PipelineRecord, now_s: float) -> None:
    """Take the pipeline up as it was kept; the workers' heartbeats decide whether it still serves."""
    pipeline = books.pipeline
    pipeline.layout, pipeline.card = layout, layout.card
    pipeline.lost_s, pipeline.lost_because = now_s, "the scheduler has started again"
    pipeline.accepted_s = {stage.worker: now_s for stage in layout.stages}
    pipeline.awaited_until_s = now_s + WORKER_SILENT_S
    pipeline.move(PipelinePhase.LOADING, now_s)


def _form_when_settled(books: Books, now_s: float) -> Iterator[Instruction]:
    pipeline, stages = books.pipeline, books.settings.stages
    if not pipeline.fit:
        return
    is_settled = now_s - pipeline.fit_since_s >= books.settings.settle_s
    is_complete = stages != "auto" and len(pipeline.fit) >= stages
    if not (is_settled or is_complete or _is_urgent(books)):
        return
    at_least = _least_stages(books, now_s)
    if len(pipeline.fit) < at_least and pipeline.lost_s is not None:
        return
    workers = fit_workers(books, now_s)
    asked = (at_least, *((worker.name, worker.heartbeat.memory_bytes) for worker in workers))
    if asked == pipeline.refused_for:
        return
    pipeline.placement, _, _ = place_over(books, workers, at_least=at_least)
    if pipeline.placement.pipelines:
        pipeline.move(PipelinePhase.FORMING, now_s)
        yield TakeEpoch(books.highest_epoch)
    else:
        pipeline.refused_for = asked
        yield BroadcastState()


def _is_urgent(books: Books) -> bool:
    """Whether somebody waits for a pipeline that was lost."""
    return books.pipeline.lost_s is not None and bool(books.sequences)


def _least_stages(books: Books, now_s: float) -> int:
    """The first pipeline waits for as many as asked for; one that was lost goes on with whoever is left."""
    if books.settings.stages == "auto" or _is_urgent(books):
        return 1
    lost_s = books.pipeline.lost_s
    return 1 if lost_s is not None and now_s - lost_s >= REGROUP_S else books.settings.stages


def _become_ready(books: Books, now_s: float) -> Iterator[Instruction]:
    pipeline = books.pipeline
    pipeline.move(PipelinePhase.READY, now_s)
    pipeline.lost_s, pipeline.lost_because = None, ""
    pipeline.stepped_s = books.compared_s = now_s
    yield BroadcastState()
    if any(sequence.is_restored for sequence in books.sequences.values()):
        yield from sequence_desk.ask_head(books, now_s)
    yield from sequence_desk.start_waiting(books, now_s)


def _lose(books: Books, reason: str, now_s: float) -> Iterator[Instruction]:
    pipeline = books.pipeline
    if pipeline.is_ready:
        pipeline.lost_s = now_s
    pipeline.lost_because = reason
    pipeline.move(PipelinePhase.WAITING, now_s)
    pipeline.layout, pipeline.placement, pipeline.refused_for = None, None, None
    sequence_desk.pipeline_lost(books, now_s)
    fit = tuple(worker.name for worker in fit_workers(books, now_s))
    pipeline.fit, pipeline.fit_since_s = fit, now_s
    yield BroadcastState()


def _why_lost(books: Books, now_s: float) -> str | None:
    layout = books.pipeline.layout
    assert layout is not None, "a pipeline that loads or serves has a layer map"
    for index, stage in enumerate(layout.stages):
        worker = books.workers.get(stage.worker)
        if worker is None:
            if now_s < books.pipeline.awaited_until_s:
                continue
            return f"worker {stage.worker} (stage {index}) is silent"
        problem = _problem_of_stage(books, layout, worker, now_s)
        if problem is not None:
            return f"worker {stage.worker} (stage {index}): {problem}"
    if books.pipeline.is_ready and _is_stuck(books, layout, now_s):
        return f"no step has come out for {STUCK_S:g} s"
    return None


def _problem_of_stage(  # noqa: PLR0911  a chain of small questions
    books: Books, layout: PipelineRecord, worker: Worker, now_s: float
) -> str | None:
    beat, report = worker.heartbeat, worker.report_of(layout)
    if beat.problem is not None:
        return beat.problem
    if now_s < worker.barred_until_s:
        return worker.barred_because
    if report is None:
        accepted_s = books.pipeline.accepted_s.get(worker.name)
        if books.pipeline.is_ready or (beat.stage is not None and beat.stage.epoch > layout.epoch):
            return "it has lost its stage"
        if accepted_s is not None and worker.heard_s >= accepted_s + UNREPORTED_S:
            return "it does not report the stage that it was given"
    elif report.phase is StagePhase.FAILED:
        _bar(worker, f"its stage failed: {report.problem or 'it does not say why'}", now_s + FAILED_BARRED_S)
        return worker.barred_because
    elif report.phase is StagePhase.LOADING and now_s - worker.progress_s >= LOAD_STALLED_S:
        _bar(worker, f"loading has stood still for {LOAD_STALLED_S:g} s", now_s + FAILED_BARRED_S)
        return worker.barred_because
    if beat.leaving and _can_do_without(books, worker, now_s):
        return "it is leaving"
    return None


def _can_do_without(books: Books, leaving: Worker, now_s: float) -> bool:
    """Whether the others can hold the model; else a leaving worker serves for as long as it stays."""
    others = [worker for worker in fit_workers(books, now_s) if worker is not leaving]
    return bool(others) and bool(place_over(books, others, at_least=1)[0].pipelines)


def _is_stuck(books: Books, layout: PipelineRecord, now_s: float) -> bool:
    head = books.workers.get(layout.head)
    report = head.report_of(layout) if head is not None else None
    oldest_s = report.head.oldest_step_age_s if report is not None and report.head is not None else 0.0
    return oldest_s > STUCK_S and now_s - max(books.pipeline.stepped_s, books.deaf_until_s) > STUCK_S


def _why_anew(books: Books, now_s: float) -> str | None:
    """Whether to place again over more workers: only while nobody is served and the set is stable."""
    pipeline, layout = books.pipeline, books.pipeline.layout
    assert layout is not None, "a pipeline that loads or serves has a layer map"
    if books.sequences or not pipeline.is_ready or not set(pipeline.fit) - layout.workers:
        return None
    if now_s - max(pipeline.fit_since_s, pipeline.phase_since_s) < books.settings.settle_s:
        return None
    if books.settings.stages != "auto" and len(layout.stages) >= books.settings.stages:
        return None
    if pipeline.placement is None or set(pipeline.placement.reasons) != set(pipeline.fit):
        pipeline.placement = place_over(books, fit_workers(books, now_s), at_least=1)[0]
    if len(pipeline.placement.workers) > len(layout.stages):
        return "more workers have joined"
    return None


def _all_ready(books: Books) -> bool:
    layout = books.pipeline.layout
    assert layout is not None, "a pipeline that loads has a layer map"
    for name in layout.workers:
        worker = books.workers.get(name)
        report = worker.report_of(layout) if worker is not None else None
        if report is None or report.phase is not StagePhase.READY:
            return False
    return True


def _release_if_unneeded(books: Books, worker: Worker, now_s: float) -> Iterator[Instruction]:
    layout, stage = books.pipeline.layout, worker.heartbeat.stage
    if layout is None or stage is None or worker.name in layout.workers:
        return
    if worker.released_s is None or now_s - worker.released_s >= RELEASE_AGAIN_S:
        worker.released_s = now_s
        yield ReleaseStageOf(worker.name, stage.pipeline)


def _bar(worker: Worker, because: str, until_s: float) -> None:
    worker.barred_until_s, worker.barred_because = until_s, because


def _loading(beat: Heartbeat) -> object:
    return (beat.stage.epoch, beat.stage.phase, beat.stage.progress) if beat.stage is not None else None


def _visible(beat: Heartbeat) -> object:
    """What a reader of the state wants to hear of at once."""
    stage = (beat.stage.epoch, beat.stage.phase) if beat.stage is not None else None
    return (beat.card is None, beat.problem, beat.leaving, stage)
