"""From a placed layer map to what is kept of it, and to what each worker is told."""

from __future__ import annotations

from collections.abc import Iterator

from molink_common.messages import AssignStage, Dtype, LinkCodec, ModelCard, Scheduling
from molink_scheduler.books import Books
from molink_scheduler.instructions import AssignStageTo
from molink_scheduler.placement import LayerMap
from molink_scheduler.records import PipelineRecord, StageRecord
from molink_scheduler.settings import SchedulerSettings

MOST_CONTINUED_EPOCHS = 64
"""Of those before, a sequence that is still served is started again after a restart of the scheduler: harmless."""


def new_layout(
    books: Books, layer_map: LayerMap, *, pipeline: int, epoch: int, card: ModelCard, dtype: Dtype
) -> PipelineRecord:
    """The pipeline that a placement describes."""
    sites = [books.workers[stage.worker].heartbeat.site for stage in layer_map.stages]
    return PipelineRecord(
        pipeline=pipeline,
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
                codec=_codec(books.settings, crosses=site != next_site),
            )
            for stage, site, next_site in zip(layer_map.stages, sites, [*sites[1:], sites[-1]], strict=True)
        ),
    )


def _codec(settings: SchedulerSettings, *, crosses: bool) -> LinkCodec:
    """Within a site the bytes that a codec saves are worth less than its time, unless the link is found to be slow."""
    if settings.link_codec is LinkCodec.AUTO:
        # the baselines know no codec but one that is asked for
        return LinkCodec.AUTO if settings.scheduling is Scheduling.ADAPTIVE else LinkCodec.RAW
    return settings.link_codec if crosses else LinkCodec.RAW


def with_others(layout: PipelineRecord, others: dict[str, str], *, epoch: int, is_continued: bool) -> PipelineRecord:
    """The same stages in a new epoch, some of them on other workers. Links keep their codecs, as they go on."""
    continued = (*layout.continued_epochs, layout.epoch)[-MOST_CONTINUED_EPOCHS:] if is_continued else ()
    stages = tuple(
        stage.model_copy(update={"worker": others.get(stage.worker, stage.worker)}) for stage in layout.stages
    )
    return layout.model_copy(update={"epoch": epoch, "stages": stages, "continued_epochs": continued})


def assignments(layout: PipelineRecord, *, new_workers: frozenset[str] = frozenset()) -> Iterator[AssignStageTo]:
    """What each worker is told. In a continued epoch all but the new worker go on with what they hold."""
    continues = layout.continued_epochs[-1] if layout.continued_epochs else None
    rebuild = None
    if continues is not None:
        rebuild = next(index for index, stage in enumerate(layout.stages) if stage.worker in new_workers)
    for index, stage in enumerate(layout.stages):
        assignment = AssignStage(
            pipeline=layout.pipeline,
            epoch=layout.epoch,
            fingerprint=layout.card.fingerprint,
            index=index,
            num_stages=len(layout.stages),
            first_layer=stage.first_layer,
            last_layer=stage.last_layer,
            dtype=layout.dtype,
            num_blocks=layout.num_blocks,
            block_size=layout.block_size,
            policy=layout.policy,
            codec=stage.codec,
            continues_epoch=None if stage.worker in new_workers else continues,
            rebuild=rebuild,
        )
        yield AssignStageTo(stage.worker, assignment)
