"""Why a worker is used as it is, or not at all, in a sentence for a person."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from molink_scheduler.placement_forecast import Forecast
from molink_scheduler.placement_sizes import Candidate, Sizes
from molink_scheduler.placement_times import TOLERANCE
from molink_scheduler.placement_values import LayerMap, Offer, PlacementSettings


def why_unable(offer: Offer, sizes: Sizes, settings: PlacementSettings) -> str | None:
    """Why the worker can hold no stage at all, or None."""
    if offer.memory_bytes - settings.overhead_bytes >= sizes.smallest_layer_bytes:
        return None
    least_bytes = sizes.smallest_layer_bytes + settings.overhead_bytes
    return f"its {mib(offer.memory_bytes)} do not hold one layer ({mib(least_bytes)} with KV room and overhead)"


def why_used(
    layer_map: LayerMap, number: int, count: int, num_layers: int, forecast: Forecast | None
) -> dict[str, str]:
    """By worker of the pipeline. `forecast` None: no speed was measured."""
    reasons: dict[str, str] = {}
    times_s = [None] * len(layer_map.stages) if forecast is None else forecast.stages_s(layer_map)
    for stage, time_s in zip(layer_map.stages, times_s, strict=True):
        share = f"{mib(stage.weight_bytes)} of weights"
        if time_s is not None:
            slowest_s = max(time for time in times_s if time is not None)
            share += f", about {time_s * 1e3:.1f} ms a step, the slowest stage {slowest_s * 1e3:.1f} ms"
        in_which = f" in pipeline {number} of {count}" if count > 1 else ""
        reasons[stage.worker] = (
            f"holds layers {stage.first_layer} to {stage.last_layer - 1} of {num_layers}{in_which} ({share})"
        )
    return reasons


def why_unused(
    unused: Sequence[Candidate],
    pipelines: Sequence[LayerMap],
    sizes: Sizes,
    settings: PlacementSettings,
    forecast: Forecast | None,
    sites: Collection[str],
) -> dict[str, str]:
    """By worker. `sites`: of the workers that are used.

    `forecast` None: no speed was measured, and everybody was to hold a stage.
    """
    first = pipelines[0]
    stages = len(first.stages)
    if len(unused) <= settings.hold_back:
        why = f"held back as a standby: the settings ask for {settings.hold_back}"
    elif stages == sizes.num_layers:
        why = f"the model has only {sizes.num_layers} layers"
    elif stages == settings.max_stages:
        why = f"the pipeline has the {stages} stages that the settings ask for"
    elif forecast is None:
        why = "with it, no cut of the layers fits into everybody's memory"
    else:
        slowest_ms = forecast.bottleneck_s(first) * 1e3
        why = (
            f"stands by: the slowest stage ({slowest_ms:.1f} ms a step) would not become more than "
            f"{TOLERANCE - 1:.1%} faster with it"
        )
        farther = ", and its site would have to be crossed to"
        return {one.offer.worker: why + ("" if one.site in sites else farther) for one in unused}
    return {one.offer.worker: why for one in unused}


def mib(size_bytes: int) -> str:
    """For people."""
    return f"{size_bytes / 2**20:,.0f} MiB" if size_bytes >= 2**20 else f"{size_bytes:,} bytes"
