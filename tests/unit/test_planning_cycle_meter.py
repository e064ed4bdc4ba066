"""What cycles have shown corrects what is predicted of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from molink_stage_worker.planning.cycle_meter import CycleMeter

DECODING = 32
PREDICTED_S = 0.1


def predicted(micro_batches: int, decoding: int) -> float:
    return PREDICTED_S


def run(
    meter: CycleMeter,
    *,
    micro_batches: int,
    cycle_s: float,
    since_s: float,
    for_s: float,
    predict_s: Callable[[int, int], float] = predicted,
) -> float:
    """Plans four times a second, and all sequences' tokens once a cycle. The time after that."""
    due = 0.0
    for plan in range(int(4 * for_s)):
        meter.on_plan(micro_batches, DECODING, since_s + plan / 4, predict_s)
        due += DECODING * 0.25 / cycle_s
        meter.on_tokens(int(due), since_s + plan / 4)
        due -= int(due)
    return since_s + for_s


def test_a_prediction_that_holds_is_left_alone() -> None:
    meter = CycleMeter()
    assert meter.factor(4, 0.0) == 1.0
    now_s = run(meter, micro_batches=4, cycle_s=PREDICTED_S, since_s=0.0, for_s=10.0)
    assert meter.factor(4, now_s) == pytest.approx(1.0, abs=0.01)
    assert meter.factor(3, now_s) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("ratio", [0.8, 1.4])
def test_a_count_whose_cycles_are_not_what_was_predicted_is_corrected(ratio: float) -> None:
    meter = CycleMeter()
    now_s = run(meter, micro_batches=4, cycle_s=ratio * PREDICTED_S, since_s=0.0, for_s=25.0)
    assert meter.factor(4, now_s) == pytest.approx(ratio, rel=0.03)


def test_half_of_a_surprise_is_expected_of_the_other_counts_too() -> None:
    meter = CycleMeter()
    now_s = run(meter, micro_batches=4, cycle_s=1.4 * PREDICTED_S, since_s=0.0, for_s=25.0)
    assert meter.factor(3, now_s) ** 2 == pytest.approx(meter.factor(4, now_s), rel=0.02)


def test_a_count_that_disappoints_loses_to_its_equals_within_seconds() -> None:
    meter = CycleMeter()
    now_s = run(meter, micro_batches=4, cycle_s=1.4 * PREDICTED_S, since_s=0.0, for_s=4.5)
    assert meter.factor(4, now_s) > 1.06 * meter.factor(3, now_s)


def test_counts_that_are_slow_alike_end_as_equals() -> None:
    meter = CycleMeter()
    now_s = 0.0
    for micro_batches in (3, 4, 3, 4):
        now_s = run(meter, micro_batches=micro_batches, cycle_s=1.4 * PREDICTED_S, since_s=now_s, for_s=8.0)
    assert meter.factor(3, now_s) == pytest.approx(meter.factor(4, now_s), rel=0.04)


def test_a_moment_that_is_slow_for_all_hardly_speaks_against_the_count_that_ran_in_it() -> None:
    meter = CycleMeter()
    now_s = 0.0
    for micro_batches in (3, 4):
        now_s = run(meter, micro_batches=micro_batches, cycle_s=PREDICTED_S, since_s=now_s, for_s=10.0)
    now_s = run(meter, micro_batches=4, cycle_s=1.3 * PREDICTED_S, since_s=now_s, for_s=2.0)
    assert 1.0 < meter.factor(4, now_s) / meter.factor(3, now_s) < 1.05


def test_what_was_shown_is_forgotten_in_minutes() -> None:
    meter = CycleMeter()
    now_s = run(meter, micro_batches=4, cycle_s=1.4 * PREDICTED_S, since_s=0.0, for_s=20.0)
    assert meter.factor(4, now_s + 20.0) > 1.2
    assert meter.factor(4, now_s + 240.0) < 1.01


def test_another_demand_clears_everything() -> None:
    meter = CycleMeter()
    now_s = run(meter, micro_batches=4, cycle_s=1.4 * PREDICTED_S, since_s=0.0, for_s=20.0)
    meter.on_plan(4, DECODING + 4, now_s, predicted)
    assert meter.factor(4, now_s) > 1.3
    meter.on_plan(4, 2 * DECODING, now_s, predicted)
    assert meter.factor(4, now_s) == meter.factor(3, now_s) == 1.0


def test_what_the_former_count_left_under_way_is_not_counted() -> None:
    meter = CycleMeter()
    now_s = run(meter, micro_batches=4, cycle_s=PREDICTED_S, since_s=0.0, for_s=5.0)
    meter.on_plan(5, DECODING, now_s, predicted)
    meter.on_tokens(50 * DECODING, now_s)
    now_s = run(meter, micro_batches=5, cycle_s=PREDICTED_S, since_s=now_s + 0.25, for_s=5.0)
    assert meter.factor(5, now_s) == pytest.approx(1.0, abs=0.01)


def test_a_standstill_says_nothing() -> None:
    meter = CycleMeter()
    for plan in range(40):
        meter.on_plan(4, DECODING, plan / 4, predicted)
    assert meter.factor(4, 10.0) == 1.0


def test_seconds_that_were_shown_outlast_predictions_that_depend_on_the_count_that_runs() -> None:
    """Stages that share cores: with four micro-batches a cycle with one seems to take more than it does."""
    seen = {4: {1: 0.115, 4: PREDICTED_S}, 1: {1: 0.1, 4: PREDICTED_S}}
    takes_s = {1: 0.1, 4: 0.11}
    meter = CycleMeter()
    now_s = 0.0
    for micro_batches in (4, 1, 4):
        now_s = run(
            meter,
            micro_batches=micro_batches,
            cycle_s=takes_s[micro_batches],
            since_s=now_s,
            for_s=4.0,
            predict_s=lambda count, _, now=micro_batches: seen[now][count],
        )
    assert seen[4][1] * meter.factor(1, now_s) < 0.98 * seen[4][4] * meter.factor(4, now_s)


def test_what_was_shown_before_predictions_changed_much_is_forgotten() -> None:
    meter = CycleMeter()
    now_s = 0.0
    for micro_batches, predicted_s in ((3, 0.1), (4, 0.1), (5, 0.05)):
        now_s = run(
            meter,
            micro_batches=micro_batches,
            cycle_s=1.1 * predicted_s,
            since_s=now_s,
            for_s=4.0,
            predict_s=lambda count, _, now=predicted_s: now,
        )
    assert [meter.measured_at_s(count) is None for count in (3, 4, 5)] == [True, True, False]
