"""The span that a step leaves at a stage, in the trace of each request that it served."""

from __future__ import annotations

from molink_common.telemetry import Telemetry
from molink_common.wire import Codec
from molink_stage_worker.activation_codec import EXACTNESS
from molink_stage_worker.stage_step import StageResult


def trace_step(telemetry: Telemetry, result: StageResult, *, worker: str, stage: int) -> None:
    """Record it."""
    for parent in result.traces:
        telemetry.record(
            "stage step",
            parent=parent,
            start_ns=result.started_ns,
            end_ns=result.ended_ns,
            attributes={
                "molink.worker": worker,
                "molink.stage": stage,
                "molink.step": result.step,
                "molink.tokens": result.num_tokens,
                "molink.traffic": result.traffic.name.lower(),
                **_codec_attributes(result.codec),
            },
        )


def _codec_attributes(codec: Codec) -> dict[str, str]:
    if codec is Codec.ABSENT:
        return {}
    return {"molink.link_codec": codec.name.lower(), "molink.link_exactness": EXACTNESS[codec]}
