"""The timed stage: right sizes, right times, the same letters wherever it is rebuilt."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bench.cost_curve import CostCurve
from bench.timed_stage import FIRST_LETTER, HIDDEN_SIZE, NUM_LAYERS, NUM_LETTERS, TimedEngine, letters
from bench.timed_worker_flags import curve_flags, parse_curve
from molink_common.errors import ProtocolError
from molink_common.identity import sequence_id
from molink_common.messages import Dtype
from molink_common.sampling import SamplingOptions
from molink_common.wire import Entry, Logits, Opening
from molink_stage_worker.engine.interface import StageSpec
from molink_stage_worker.sampling import Sampler

NO_TIME = CostCurve(layer_read_s=0.0, layer_token_s=0.0, layer_context_s=0.0, overhead_s=0.0)
ROW_BYTES = HIDDEN_SIZE * 2


def engine(first: int, last: int, curve: CostCurve = NO_TIME) -> TimedEngine:
    spec = StageSpec(
        checkpoint=Path("/nowhere"),
        first_layer=first,
        last_layer=last,
        num_layers=NUM_LAYERS,
        dtype=Dtype.BFLOAT16,
        device="cpu",
        num_blocks=1,
        block_size=16,
    )
    return TimedEngine(spec, curve)


def entry(sequence: int, start: int, count: int, logits: Logits = Logits.LAST) -> Entry:
    return Entry(sequence=sequence, start=start, count=count, logits=logits)


def test_hidden_states_have_the_size_of_the_tokens_also_when_there_are_many() -> None:
    head = engine(0, 40)
    for count in (0, 1, 512, 1500):
        output = head.run([entry(1, 0, count)] if count else [], [], token_ids=[5] * count)
        assert output.hidden is not None
        assert (output.hidden.nbytes, output.hidden.format, output.hidden.ndim) == (count * ROW_BYTES, "B", 1)


def test_what_is_not_of_the_announced_size_is_refused() -> None:
    middle = engine(40, 60)
    with pytest.raises(ProtocolError, match="announced"):
        middle.run([entry(1, 0, 2)], [], hidden=memoryview(bytes(ROW_BYTES)))
    nothing = middle.run([], []).hidden
    assert nothing is not None
    assert nothing.nbytes == 0


def test_a_step_takes_what_the_curve_says() -> None:
    curve = CostCurve(layer_read_s=0.5e-3, layer_token_s=1e-6, layer_context_s=0.0, overhead_s=5e-3)
    head = engine(0, 40, curve)
    started_s = time.perf_counter()
    head.run([entry(1, 0, 3)], [], token_ids=[5] * 3)
    assert time.perf_counter() - started_s >= 0.025


def test_the_real_sampler_reads_letters_and_no_end() -> None:
    tail = engine(40, NUM_LAYERS)
    names = [sequence_id(number) for number in range(1, 33)]
    sampler = Sampler(eos_token_ids=(0, 2), vocabulary_size=49152)
    for name in names:
        sampler.open(Opening(sequence=name, prompt=(5,), options=SamplingOptions(max_tokens=9, temperature=0.0)))
    # the reused tensor must hold nothing of the larger step before
    for count in (32, 7, 32):
        entries = [entry(number, 0, 1) for number in range(1, count + 1)]
        logits_RV = tail.run(entries, [], hidden=memoryview(bytes(count * ROW_BYTES))).logits_RV
        assert logits_RV is not None
        events, failed = sampler.sample(logits_RV, names[:count])
        assert failed == []
        assert [event.token for event in events] == letters(entries)
        assert all(FIRST_LETTER <= event.token < FIRST_LETTER + NUM_LETTERS for event in events)
        assert all(event.finish is None for event in events)


def test_a_position_has_the_same_letter_in_a_chunk_and_alone() -> None:
    assert letters([entry(9, 4, 3, Logits.ALL)]) == [
        token for start in (4, 5, 6) for token in letters([entry(9, start, 1)])
    ]
    assert letters([entry(9, 4, 3, Logits.NONE)]) == []
    assert len(set(letters([entry(9, 0, NUM_LETTERS, Logits.ALL)]))) == NUM_LETTERS


def test_flags_of_the_curve_are_told_from_the_workers() -> None:
    curve, rest = parse_curve(["--nats-url", "nats://x:1", "--layer-token-us", "20", "--overhead-us=500"])
    assert rest == ["--nats-url", "nats://x:1"]
    assert curve == CostCurve(layer_token_s=20e-6, overhead_s=500e-6)
    assert parse_curve(curve_flags(curve))[0].step_s(layers=40, tokens=9, context_tokens=9) == pytest.approx(
        curve.step_s(layers=40, tokens=9, context_tokens=9)
    )
