"""A much faster layer map replaces the one that serves: when, and in which order."""

from __future__ import annotations

import pytest

from molink_common.messages import Heartbeat
from molink_scheduler import regrouping
from molink_scheduler.books import SequencePhase
from molink_scheduler.events import EpochTaken, GatewayAliveArrived
from molink_scheduler.instructions import AskSequencesOf, AssignStageTo, Instruction, PreloadStagesAt, TakeEpoch
from tests.scheduler_builders import MIB, S1, Driver, beats_of, make_heartbeat, running_driver

SLOW, FAST = 1e6, 1e8


def measured(beat: Heartbeat, parameters_per_s: float) -> Heartbeat:
    return beat.model_copy(update={"parameters_per_s": parameters_per_s})


W1, W2 = (measured(beat, SLOW) for beat in beats_of(1, "w1", "w2"))
NEW = measured(make_heartbeat("w3", memory_bytes=100 * MIB), FAST)


@pytest.fixture
def serving() -> Driver:
    """Two slow workers serve a sequence; a fast one has joined."""
    driver = running_driver()
    driver.beat(W1, W2, NEW)
    return driver


def serve(driver: Driver, seconds: float, *beats: Heartbeat) -> list[Instruction]:
    """Let time pass while its gateway waits for the sequence."""
    done: list[Instruction] = []
    for _ in range(round(seconds)):
        driver.do(GatewayAliveArrived("g1"))
        done += driver.wait(1, beats=beats)
    return [one for one in done if not isinstance(one, AskSequencesOf)]


def assignments(done: list[Instruction]) -> list[AssignStageTo]:
    return [one for one in done if isinstance(one, AssignStageTo)]


def preloads(driver: Driver) -> dict[str, tuple[tuple[int, int], ...]]:
    return {one.worker: one.stages.layers for one in driver.all if isinstance(one, PreloadStagesAt)}


def test_a_faster_layer_map_is_preloaded_and_then_taken(serving: Driver) -> None:
    assert serve(serving, regrouping.STEADY_S - 2, W1, W2, NEW) == []
    assert serving.machine.books.pipelines[1].better is None
    assert serve(serving, 3 + regrouping.LOOK_EVERY_S, W1, W2, NEW) == [], "not before it is loaded"
    better = serving.machine.books.pipelines[1].better
    assert better is not None
    layers = {stage.worker: (stage.first_layer, stage.last_layer) for stage in better.stages}
    first, last = layers["w3"]
    assert last - first == 3
    (slow,) = layers.keys() - {"w3"}
    assert preloads(serving) == {"w3": (layers["w3"],), slow: (layers[slow],)}
    beats = {beat.worker: beat for beat in (W1, W2, NEW)}
    beats["w3"] = beats["w3"].model_copy(update={"preloaded": (layers["w3"],)})
    assert serving.beat(*beats.values()) == [], "one of them is there"
    beats[slow] = beats[slow].model_copy(update={"preloaded": (layers[slow],)})
    assert TakeEpoch(1) in serving.beat(*beats.values())
    done = serving.do(EpochTaken(2))
    assigned = {one.worker: (one.stage.first_layer, one.stage.last_layer) for one in assignments(done)}
    assert assigned == layers
    assert serving.machine.books.sequences[S1].phase is SequencePhase.WAITING


def test_a_small_gain_is_not_worth_it(serving: Driver) -> None:
    alike = measured(make_heartbeat("w3"), SLOW * 1.1)
    assert serve(serving, 120, W1, W2, alike) == []
    assert serving.machine.books.pipelines[1].better is None


def test_what_is_never_loaded_is_given_up_and_not_looked_for_again(serving: Driver) -> None:
    most_s = regrouping.STEADY_S + regrouping.LOADED_WITHIN_S + 2 * regrouping.LOOK_EVERY_S
    serve(serving, most_s, W1, W2, NEW)
    pipeline = serving.machine.books.pipelines[1]
    assert (pipeline.better, pipeline.regroupings) == (None, 1)
    serve(serving, 600, W1, W2, NEW)
    assert pipeline.better is None


def test_who_was_to_be_in_it_and_is_gone_ends_it(serving: Driver) -> None:
    serve(serving, regrouping.STEADY_S + regrouping.LOOK_EVERY_S + 1, W1, W2, NEW)
    pipeline = serving.machine.books.pipelines[1]
    assert pipeline.better is not None
    serve(serving, 5, W1, W2)
    assert pipeline.better is None
    assert pipeline.is_ready
