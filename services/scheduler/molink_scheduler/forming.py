"""Decisions about forming a pipeline: over whom, when, and when to form it anew over more workers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from molink_scheduler.books import FIRST_PIPELINE, Books, Pipeline, PipelinePhase, Worker
from molink_scheduler.fitness import fit_workers, place_over
from molink_scheduler.instructions import BroadcastState, Instruction, SavePipeline, TakeEpoch
from molink_scheduler.layouts import assignments, new_layout
from molink_scheduler.standby import idle_workers

REGROUP_S = 10.0
"""How long a lost pipeline that nobody waits for is given to find as many workers as it is to have."""


def available(books: Books, pipeline: Pipeline, now_s: float) -> list[Worker]:
    """Fit workers that no other pipeline has."""
    return [worker for worker in fit_workers(books, now_s) if books.pipeline_of(worker.name) in (None, pipeline)]


def look_around(books: Books, pipeline: Pipeline, now_s: float) -> None:
    """Note who could be given a stage, and since when these."""
    fit = tuple(worker.name for worker in available(books, pipeline, now_s))
    if fit != pipeline.fit:
        pipeline.fit, pipeline.fit_since_s = fit, now_s
        if pipeline.phase is PipelinePhase.WAITING:
            pipeline.placement, pipeline.refused_for = None, None


def form_when_settled(books: Books, pipeline: Pipeline, now_s: float) -> Iterator[Instruction]:
    """Ask for an epoch as soon as the workers that are there will do."""
    stages = books.settings.stages
    if not pipeline.fit:
        return
    is_settled = now_s - pipeline.fit_since_s >= books.settings.settle_s
    is_complete = stages != "auto" and len(pipeline.fit) >= stages
    if not (is_settled or is_complete or _is_urgent(books, pipeline)):
        return
    at_least = _least_stages(books, pipeline, now_s)
    if len(pipeline.fit) < at_least and pipeline.lost_s is not None:
        return
    workers = available(books, pipeline, now_s)
    asked = (at_least, *((worker.name, worker.heartbeat.memory_bytes) for worker in workers))
    if asked == pipeline.refused_for:
        return
    pipeline.placement, _, _ = place_over(books, workers, at_least=at_least, standbys=books.settings.standbys)
    if pipeline.placement.pipelines:
        pipeline.move(PipelinePhase.FORMING, now_s)
        yield TakeEpoch(books.highest_epoch, pipeline.number)
    else:
        pipeline.refused_for = asked
        yield BroadcastState()


def place_and_assign(books: Books, pipeline: Pipeline, epoch: int, now_s: float) -> Iterator[Instruction]:
    """Place over the workers that are fit now, and assign every stage."""
    workers = available(books, pipeline, now_s)
    if not workers:
        pipeline.move(PipelinePhase.WAITING, now_s)
        return
    placement, dtype, card = place_over(
        books, workers, at_least=_least_stages(books, pipeline, now_s), standbys=books.settings.standbys
    )
    pipeline.placement = placement
    if not placement.pipelines:
        pipeline.move(PipelinePhase.WAITING, now_s)
        return
    layer_map = placement.pipelines[0]
    if pipeline.better is not None and {one.worker for one in pipeline.better.stages} <= {one.name for one in workers}:
        layer_map = pipeline.better
    pipeline.better = None
    layout = new_layout(books, layer_map, pipeline=pipeline.number, epoch=epoch, card=card, dtype=dtype)
    pipeline.layout, pipeline.card = layout, layout.card
    pipeline.accepted_s, pipeline.gone, pipeline.awaited_until_s = {}, {}, now_s
    pipeline.refused_because, pipeline.continued_epoch, pipeline.is_kept = None, None, False
    pipeline.move(PipelinePhase.LOADING, now_s)
    yield SavePipeline(layout)
    for stage in layout.stages:
        worker = books.workers[stage.worker]
        worker.progress_s, worker.preload = now_s, None
    yield from assignments(layout)
    yield BroadcastState()


def form_further(books: Books, now_s: float) -> Iterator[Instruction]:
    """Begin another pipeline of idle workers when they can hold the whole model; else they are standbys."""
    settings, pipelines = books.settings, books.pipelines
    if not all(one.is_ready for one in pipelines.values()) or _is_enough(settings.pipelines, len(pipelines)):
        return
    idle = idle_workers(books, now_s)
    least = 1 if settings.stages == "auto" else settings.stages
    asked = (least, *((worker.name, worker.heartbeat.memory_bytes) for worker in idle))
    if books.idle_seen != asked:
        books.idle_seen, books.idle_since_s = asked, now_s
    if len(idle) < least or books.idle_hopeless == asked or now_s - books.idle_since_s < settings.settle_s:
        return
    placement, _, _ = place_over(books, idle, at_least=least, standbys=settings.standbys)
    if not placement.pipelines or len(idle) - len(placement.workers) < settings.standbys:
        books.idle_hopeless = asked
        return
    number = next(number for number in count(FIRST_PIPELINE) if number not in pipelines)
    pipeline = pipelines[number] = Pipeline(number=number, placement=placement)
    pipeline.move(PipelinePhase.FORMING, now_s)
    yield TakeEpoch(books.highest_epoch, number)


def is_given_up(books: Books, pipeline: Pipeline) -> bool:
    """Whether a pipeline that waits for workers is one too many: another serves, and idle workers may join it."""
    return pipeline.phase is PipelinePhase.WAITING and any(one.layout is not None for one in books.pipelines.values())


def _is_enough(most: int | str, have: int) -> bool:
    return isinstance(most, int) and have >= most


def can_do_without(books: Books, pipeline: Pipeline, leaving: Worker, now_s: float) -> bool:
    """Whether the others can hold the model; else a leaving worker serves for as long as it stays."""
    others = [worker for worker in available(books, pipeline, now_s) if worker is not leaving]
    return bool(others) and bool(place_over(books, others, at_least=1)[0].pipelines)


def why_anew(books: Books, pipeline: Pipeline, now_s: float) -> str | None:
    """Whether to place again over more workers: only while nobody is served and the set is stable."""
    layout = pipeline.layout
    assert layout is not None, "a pipeline that loads or serves has a layer map"
    if books.sequences or not pipeline.is_ready or not set(pipeline.fit) - layout.workers:
        return None
    if len(books.pipelines) > 1:
        return None  # the others serve, or are about to
    if now_s - max(pipeline.fit_since_s, pipeline.phase_since_s) < books.settings.settle_s:
        return None
    if books.settings.stages != "auto" and len(layout.stages) >= books.settings.stages:
        return None
    if pipeline.placement is None or set(pipeline.placement.reasons) != set(pipeline.fit):
        workers = available(books, pipeline, now_s)
        pipeline.placement = place_over(books, workers, at_least=1, standbys=books.settings.standbys)[0]
    if len(pipeline.placement.workers) > len(layout.stages):
        return "more workers have joined"
    return None


def _is_urgent(books: Books, pipeline: Pipeline) -> bool:
    """Whether somebody waits for a pipeline that was lost."""
    return pipeline.lost_s is not None and bool(books.sequences)


def _least_stages(books: Books, pipeline: Pipeline, now_s: float) -> int:
    """The first pipeline waits for as many as asked for; one that was lost goes on with whoever is left."""
    if books.settings.stages == "auto" or _is_urgent(books, pipeline):
        return 1
    lost_s = pipeline.lost_s
    return 1 if lost_s is not None and now_s - lost_s >= REGROUP_S else books.settings.stages
