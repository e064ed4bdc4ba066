"""Idle workers: who could take a stage over, and whose weights they are told to have in memory for that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from molink_common.messages import LayerRange, PreloadStages
from molink_scheduler.books import Books, PipelinePhase, Worker
from molink_scheduler.fitness import fit_workers, offers_of, placement_settings
from molink_scheduler.instructions import Instruction, PreloadStagesAt
from molink_scheduler.placement import can_hold
from molink_scheduler.records import PipelineRecord, StageRecord

PRELOAD_AGAIN_S = 5.0
"""How long the answer to `PreloadStages` may take."""


def idle_workers(books: Books, now_s: float) -> list[Worker]:
    """Fit workers that are in no layer map, in the order in which they came."""
    return [worker for worker in fit_workers(books, now_s) if books.pipeline_of(worker.name) is None]


def best_for(books: Books, layout: PipelineRecord, stage: StageRecord, among: list[Worker]) -> Worker | None:
    """Who takes the stage over with the shortest pause: who has its weights, else who is near, else the largest."""
    held = (stage.first_layer, stage.last_layer, layout.num_blocks, layout.dtype)
    settings = placement_settings(books.settings)
    offers = zip(among, offers_of(among), strict=True)
    able = [worker for worker, offer in offers if can_hold(layout.card, offer, *held, settings)]
    before = books.workers.get(stage.worker)

    def worth(worker: Worker) -> tuple[bool, bool, int]:
        is_near = before is not None and worker.heartbeat.site == before.heartbeat.site
        return has_loaded(worker, held[:2]), is_near, worker.heartbeat.memory_bytes

    return max(able, key=worth, default=None)


def has_loaded(worker: Worker, layers: LayerRange) -> bool:
    """Whether the weights of exactly these layers are in its memory, beside a stage at work."""
    return layers in worker.heartbeat.preloaded


def preload(books: Books, now_s: float) -> Iterator[Instruction]:
    """Tell idle workers which stages of the pipelines that serve to have in memory, whenever that has changed."""
    layouts = _layouts(books)
    if not layouts:
        return
    spoken_for = {
        stage.worker for one in books.pipelines.values() if one.better is not None for stage in one.better.stages
    }
    idle = [worker for worker in idle_workers(books, now_s) if worker.name not in spoken_for]
    first_of = Counter(worker.preload.layers[0] for worker in idle if worker.preload is not None)
    for worker in idle:
        if worker.preload is None or not _suits(worker.preload, layouts):
            ranges = _ranges(layouts)
            start = min(range(len(ranges)), key=lambda index: (first_of[ranges[index]], index))
            first_of[ranges[start]] += 1
            yield _tell(worker, _order(layouts, (*ranges[start:], *ranges[:start])), now_s)
        else:
            yield from tell_to_preload(worker, worker.preload, now_s)


def tell_to_preload(worker: Worker, wanted: PreloadStages, now_s: float) -> Iterator[Instruction]:
    """Say it once, and again while no answer comes."""
    is_heard = worker.preload_taken or now_s - worker.preload_told_s < PRELOAD_AGAIN_S
    if worker.preload != wanted or not is_heard:
        yield _tell(worker, wanted, now_s)


def preload_first(books: Books, stage: StageRecord, worker: Worker, now_s: float) -> Iterator[Instruction]:
    """Tell a worker to load a stage's weights before any others: it is about to take the stage over."""
    layouts, wanted = _layouts(books), (stage.first_layer, stage.last_layer)
    if worker.preload is None or worker.preload.layers[0] != wanted or not _suits(worker.preload, layouts):
        rest = tuple(layers for layers in _ranges(layouts) if layers != wanted)
        yield _tell(worker, _order(layouts, (wanted, *rest)), now_s)


def preload_answered(books: Books, name: str, problem: str | None) -> None:
    """It is being done, or it is tried again a little later."""
    worker = books.workers.get(name)
    if worker is not None and problem is None:
        worker.preload_taken = True


def _layouts(books: Books) -> list[PipelineRecord]:
    """Of the pipelines that serve; of those with another dtype than the first, nothing is preloaded."""
    settled = (PipelinePhase.READY, PipelinePhase.REPLACING)
    layouts = [one.layout for one in books.pipelines.values() if one.layout is not None and one.phase in settled]
    return [layout for layout in layouts if layout.dtype is layouts[0].dtype]


def _tell(worker: Worker, wanted: PreloadStages, now_s: float) -> PreloadStagesAt:
    worker.preload, worker.preload_told_s, worker.preload_taken = wanted, now_s, False
    return PreloadStagesAt(worker.name, wanted)


def _ranges(layouts: list[PipelineRecord]) -> tuple[LayerRange, ...]:
    """Of all pipelines, each once."""
    ranges = [(stage.first_layer, stage.last_layer) for layout in layouts for stage in layout.stages]
    return tuple(dict.fromkeys(ranges))


def _order(layouts: list[PipelineRecord], layers: tuple[LayerRange, ...]) -> PreloadStages:
    return PreloadStages(
        fingerprint=layouts[0].card.fingerprint,
        layers=layers,
        dtype=layouts[0].dtype,
        num_blocks=max(layout.num_blocks for layout in layouts),
        block_size=layouts[0].block_size,
    )


def _suits(told: PreloadStages, layouts: list[PipelineRecord]) -> bool:
    """Whether what a worker was told is still what is needed, in whatever order."""
    wanted = _order(layouts, told.layers)
    return told == wanted and set(told.layers) == set(_ranges(layouts))
