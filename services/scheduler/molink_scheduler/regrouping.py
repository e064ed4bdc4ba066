"""A pipeline that serves is formed anew where another layer map would be much faster: somebody has joined.

    READY ─▶ a better layer map is found ─▶ its stages are preloaded ─▶ all are there ─▶ formed anew, as after a loss

The weights are in memory before anything is given up, so the streams pause for as long as their tokens take to be
computed again. To be worth that, the gain must be large and last: the set of workers has been the same for a while,
and after each time the next one has to wait twice as long. What links carry is known only where frames have gone, so a
layer map that looks better from afar may not be: it may not cross more slow links, and the stages decide.
"""

from __future__ import annotations

from collections.abc import Iterator

from molink_common.messages import PreloadStages
from molink_scheduler.books import Books, Pipeline
from molink_scheduler.fitness import offers_of, place_over, placement_settings
from molink_scheduler.forming import available
from molink_scheduler.instructions import Instruction
from molink_scheduler.placement import Forecast, LayerMap, PlacedStage, is_worth_moving
from molink_scheduler.placement_sizes import are_measured
from molink_scheduler.records import PipelineRecord
from molink_scheduler.standby import has_loaded, tell_to_preload

STEADY_S = 30.0
"""For how long the workers and the pipeline must have been as they are."""
LOOK_EVERY_S = 10.0
GAIN = 1.3
LOADED_WITHIN_S = 300.0
"""How long the stages of a better layer map may take to be preloaded: where memory is short, they never are."""
WAIT_AGAIN_S = 60.0
MOST_WAIT_S = 3600.0


def prepare(books: Books, pipeline: Pipeline, now_s: float) -> Iterator[Instruction]:
    """Look for a better layer map, and have its stages preloaded."""
    if pipeline.better is None:
        if _is_time_to_look(pipeline, now_s):
            pipeline.better, pipeline.better_since_s = _find(books, pipeline, now_s), now_s
    elif now_s - pipeline.better_since_s >= LOADED_WITHIN_S or not _is_there(books, pipeline, pipeline.better, now_s):
        yield from _let_go(books, pipeline, pipeline.better, now_s)
        give_up(pipeline)
    if pipeline.better is not None:
        yield from _preload(books, pipeline, pipeline.better, now_s)


def is_prepared(books: Books, pipeline: Pipeline) -> bool:
    """Whether every stage of a better layer map is in its worker's memory."""
    better, layout = pipeline.better, pipeline.layout
    return (
        better is not None
        and layout is not None
        and all(not _is_missing(books, layout, stage) for stage in better.stages)
    )


def give_up(pipeline: Pipeline) -> None:
    """It is formed anew, or it cannot be: look again much later, unless the workers change."""
    pipeline.better = None
    pipeline.regroupings += 1
    pipeline.regrouped_for = pipeline.fit


def _find(books: Books, pipeline: Pipeline, now_s: float) -> LayerMap | None:
    layout = pipeline.layout
    assert layout is not None, "asked of a pipeline with a layer map"
    workers = available(books, pipeline, now_s)
    offers = offers_of(workers)
    if not are_measured(offers):
        return None
    at_least = 1 if books.settings.stages == "auto" else books.settings.stages
    placement, dtype, card = place_over(books, workers, at_least=at_least, standbys=books.settings.standbys)
    if not placement.pipelines or dtype is not layout.dtype or card.fingerprint != layout.card.fingerprint:
        return None
    present, better = _layer_map(layout), placement.pipelines[0]
    settings = placement_settings(books.settings, at_least=at_least)
    if not is_worth_moving(present, placement, offers, card, dtype=dtype, settings=settings, factor=GAIN):
        return None
    forecast = Forecast(card, offers, dtype=dtype, settings=settings)
    is_faster = max(forecast.stages_s(present)) >= GAIN * max(forecast.stages_s(better))
    return better if is_faster and forecast.crossings(better) <= forecast.crossings(present) else None


def _is_time_to_look(pipeline: Pipeline, now_s: float) -> bool:
    steady_s = now_s - max(pipeline.fit_since_s, pipeline.phase_since_s)
    wait_s = min(WAIT_AGAIN_S * 2.0 ** min(pipeline.regroupings, 16), MOST_WAIT_S) if pipeline.regroupings else STEADY_S
    is_due = steady_s >= wait_s and now_s - pipeline.better_since_s >= LOOK_EVERY_S
    return is_due and pipeline.regrouped_for != pipeline.fit


def _is_there(books: Books, pipeline: Pipeline, better: LayerMap, now_s: float) -> bool:
    there = {worker.name for worker in available(books, pipeline, now_s)}
    return all(stage.worker in there for stage in better.stages)


def _preload(books: Books, pipeline: Pipeline, better: LayerMap, now_s: float) -> Iterator[Instruction]:
    layout = pipeline.layout
    assert layout is not None, "asked of a pipeline with a layer map"
    for stage in better.stages:
        if _is_missing(books, layout, stage):
            wanted = PreloadStages(
                fingerprint=layout.card.fingerprint,
                layers=((stage.first_layer, stage.last_layer),),
                dtype=layout.dtype,
                num_blocks=better.num_blocks,
                block_size=layout.block_size,
            )
            yield from tell_to_preload(books.workers[stage.worker], wanted, now_s)


def _let_go(books: Books, pipeline: Pipeline, better: LayerMap, now_s: float) -> Iterator[Instruction]:
    """Who serves has no use for other weights any more."""
    layout = pipeline.layout
    assert layout is not None, "asked of a pipeline with a layer map"
    for name in {stage.worker for stage in better.stages} & layout.workers & books.workers.keys():
        worker = books.workers[name]
        if worker.preload is not None:
            yield from tell_to_preload(worker, worker.preload.model_copy(update={"layers": ()}), now_s)
            worker.preload = None


def _is_missing(books: Books, layout: PipelineRecord, stage: PlacedStage) -> bool:
    """Whether the worker neither has the stage at work nor its weights beside another."""
    worker = books.workers.get(stage.worker)
    layers = (stage.first_layer, stage.last_layer)
    at_work = [(one.first_layer, one.last_layer) for one in layout.stages if one.worker == stage.worker]
    return worker is None or not (layers in at_work or has_loaded(worker, layers))


def _layer_map(layout: PipelineRecord) -> LayerMap:
    return LayerMap(
        stages=tuple(
            PlacedStage(worker=one.worker, first_layer=one.first_layer, last_layer=one.last_layer, weight_bytes=0)
            for one in layout.stages
        ),
        num_blocks=layout.num_blocks,
    )
