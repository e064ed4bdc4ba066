"""A step as it enters a stage and as it leaves it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from molink_common.identity import sequence_id
from molink_common.messages import AssignStage, StepTokens
from molink_common.wire import Codec, Entry, Extra, StepFrame, Traffic
from molink_stage_worker.batch_plan import StepPlan
from molink_stage_worker.planning.step_load import StepLoad

NOTHING = memoryview(b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStep:
    """A step as it enters a stage."""

    frame: StepFrame
    """Its `hidden` is empty at the head."""
    extra: Extra
    token_ids: tuple[int, ...] | None = None
    """At the head only."""
    ready_ns: int
    """When it could have begun, by `time.perf_counter_ns`."""
    rides_along: bool = False
    """Planned to be computed in one pass with the step before it."""
    load: StepLoad = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "load", StepLoad.of(self.frame.entries))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """A step as it leaves a stage: what to publish where."""

    payload: bytes | bytearray
    step: int = 0
    traffic: Traffic = Traffic.DECODE
    num_tokens: int = 0
    tokens: StepTokens | None = None
    """At the tail only; `payload` carries the same. Without, `payload` is a frame for the next stage."""
    traces: tuple[str, ...] = ()
    """``traceparent`` of each traced sequence."""
    started_ns: int = 0
    """Since 1970."""
    ended_ns: int = 0
    refused: tuple[Entry, ...] = ()
    """Entries that the engine found to contradict what it knows; the step went on without them."""
    problem: str = ""
    codec: Codec = Codec.ABSENT
    """Of the hidden states in `payload`; a tail's has none."""


def planned(plan: StepPlan, place: AssignStage, hidden_size: int, *, along: bool) -> StageStep:
    """What the head has planned, as it enters the first stage: token ids and no hidden states yet.

    `along`: to be computed in one pass with the step before it.
    """
    extra = plan.extra()
    frame = StepFrame(
        pipeline=place.pipeline,
        epoch=place.epoch,
        step=plan.step,
        entries=plan.entries,
        extra=extra.encode(),
        hidden_size=hidden_size,
        dtype=place.dtype,
        hidden=NOTHING,
        traffic=plan.traffic,
    )
    return StageStep(
        frame=frame, extra=extra, token_ids=plan.token_ids, ready_ns=time.perf_counter_ns(), rides_along=along
    )


def emptied(step: StageStep) -> StageStep:
    """The step without its entries, so that its closes get on and the head hears at once whose tokens are refused."""
    return refusing(step, step.frame.entries)


def refusing(step: StageStep, refused: Iterable[Entry]) -> StageStep:
    """The step without some of its entries and without hidden states: what it still has is for the caller to add."""
    entries = frozenset(entry.sequence for entry in refused)
    kept = tuple(entry for entry in step.frame.entries if entry.sequence not in entries)
    names = (*step.extra.refused, *(sequence_id(number) for number in entries))
    extra = step.extra.model_copy(update={"refused": names})
    codec = Codec.ABSENT if kept else Codec.RAW
    frame = replace(step.frame, entries=kept, hidden=NOTHING, codec=codec, extra=extra.encode())
    return replace(step, frame=frame, extra=extra, token_ids=None if step.token_ids is None else ())
