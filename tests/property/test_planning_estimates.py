"""Whatever is observed, estimates stay sane and plans legal."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from molink_common.messages import PipelinePolicy, Scheduling
from molink_common.wire import MAX_STEP_TOKENS, Traffic
from molink_stage_worker.planning import Demand, Planner, StepObservation
from molink_stage_worker.planning.chunks import MOST_CHUNKS_UNDER_WAY
from molink_stage_worker.planning.stage_cost import StageEstimator, never_falling

NUM_STAGES = 2
STEP_TOKENS = 256
seconds = st.one_of(st.just(0.0), st.floats(1e-9, 1.0), st.floats(1.0, 1e6))
sizes = st.one_of(st.integers(1, 64), st.integers(1, MAX_STEP_TOKENS))


@st.composite
def steps(draw: st.DrawFn) -> StepObservation:
    tokens = draw(sizes)
    decode_tokens = draw(st.integers(0, tokens))
    return StepObservation(
        traffic=draw(st.sampled_from(Traffic)),
        tokens=tokens,
        sequences=draw(st.integers(1, tokens)),
        context_tokens=draw(st.integers(tokens, 10**8)),
        decode_tokens=decode_tokens,
        payload_bytes=draw(st.integers(0, 10**10)),
        compute_s=draw(st.tuples(seconds, seconds)),
        waited_s=draw(st.tuples(seconds, seconds)),
        ring_s=draw(seconds),
    )


demands = st.builds(
    Demand,
    decoding=st.one_of(st.integers(0, 64), st.integers(0, 10**5)),
    context_tokens=st.integers(0, 10**6),
    prompt_tokens_waiting=st.integers(0, 10**8),
)
links = st.tuples(st.one_of(st.none(), st.floats(0.0, 1e12)), st.one_of(st.none(), st.floats(0.0, 100.0)))


@settings(max_examples=100, deadline=None)
@given(
    events=st.lists(st.tuples(st.floats(0.0, 10.0), st.one_of(steps(), demands, links)), max_size=60),
    scheduling=st.sampled_from(Scheduling),
    micro_batches=st.one_of(st.none(), st.integers(1, 256)),
    latency_target_s=st.one_of(st.none(), st.floats(1e-3, 10.0)),
)
def test_a_plan_is_legal_whatever_was_observed(
    events: list[tuple[float, StepObservation | Demand | tuple[float | None, float | None]]],
    scheduling: Scheduling,
    micro_batches: int | None,
    latency_target_s: float | None,
) -> None:
    planner = Planner(
        num_stages=NUM_STAGES,
        token_bytes=16384,
        step_tokens=STEP_TOKENS,
        policy=PipelinePolicy(scheduling=scheduling, micro_batches=micro_batches),
        latency_target_s=latency_target_s,
    )
    now_s = 0.0
    for passed_s, event in events:
        now_s += passed_s
        match event:
            case StepObservation():
                planner.on_step(event, now_s)
            case Demand():
                plan = planner.plan(event, now_s)
                assert micro_batches is None or plan.micro_batches == micro_batches
                assert plan.micro_batches <= 256
                if scheduling is Scheduling.ADAPTIVE:
                    assert 1 <= plan.chunk_tokens <= STEP_TOKENS
                    assert NUM_STAGES <= plan.chunks_under_way <= MOST_CHUNKS_UNDER_WAY
                report = planner.report()
                assert report.cycle_s is None or report.cycle_s >= 0.0
            case (rate_bytes_per_s, round_trip_s):
                planner.on_link(rate_bytes_per_s, round_trip_s)


@settings(max_examples=100, deadline=None)
@given(
    observed=st.lists(st.tuples(sizes, st.integers(0, 10**6), seconds), min_size=5, max_size=60),
    asked=st.lists(st.tuples(sizes, st.integers(0, 10**6)), min_size=2, max_size=20),
)
def test_a_stages_cost_never_falls_with_tokens_or_context(
    observed: list[tuple[int, int, float]], asked: list[tuple[int, int]]
) -> None:
    estimator = StageEstimator()
    for tokens, context_tokens, compute_s in observed:
        estimator.on_step(tokens=tokens, sequences=tokens, context_tokens=context_tokens, compute_s=compute_s)
    curve = estimator.curve()
    assert curve is not None
    by_tokens = [curve.compute_s(tokens, 1, 100) for tokens, _ in sorted(asked)]
    by_context = [curve.compute_s(8, 1, context) for context in sorted(context for _, context in asked)]
    for costs_s in (by_tokens, by_context):
        assert costs_s[0] > 0.0
        assert all(left <= right * (1 + 1e-9) for left, right in pairwise(costs_s))


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 64),
    time_s=st.floats(1e-4, 1.0),
    outlier=st.floats(1e-3, 1e6),
    noise=st.lists(st.floats(0.85, 1.15), min_size=40, max_size=80),
)
def test_one_outlier_hardly_moves_an_estimate(size: int, time_s: float, outlier: float, noise: list[float]) -> None:
    estimator = StageEstimator()
    for factor in noise:
        estimator.on_step(tokens=size, sequences=size, context_tokens=100, compute_s=time_s * factor)
    before = estimator.curve()
    estimator.on_step(tokens=size, sequences=size, context_tokens=100, compute_s=time_s * outlier)
    after = estimator.curve()
    assert before is not None
    assert after is not None
    ratio = after.compute_s(size, size, 100) / before.compute_s(size, size, 100)
    assert 0.93 < ratio < 1.07


@given(values=st.lists(st.floats(0.0, 1e6), min_size=1, max_size=30))
def test_pooling_keeps_the_mean_and_never_falls(values: list[float]) -> None:
    pooled = never_falling(values, [1.0] * len(values))
    assert all(left <= right for left, right in pairwise(pooled))
    assert abs(sum(pooled) - sum(values)) <= 1e-6 * max(sum(values), 1.0)
