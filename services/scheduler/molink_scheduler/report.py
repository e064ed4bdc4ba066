"""The state of everything, with a reason for each worker, for gateways and for people."""

from __future__ import annotations

from molink_common.messages import ClusterState, PipelineState, StagePhase, WorkerState
from molink_scheduler.books import Books, Pipeline, PipelinePhase, Worker
from molink_scheduler.fitness import pool_card, why_unfit
from molink_scheduler.records import PipelineRecord


def cluster_state(books: Books, now_s: float) -> ClusterState:
    """What is broadcast."""
    reason = _why_not_ready(books, now_s)
    return ClusterState(
        ready=reason is None,
        reason=reason or "ready",
        card=pool_card(books),
        workers=tuple(_worker_state(books, worker, now_s) for worker in books.workers.values()),
        pipelines=_pipelines(books),
        sequences=len(books.sequences),
        max_sequences=books.settings.max_sequences,
        keys_revision=books.keys.revision,
    )


def _why_not_ready(books: Books, now_s: float) -> str | None:
    if books.store_down_s is not None:
        return (
            f"Redis has not answered for {now_s - books.store_down_s:.0f} s: "
            "running sequences go on, new ones are refused"
        )
    return None if books.ready_pipelines else _why_no_pipeline(books, books.pipeline, now_s)


def _why_no_pipeline(books: Books, pipeline: Pipeline, now_s: float) -> str | None:
    after = f" ({pipeline.lost_because})" if pipeline.lost_because else ""
    match pipeline.phase:
        case PipelinePhase.READY:
            return None
        case PipelinePhase.REPLACING:
            return f"another worker takes a stage over{after}"
        case PipelinePhase.LOADING:
            return f"stages are loading{after}: " + _loading(books, pipeline)
        case PipelinePhase.FORMING:
            return f"a pipeline is being formed{after}"
        case PipelinePhase.WAITING:
            return _why_waiting(books, now_s) + after


def _why_waiting(books: Books, now_s: float) -> str:
    pipeline = books.pipeline
    if not books.workers:
        return "no worker is there"
    if not pipeline.fit:
        card = pool_card(books)
        each = "; ".join(f"{worker.name}: {why_unfit(worker, card, now_s)}" for worker in books.workers.values())
        return f"no worker is fit: {each}"
    if pipeline.placement is not None and pipeline.placement.problem is not None:
        return pipeline.placement.problem
    return f"{len(pipeline.fit)} fit worker(s); waiting whether more come"


def _loading(books: Books, pipeline: Pipeline) -> str:
    layout = pipeline.layout
    assert layout is not None, "a pipeline that loads has a layer map"
    parts: list[str] = []
    for index, stage in enumerate(layout.stages):
        worker = books.workers.get(stage.worker)
        report = worker.report_of(layout) if worker is not None else None
        if report is None:
            parts.append(f"stage {index} has not begun")
        elif report.phase is StagePhase.LOADING:
            parts.append(f"stage {index} {report.progress:.0%}")
    return ", ".join(parts) or "all are loaded"


def _pipelines(books: Books) -> tuple[PipelineState, ...]:
    layouts = [(one, one.layout) for one in books.pipelines.values() if one.layout is not None]
    return tuple(_pipeline_state(books, pipeline, layout) for pipeline, layout in layouts)


def _pipeline_state(books: Books, pipeline: Pipeline, layout: PipelineRecord) -> PipelineState:
    head = books.workers.get(layout.head)
    report = head.report_of(layout) if head is not None else None
    return PipelineState(
        pipeline=layout.pipeline,
        epoch=layout.epoch,
        ready=pipeline.is_ready,
        model=layout.card.name,
        dtype=layout.dtype,
        num_blocks=layout.num_blocks,
        block_size=layout.block_size,
        policy=layout.policy,
        stages=tuple(stage.worker for stage in layout.stages),
        layers=tuple((stage.first_layer, stage.last_layer) for stage in layout.stages),
        head=report.head if report is not None else None,
    )


def _worker_state(books: Books, worker: Worker, now_s: float) -> WorkerState:
    beat = worker.heartbeat
    role, reason = _role(books, worker, now_s)
    return WorkerState(
        worker=beat.worker,
        site=beat.site,
        device=beat.device,
        device_name=beat.device_name,
        memory_bytes=beat.memory_bytes,
        rss_bytes=beat.rss_bytes,
        silent_s=max(0.0, round(now_s - worker.heard_s, 3)),
        role=role,
        reason=reason,
        stage=beat.stage,
    )


def _role(books: Books, worker: Worker, now_s: float) -> tuple[str, str]:
    pipeline = books.pipeline_of(worker.name)
    if pipeline is not None and pipeline.layout is not None:
        return _role_in_pipeline(pipeline, pipeline.layout, worker)
    unfit = why_unfit(worker, pool_card(books), now_s)
    if unfit is not None:
        is_preparing = worker.heartbeat.card is None and worker.heartbeat.problem is None
        return ("preparing" if is_preparing and not worker.heartbeat.leaving else "unfit"), unfit
    return "standby", _why_standby(books, worker) + _what_is_preloaded(books, worker)


def _why_standby(books: Books, worker: Worker) -> str:
    pipeline = books.pipeline
    layout, placement = pipeline.layout, pipeline.placement
    placed = placement.reasons.get(worker.name) if placement is not None else None
    if layout is None:
        return placed or "waiting for a pipeline to be formed"
    if placed is not None and placement is not None and worker.name not in placement.workers:
        return placed
    if books.settings.stages != "auto" and len(layout.stages) >= books.settings.stages:
        return f"the pipeline has the {books.settings.stages} stages that the settings ask for"
    return "it came after the pipeline was formed; it is taken in when no sequence runs"


def _what_is_preloaded(books: Books, worker: Worker) -> str:
    layout, preloaded = books.pipeline.layout, worker.heartbeat.preloaded
    if layout is None or not preloaded:
        return ""
    stages = [i for i, stage in enumerate(layout.stages) if (stage.first_layer, stage.last_layer) in preloaded]
    names = f"stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}" if stages else "other layers"
    return f"; it has {names} in memory, to take over at once"


def _role_in_pipeline(pipeline: Pipeline, layout: PipelineRecord, worker: Worker) -> tuple[str, str]:
    index = next(i for i, stage in enumerate(layout.stages) if stage.worker == worker.name)
    stage, report = layout.stages[index], worker.report_of(layout)
    role = f"stage {index} of pipeline {layout.pipeline}"
    layers = f"layers {stage.first_layer} to {stage.last_layer - 1} of {layout.card.num_layers}"
    if worker.heartbeat.leaving:
        return role, f"{layers}; it is leaving, and serves until others can do without it"
    if report is None:
        is_taken = worker.name in pipeline.accepted_s
        return role, f"{layers}; " + ("about to load" if is_taken else "told to load, no answer yet")
    match report.phase:
        case StagePhase.LOADING:
            return role, f"{layers}; loading, {report.progress:.0%}"
        case StagePhase.READY:
            return role, f"{layers}; serving" if pipeline.is_ready else f"{layers}; ready, waiting for the others"
        case StagePhase.FAILED:
            return role, f"{layers}; failed: {report.problem or 'it does not say why'}"
