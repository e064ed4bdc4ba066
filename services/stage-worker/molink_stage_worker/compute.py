"""What happens in the compute thread: one call a step, from the bytes that came in to the bytes that go out.

Decoding a frame is a view and encoding it is the one copy that is needed (the engine owns its output until the
next step), so the event loop has nothing to do but to pass a finished buffer to the socket.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from molink_common import messages
from molink_common.errors import ProtocolError
from molink_common.identity import sequence_id, sequence_number
from molink_common.messages import StepTokens, TokenEvent
from molink_common.wire import Codec, Entry, Extra, Logits, StageTiming, StepFrame, Traffic, encode_frame
from molink_stage_worker.activation_codec import decode_hidden, encode_hidden
from molink_stage_worker.engine.interface import Engine
from molink_stage_worker.lives import Lives
from molink_stage_worker.sampling import Sampler

_NOTHING = memoryview(b"")


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


class StageCompute:
    """An engine, and at the tail a sampler. `run` is called from one thread, one step after the other."""

    def __init__(self, engine: Engine, sampler: Sampler | None, *, codec: Codec = Codec.RAW) -> None:
        self.engine = engine
        self._sampler = sampler
        self._codec = codec
        self._lives = Lives()

    def run(self, step: StageStep) -> StageResult:
        """Compute a step. What a peer got wrong empties the step; every other error is the caller's to handle."""
        began_ns = time.perf_counter_ns()
        started_ns = time.time_ns()
        closed = self._lives.close(step.extra.closes)
        refused: tuple[Entry, ...] = ()
        problem = ""
        try:
            payload, tokens = self._forward(step, closed, began_ns)
        except ProtocolError as error:
            refused, problem = step.frame.entries, str(error)
            empty = replace(step.frame, entries=(), hidden=_NOTHING, codec=Codec.RAW)
            without = replace(step, frame=empty, token_ids=None if step.token_ids is None else ())
            payload, tokens = self._forward(without, closed, began_ns)
        return StageResult(
            payload=payload,
            step=step.frame.step,
            traffic=step.frame.traffic,
            num_tokens=0 if refused else step.frame.num_tokens,
            tokens=tokens,
            traces=tuple(step.extra.traces.values()),
            started_ns=started_ns,
            ended_ns=time.time_ns(),
            refused=refused,
            problem=problem,
        )

    def _forward(
        self, step: StageStep, closed: tuple[str, ...], began_ns: int
    ) -> tuple[bytes | bytearray, StepTokens | None]:
        frame, extra = step.frame, step.extra
        if self._sampler is not None:
            for name in closed:
                self._sampler.close(name)
            for opening in extra.opens:
                self._sampler.open(opening)
            _check_known(self._sampler, frame.entries)
        hidden = None
        if step.token_ids is None:
            hidden = decode_hidden(
                frame.hidden,
                num_tokens=frame.num_tokens,
                hidden_size=frame.hidden_size,
                dtype=frame.dtype,
                codec=frame.codec,
            )
        closes = [sequence_number(name) for name in closed]
        output = self.engine.run(frame.entries, closes, token_ids=step.token_ids, hidden=hidden)
        self._lives.open(frame.entries, frame.step)
        waited_us = max(began_ns - step.ready_ns, 0) // 1000
        if self._sampler is None:
            raw = _NOTHING if output.hidden is None else output.hidden
            hidden = encode_hidden(raw, hidden_size=frame.hidden_size, dtype=frame.dtype, codec=self._codec)
            timing = StageTiming(compute_us=_since_us(began_ns), waited_us=waited_us)
            passed_on = replace(frame, hidden=hidden, codec=self._codec, timings=(*frame.timings, timing))
            return encode_frame(passed_on), None
        events, failed = self._sample(self._sampler, frame, output.logits_RV)
        timing = StageTiming(compute_us=_since_us(began_ns), waited_us=waited_us)
        # built without validation: this runs for every step, and every value is our own
        tokens = StepTokens.model_construct(
            pipeline=frame.pipeline,
            epoch=frame.epoch,
            step=frame.step,
            events=tuple(events),
            failed=tuple(failed),
            timings=tuple((one.compute_us, one.waited_us) for one in (*frame.timings, timing)),
        )
        return messages.encode(tokens), tokens

    def _sample(
        self, sampler: Sampler, frame: StepFrame, logits_RV: torch.Tensor | None
    ) -> tuple[list[TokenEvent], list[str]]:
        names = [sequence_id(entry.sequence) for entry in frame.entries if entry.logits is not Logits.NONE]
        events: list[TokenEvent] = []
        failed: list[str] = []
        if names and logits_RV is not None:
            events, failed = sampler.sample(_last_rows(logits_RV, frame.entries), names)
        return events, failed


def _since_us(began_ns: int) -> int:
    return (time.perf_counter_ns() - began_ns) // 1000


def _check_known(sampler: Sampler, entries: tuple[Entry, ...]) -> None:
    for entry in entries:
        if entry.logits is not Logits.NONE and not sampler.knows(sequence_id(entry.sequence)):
            raise ProtocolError(f"sequence {sequence_id(entry.sequence)} wants a token but was never opened")


def _last_rows(logits_RV: torch.Tensor, entries: tuple[Entry, ...]) -> torch.Tensor:
    """The row of each entry's last token. Rows of the tokens before it are there for entries that ask for all."""
    if all(entry.logits is not Logits.ALL for entry in entries):
        return logits_RV
    rows: list[int] = []
    count = 0
    for entry in entries:
        count += (0, 1, entry.count)[entry.logits]
        if entry.logits is not Logits.NONE:
            rows.append(count - 1)
    return logits_RV[rows]
