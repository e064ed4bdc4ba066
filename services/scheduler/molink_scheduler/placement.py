"""Which worker holds which layers: a pure function from the model and the workers' offers to layer maps.

A pipeline is as fast as its slowest stage. So the cut makes that as short as memory allows; of cuts that are equally
good (within `TOLERANCE`) the one with the fewest slow crossings is taken, then that with the fewest stages: a worker
that would make nothing faster stands by. Where nobody's speed was measured, shares follow memory and every fit worker
holds a stage.
"""

from __future__ import annotations

from collections.abc import Sequence

from molink_common.messages import Dtype, ModelCard
from molink_scheduler.placement_explained import mib, why_unable, why_unused, why_used
from molink_scheduler.placement_forecast import Forecast, can_hold, is_worth_moving
from molink_scheduler.placement_pipelines import Planner
from molink_scheduler.placement_sizes import Candidate, Roads, Sizes, are_measured, candidates_of
from molink_scheduler.placement_values import LayerMap, Link, Offer, PlacedStage, Placement, PlacementSettings

__all__ = [
    "Forecast",
    "LayerMap",
    "Link",
    "Offer",
    "PlacedStage",
    "Placement",
    "PlacementSettings",
    "can_hold",
    "choose_dtype",
    "is_worth_moving",
    "place",
]


def choose_dtype(setting: Dtype | None, native: Sequence[tuple[Dtype, ...]]) -> Dtype:
    """The pipeline's dtype; `setting` None means: bfloat16 where every worker is best at it, else float32."""
    if setting is not None:
        return setting
    all_best_at_bfloat16 = bool(native) and all(kinds[:1] == (Dtype.BFLOAT16,) for kinds in native)
    return Dtype.BFLOAT16 if all_best_at_bfloat16 else Dtype.FLOAT32


def place(card: ModelCard, offers: Sequence[Offer], *, dtype: Dtype, settings: PlacementSettings) -> Placement:
    """Cut the model over the offers: every layer once in each pipeline, in order, within memory.

    With `max_pipelines` above 1, workers that the first pipeline leaves over make up further ones; or the pool is
    divided, where pipelines of its parts are faster together. Gives the same answer for the same offers, in whatever
    order they came: who starts again with a pool finds its layers on its disk.
    """
    sizes = Sizes(card, dtype, settings)
    unable = {offer.worker: why for offer in offers if (why := why_unable(offer, sizes, settings)) is not None}
    fit = [offer for offer in offers if offer.worker not in unable]
    fit.sort(key=lambda offer: (offer.site, offer.worker))
    pool = candidates_of(fit, dtype, settings.overhead_bytes)
    by_speed = are_measured(fit)
    if settings.min_stages > card.num_layers:
        problem = f"{settings.min_stages} stages asked for, the model has {card.num_layers} layers"
        return _without_pipeline(unable, pool, 0, problem)
    planner = Planner(sizes, Roads(offers, sizes.step_bytes), settings, by_speed=by_speed)
    pipelines = planner.pipelines(pool)
    if not pipelines:
        return _refused(sizes, pool, unable, settings)
    forecast = Forecast(card, fit, dtype=dtype, settings=settings) if by_speed else None
    reasons = dict(unable)
    for number, layer_map in enumerate(pipelines, 1):
        reasons |= why_used(layer_map, number, len(pipelines), card.num_layers, forecast)
    unused = [one for one in pool if one.offer.worker not in reasons]
    sites = {one.site for one in pool if one.offer.worker in reasons}
    if unused:
        reasons |= why_unused(unused, pipelines, sizes, settings, forecast, sites)
    return Placement(pipelines=tuple(pipelines), reasons=reasons)


def _refused(
    sizes: Sizes, pool: Sequence[Candidate], reasons: dict[str, str], settings: PlacementSettings
) -> Placement:
    if len(pool) < settings.min_stages and settings.min_stages > 1:
        problem = f"waiting for {settings.min_stages} workers that have room, {len(pool)} are there"
        return _without_pipeline(reasons, pool, 0, problem)
    needed = sizes.needed_bytes(0, sizes.num_layers, sizes.least_blocks)
    usable = sum(one.room_bytes for one in pool)
    missing = max(needed - usable, 0)
    if missing:
        problem = (
            f"{mib(missing)} of memory are missing: the model needs {mib(needed)} with the least KV room, "
            f"{len(pool)} fit worker(s) offer {mib(usable)} beside the overhead"
        )
    else:
        missing = 1
        problem = f"the workers' {mib(usable)} are enough in sum, but no cut of the layers fits into every one"
    return _without_pipeline(reasons, pool, missing, problem)


def _without_pipeline(reasons: dict[str, str], pool: Sequence[Candidate], missing: int, problem: str) -> Placement:
    return Placement(
        pipelines=(),
        reasons=reasons | {one.offer.worker: problem for one in pool},
        missing_bytes=missing,
        problem=problem,
    )
