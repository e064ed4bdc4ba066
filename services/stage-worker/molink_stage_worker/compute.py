"""What happens in the compute thread: a pass over the layers for a step, or for several that wait.

From the bytes that came in to the bytes that go out.

Decoding a frame is a view and encoding it is the one copy that is needed (the engine owns its output until the
next step), so the event loop has nothing to do but to pass a finished buffer to the socket.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from molink_common import messages
from molink_common.errors import ProtocolError
from molink_common.identity import sequence_number
from molink_common.messages import StepTokens
from molink_common.wire import Codec, Entry, Logits, StageTiming, StepFrame, encode_frame
from molink_stage_worker import step_sampling
from molink_stage_worker.activation_codec import decode_hidden, encode_hidden
from molink_stage_worker.chunk_choice import MOST_LOGIT_ROWS
from molink_stage_worker.codec_choice import CodecChoice
from molink_stage_worker.engine.interface import Engine
from molink_stage_worker.journal import Journal
from molink_stage_worker.lives import Lives
from molink_stage_worker.planning.stage_cost import StageCurve, StageEstimator
from molink_stage_worker.planning.step_load import StepLoad, pays_together
from molink_stage_worker.sampling import Sampler
from molink_stage_worker.stage_step import NOTHING, StageResult, StageStep, emptied, refusing

_ALWAYS_TOKENS = 8
_TRY_TOKENS = 32
_REFUSALS_A_TRY = 16
_PASSES_A_CURVE = 8
"""Fitting it takes longer than the smallest of passes."""


class StageCompute:
    """An engine, and at the tail a sampler. Used by one thread."""

    def __init__(self, engine: Engine, sampler: Sampler | None, *, codecs: CodecChoice) -> None:
        self.engine = engine
        self.codecs = codecs
        self._sampler = sampler
        self._lives = Lives()
        self._cost = StageEstimator()
        self._curve: StageCurve | None = None
        self._passes = 0
        self._refusals = 0
        self._index = 0
        self._journal: Journal | None = None
        self.longest_pass_s = 0.0
        """Of the passes that ended."""
        self._pass_began_s: float | None = None
        self._pass_takes_s: float | None = None

    def take_place(self, index: int, journal: Journal | None) -> None:
        """Which stage this is, and where what it sends is kept. To be called before any step of an epoch."""
        self._index = index
        self._journal = journal

    def pass_age_s(self, now_s: float) -> float:
        """How long the present pass has been computing, by `time.monotonic`; 0 between passes. From any thread."""
        began_s = self._pass_began_s
        return 0.0 if began_s is None else max(now_s - began_s, 0.0)

    def pass_left_s(self, now_s: float) -> float | None:
        """How long the present pass will go on, by what passes like it took. None: not known. From any thread."""
        began_s, takes_s = self._pass_began_s, self._pass_takes_s
        return None if began_s is None or takes_s is None else began_s + takes_s - now_s

    def pays_together(self, steps: Sequence[StageStep], other: StageStep) -> bool:
        """Whether `other` should be computed in one pass with `steps`, by what passes have cost here so far.

        Never if they share a sequence: one chunk of a prompt needs the keys and values of the chunk before it.
        Nor a step that this stage only passes on, nor those that ask for the logits of too many tokens: their rows
        have to fit into memory. May be asked from any thread.
        """
        if self._only_passes(steps[0]) or self._only_passes(other):
            return False
        rows = _rows_of_chunks(other.frame.entries)
        if rows and rows + sum(_rows_of_chunks(step.frame.entries) for step in steps) > MOST_LOGIT_ROWS:
            return False
        present = {entry.sequence for step in steps for entry in step.frame.entries}
        if any(entry.sequence in present for entry in other.frame.entries):
            return False
        if other.rides_along or other.load.tokens <= _ALWAYS_TOKENS:
            return True
        if pays_together(self._curve, StepLoad.together(step.load for step in steps), other.load):
            return True
        # what is never run stays misjudged: now and then it is
        self._refusals += 1
        return other.load.tokens <= _TRY_TOKENS and self._refusals % _REFUSALS_A_TRY == 0

    def run(self, steps: Sequence[StageStep]) -> list[StageResult]:
        """Compute steps in one pass. What a peer got wrong empties its step; other errors are for the caller."""
        self._pass_takes_s = self._expected_s(steps)
        began_s = self._pass_began_s = time.monotonic()
        try:
            return self._run(steps)
        finally:
            self._pass_began_s = None
            self.longest_pass_s = max(self.longest_pass_s, time.monotonic() - began_s)

    def _expected_s(self, steps: Sequence[StageStep]) -> float | None:
        if self._curve is None:
            return None
        load = StepLoad.together(step.load for step in steps)
        return self._curve.compute_s(load.tokens, load.sequences, load.context_tokens)

    def _run(self, steps: Sequence[StageStep]) -> list[StageResult]:
        closed = [self._lives.close(step.extra.closes) for step in steps]
        if self._journal is not None:
            for names in closed:
                self._journal.forget(map(sequence_number, names))
        if self._only_passes(steps[0]):
            return [self._pass_on(steps[0], closed[0])]
        try:
            return self._forward(steps, closed)
        except ProtocolError as error:
            if len(steps) == 1:
                return [self._run_emptied(steps[0], closed[0], str(error))]
            return [self._run_alone(step, ended) for step, ended in zip(steps, closed, strict=True)]

    def _run_alone(self, step: StageStep, closed: tuple[str, ...]) -> StageResult:
        try:
            return self._forward([step], [closed])[0]
        except ProtocolError as error:
            return self._run_emptied(step, closed, str(error))

    def _run_emptied(self, step: StageStep, closed: tuple[str, ...], problem: str) -> StageResult:
        result = self._forward([emptied(step)], [closed])[0]
        return replace(result, refused=step.frame.entries, problem=problem)

    def _only_passes(self, step: StageStep) -> bool:
        """Whether another stage computes the step, and this one has its tokens in its KV blocks."""
        return step.extra.rebuild is not None and step.extra.rebuild != self._index

    def _pass_on(self, step: StageStep, closed: tuple[str, ...]) -> StageResult:
        """Forget what the step closes; before the stage that is rebuilt, attach what was sent to it at the time."""
        began_ns, started_ns = time.perf_counter_ns(), time.time_ns()
        rows = NOTHING
        problem = ""
        if self._index + 1 == step.extra.rebuild:
            found = {entry.sequence: self._replayed(entry) for entry in step.frame.entries}
            lacking = [entry for entry in step.frame.entries if found[entry.sequence] is None]
            if lacking:
                step = refusing(step, lacking)
                problem = f"the journal does not hold what is to be sent again of {len(lacking)} sequences"
            rows = memoryview(b"".join(part for part in found.values() if part is not None))
        if closed:
            if self._sampler is not None:
                step_sampling.prepare(self._sampler, (), [closed])
            is_head = step.token_ids is not None
            closes = [sequence_number(name) for name in closed]
            self.engine.run((), closes, token_ids=() if is_head else None, hidden=None if is_head else NOTHING)
        timing = self._timing((), step, began_ns)
        if self._sampler is None:
            payload, codec = self._encode(step.frame, rows or None, timing)
            return _result(step, payload, None, started_ns, problem=problem, codec=codec)
        tokens = step_sampling.sampled(self._sampler, step, None, timing)
        return _result(step, messages.encode(tokens), tokens, started_ns, problem=problem)

    def _replayed(self, entry: Entry) -> bytes | None:
        return None if self._journal is None else self._journal.replay(entry.sequence, entry.start, entry.count)

    def _forward(self, steps: Sequence[StageStep], closed: Sequence[tuple[str, ...]]) -> list[StageResult]:
        began_ns, started_ns = time.perf_counter_ns(), time.time_ns()
        entries = tuple(entry for step in steps for entry in step.frame.entries)
        if self._sampler is not None:
            step_sampling.prepare(self._sampler, steps, closed)
        token_ids, hidden = self._inputs(steps)
        closes = [sequence_number(name) for names in closed for name in names]
        output = self.engine.run(entries, closes, token_ids=token_ids, hidden=hidden)
        for step in steps:
            self._lives.open(step.frame.entries, step.frame.step)
        token_bytes = self.engine.hidden_size * steps[0].frame.dtype.size_bytes
        results: list[StageResult] = []
        token_at = row_at = 0
        for step in steps:
            frame = step.frame
            timing = self._timing(steps, step, began_ns)
            if self._sampler is None:
                raw = NOTHING if output.hidden is None else output.hidden
                own = raw[token_at * token_bytes : (token_at + frame.num_tokens) * token_bytes]
                self._record(frame, own, token_bytes)
                payload, codec = self._encode(frame, own if step.extra.rebuild is None else None, timing)
                results.append(_result(step, payload, None, started_ns, codec=codec))
            else:
                rows = sum(len(entry.places_with_logits) for entry in frame.entries)
                logits_RV = None if output.logits_RV is None else output.logits_RV[row_at : row_at + rows]
                tokens = step_sampling.sampled(self._sampler, step, logits_RV, timing)
                row_at += rows
                results.append(_result(step, messages.encode(tokens), tokens, started_ns))
            token_at += frame.num_tokens
        self._learn(entries, began_ns)
        return results

    def _inputs(self, steps: Sequence[StageStep]) -> tuple[tuple[int, ...] | None, memoryview | None]:
        """Token ids at the head, hidden states elsewhere. Absent ones are refused."""
        if steps[0].token_ids is not None:
            return tuple(token for step in steps for token in step.token_ids or ()), None
        parts = [
            decode_hidden(
                step.frame.hidden,
                num_tokens=step.frame.num_tokens,
                hidden_size=step.frame.hidden_size,
                dtype=step.frame.dtype,
                codec=step.frame.codec,
            )
            for step in steps
        ]
        return None, parts[0] if len(parts) == 1 else memoryview(b"".join(parts))

    def _encode(self, frame: StepFrame, raw: memoryview | None, timing: StageTiming) -> tuple[bytes | bytearray, Codec]:
        """The frame for the next stage. None: the step goes on without hidden states."""
        timings = (*frame.timings, timing)
        if raw is None:
            codec = Codec.ABSENT if frame.entries else Codec.RAW
            return encode_frame(replace(frame, hidden=NOTHING, codec=codec, timings=timings)), codec
        codec = self.codecs.next(raw.nbytes)
        began_s = time.perf_counter()
        hidden = encode_hidden(raw, hidden_size=frame.hidden_size, dtype=frame.dtype, codec=codec)
        if raw.nbytes:
            self.codecs.on_encoded(raw.nbytes, hidden.nbytes, time.perf_counter() - began_s)
        return encode_frame(replace(frame, hidden=hidden, codec=codec, timings=timings)), codec

    def _record(self, frame: StepFrame, raw: memoryview, token_bytes: int) -> None:
        """Keep what the next stage gets, as it is before it is encoded: encoding it again gives the same."""
        if self._journal is None:
            return
        at = 0
        for entry in frame.entries:
            end = at + entry.count * token_bytes
            self._journal.record(entry, raw[at:end])
            at = end

    def _timing(self, steps: Sequence[StageStep], step: StageStep, began_ns: int) -> StageTiming:
        load = StepLoad.of(())
        if steps and step is steps[0]:  # the first speaks for the whole pass
            load = sum((one.load for one in steps), start=load)
        return StageTiming(
            compute_us=(time.perf_counter_ns() - began_ns) // 1000,
            waited_us=max(began_ns - step.ready_ns, 0) // 1000,
            tokens=load.tokens,
            prompt_tokens=load.prompt_tokens,
            sequences=load.sequences,
            context_tokens=load.context_tokens,
        )

    def _learn(self, entries: tuple[Entry, ...], began_ns: int) -> None:
        load = StepLoad.of(entries)
        self._cost.on_step(
            tokens=load.tokens,
            sequences=load.sequences,
            context_tokens=load.context_tokens,
            compute_s=(time.perf_counter_ns() - began_ns) / 1e9,
        )
        self._passes += 1
        if self._passes % _PASSES_A_CURVE == 0:
            self._curve = self._cost.curve()


def _result(
    step: StageStep,
    payload: bytes | bytearray,
    tokens: StepTokens | None,
    started_ns: int,
    *,
    problem: str = "",
    codec: Codec = Codec.ABSENT,
) -> StageResult:
    return StageResult(
        payload=payload,
        step=step.frame.step,
        traffic=step.frame.traffic,
        num_tokens=step.frame.num_tokens,
        tokens=tokens,
        traces=tuple(step.extra.traces.values()),
        started_ns=started_ns,
        ended_ns=time.time_ns(),
        problem=problem,
        codec=codec,
    )


def _rows_of_chunks(entries: tuple[Entry, ...]) -> int:
    """Of the entries that ask for the logits of more than their last token."""
    return sum(entry.count for entry in entries if entry.logits in (Logits.ALL, Logits.DRAFTS))
