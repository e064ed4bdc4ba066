"""What the planner learns of a stage's times."""

from __future__ import annotations

import random

import pytest

from molink_stage_worker.planning.stage_cost import StageEstimator, never_falling
from tests.planning_machines import Cost, affine, roofline, stairs

SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]


def learn(estimator: StageEstimator, cost: Cost, sizes: list[int], *, rounds: int, noise: float = 0.15) -> None:
    dice = random.Random(3)
    for _ in range(rounds):
        for tokens in sizes:
            compute_s = cost(tokens) * max(dice.gauss(1.0, noise), 0.3)
            estimator.on_step(tokens=tokens, sequences=tokens, context_tokens=50 * tokens, compute_s=compute_s)


def cost_s(estimator: StageEstimator, tokens: int) -> float:
    curve = estimator.curve()
    assert curve is not None
    return curve.compute_s(tokens, tokens, 50 * tokens)


@pytest.mark.parametrize("cost", [affine(), roofline(), stairs()])
def test_the_curve_is_met_where_it_was_measured(cost: Cost) -> None:
    estimator = StageEstimator()
    learn(estimator, cost, SIZES, rounds=60)
    for tokens in SIZES:
        assert cost_s(estimator, tokens) == pytest.approx(cost(tokens), rel=0.12)


def test_a_bend_between_two_sizes_is_not_smoothed_away() -> None:
    estimator = StageEstimator()
    learn(estimator, roofline(), [1, 4, 16, 64, 256], rounds=60)
    assert cost_s(estimator, 20) == pytest.approx(roofline()(20), rel=0.25)


def test_nothing_is_known_before_some_steps() -> None:
    estimator = StageEstimator()
    learn(estimator, affine(), [4], rounds=4)
    assert estimator.curve() is None
    assert estimator.report() is None


def test_a_slow_first_step_is_no_rule() -> None:
    estimator = StageEstimator()
    estimator.on_step(tokens=4, sequences=4, context_tokens=200, compute_s=30.0)
    learn(estimator, affine(), [4], rounds=10)
    assert cost_s(estimator, 4) == pytest.approx(affine()(4), rel=0.2)


def test_an_outlier_of_seconds_moves_next_to_nothing() -> None:
    estimator = StageEstimator()
    learn(estimator, affine(), SIZES, rounds=30)
    before = [cost_s(estimator, tokens) for tokens in SIZES]
    estimator.on_step(tokens=8, sequences=8, context_tokens=400, compute_s=20.0)
    assert [cost_s(estimator, tokens) for tokens in SIZES] == pytest.approx(before, rel=0.06)


def test_a_stage_that_slows_down_does_so_for_sizes_it_does_not_run_too() -> None:
    estimator = StageEstimator()
    learn(estimator, affine(), SIZES, rounds=40)
    slower = affine(0.016, 0.0032)
    learn(estimator, slower, [8], rounds=150)
    assert cost_s(estimator, 8) == pytest.approx(slower(8), rel=0.12)
    assert cost_s(estimator, 64) == pytest.approx(slower(64), rel=0.3)


def test_context_costs() -> None:
    estimator = StageEstimator()
    dice = random.Random(5)
    for _ in range(600):
        context_tokens = dice.randrange(100, 20_000)
        compute_s = (0.01 + 1e-6 * context_tokens) * dice.gauss(1.0, 0.1)
        estimator.on_step(tokens=8, sequences=8, context_tokens=context_tokens, compute_s=compute_s)
    curve = estimator.curve()
    assert curve is not None
    assert curve.compute_s(8, 8, 18_000) - curve.compute_s(8, 8, 1_000) == pytest.approx(0.017, rel=0.25)


def test_violators_are_pooled() -> None:
    assert never_falling([1.0, 3.0, 2.0, 4.0], [1.0, 1.0, 1.0, 1.0]) == [1.0, 2.5, 2.5, 4.0]
    assert never_falling([3.0, 1.0], [3.0, 1.0]) == [2.5, 2.5]


def test_sizes_that_are_not_run_keep_their_costs() -> None:
    """Minutes of steps of one size, at a speed that only scatters."""
    estimator = StageEstimator()
    learn(estimator, affine(), SIZES, rounds=20)
    learn(estimator, affine(), [16], rounds=4000)
    for tokens in (4, 64):
        assert cost_s(estimator, tokens) == pytest.approx(affine()(tokens), rel=0.1)


def test_the_first_quick_step_of_a_new_size_is_believed() -> None:
    estimator = StageEstimator()
    for _ in range(5):
        estimator.on_step(tokens=1, sequences=1, context_tokens=40, compute_s=0.0186)
    before = estimator.curve()
    estimator.on_step(tokens=16, sequences=1, context_tokens=16, compute_s=0.0186)
    after = estimator.curve()
    assert before is not None
    assert after is not None
    assert before.compute_s(16, 1, 16) > 0.1, "half of a step of one token is believed to grow with the tokens"
    assert after.compute_s(16, 1, 16) == pytest.approx(0.0186, rel=0.05)
