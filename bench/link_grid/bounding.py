"""A cell's bound, from what the system says of its stages and what the laboratory knows of its link. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bench.bounds import LinearCost, LinkBound, Load, PipelineBound, StepCost, payload_bytes_per_s
from bench.cost_curve import CostCurve
from bench.link_grid.cells import EngineKind, Setup, link_of
from bench.link_grid.steady_load import LoadShape, SteadyLoad
from molink_common.messages import Dtype


def pipeline_bound(setup: Setup, curve: CostCurve, status: Mapping[str, Any]) -> PipelineBound | None:
    """The pipeline that `status` shows, as physics sees it; None while the costs of its stages are not known.

    A timed stage costs what its curve says; a real one what the head has measured, while everything else ran too.
    """
    pipeline = status["pipelines"][0]
    if setup.engine is EngineKind.SYNTHETIC:
        stages: tuple[StepCost, ...] = tuple(curve.stage(last - first) for first, last in pipeline["layers"])
    else:
        costs = (pipeline.get("head") or {}).get("costs") or ()
        stages = tuple(_measured(cost) for cost in costs)
    if len(stages) != setup.stages:
        return None
    link = link_bound(setup.link)
    card = status["card"]
    return PipelineBound(
        stages=stages,
        links=(link,) * (setup.stages - 1),
        return_s=link.one_way_s,
        bytes_a_token=card["hidden_size"] * Dtype(pipeline["dtype"]).size_bytes * _share_left(status),
    )


def link_bound(name: str) -> LinkBound:
    """A link of the grid."""
    spec = link_of(name)
    if spec is None:
        return LinkBound(rate_bytes_per_s=None, one_way_s=0.0)
    rate_bytes_per_s = payload_bytes_per_s(spec.rate_bit_per_s, spec.mtu_bytes)
    return LinkBound(rate_bytes_per_s=rate_bytes_per_s, one_way_s=spec.round_trip_s / 2)


def closed_loop(streams: int) -> Load:
    """The load of streams alone. In a closed loop a stream is, on average, half through its answer."""
    shape = LoadShape(streams=streams)
    return Load(
        sequences=streams,
        context_tokens=shape.prompt_tokens + shape.answer_tokens / 2,
        prompt_share=(shape.prompt_tokens - 1) / shape.answer_tokens,
    )


def _share_left(status: Mapping[str, Any]) -> float:
    """What codecs leave of the bytes, where they leave least: so the bound is none too low."""
    stages = (worker.get("stage") or {} for worker in status["workers"])
    return min((stage["link"]["share_left"] for stage in stages if stage.get("link")), default=1.0)


def load_of(load: SteadyLoad, until_s: float) -> Load:
    """What the pipeline carried.

    Long prompts count if they were answered since the load began, before which there were none: so they were carried
    for certain, and the bound is none too low.
    """
    answered = sum(one.prompt_tokens for one in load.newcomers if one.arrivals and one.arrivals[0][0] < until_s)
    return replace(closed_loop(load.shape.streams), prompt_tokens_per_s=answered / (until_s - load.began_s))


def _measured(cost: Mapping[str, Any]) -> LinearCost:
    """No term of a physical cost is below 0; a fit's may be, where two of them cannot be told apart."""
    return LinearCost(
        fixed_s=max(cost["fixed_s"], 0.0),
        per_token_s=max(cost["per_token_s"], 0.0),
        per_sequence_s=max(cost["per_sequence_s"], 0.0),
        per_context_token_s=max(cost["per_context_token_s"], 0.0),
    )
