"""How a pipeline is formed: over whom, when, and over whom not."""

from __future__ import annotations

import pytest

from molink_common.messages import (
    StagePhase,
)
from molink_scheduler.events import (
    AssignAnswered,
    EpochTaken,
)
from molink_scheduler.instructions import (
    AssignStageTo,
    BroadcastState,
    SavePipeline,
    TakeEpoch,
)
from tests.scheduler_builders import (
    HALVES,
    MIB,
    Driver,
    assign,
    beats_of,
    layout_of,
    make_card,
    make_heartbeat,
    make_settings,
    make_stage,
    ready_driver,
    running_driver,
)


@pytest.fixture
def ready() -> Driver:
    return ready_driver()


@pytest.fixture
def running() -> Driver:
    return running_driver()


@pytest.mark.parametrize(
    ("settings", "sites", "codec"),
    [
        ({}, ("a", "a"), "auto"),
        ({}, ("a", "b"), "auto"),
        ({"scheduling": "published"}, ("a", "b"), "raw"),
        ({"scheduling": "plain", "link_codec": "lossless"}, ("a", "b"), "lossless"),
        ({"link_codec": "int8"}, ("a", "b"), "int8"),
        ({"link_codec": "int8"}, ("a", "a"), "raw"),
    ],
)
def test_a_codec_by_name_is_for_links_between_sites(
    settings: dict[str, object], sites: tuple[str, str], codec: str
) -> None:
    driver = Driver(make_settings(**settings))
    for worker, site in zip(("w1", "w2"), sites, strict=True):
        driver.beat(make_heartbeat(worker, site=site))
    told = [one.stage for one in driver.do(EpochTaken(1)) if isinstance(one, AssignStageTo)]
    assert [one.codec for one in told if one.index == 0] == [codec]


def test_the_whole_way_from_heartbeats_to_a_ready_pipeline() -> None:
    driver = Driver()
    assert driver.beat(make_heartbeat("w1")) == []
    assert driver.beat(make_heartbeat("w2")) == [TakeEpoch(0)]
    num_blocks = driver.machine.books.settings.kv_tokens // 16
    two = (10 * MIB - 2800 * 4) // (16 * 2 * 16 * 4)
    assert two < num_blocks
    layout = layout_of(1, "w1", "w2").model_copy(update={"num_blocks": two})
    assert driver.do(EpochTaken(1)) == [SavePipeline(layout), assign(1, "w1", 0, two), assign(1, "w2", 1, two)]
    loading = [
        make_heartbeat(w, stage=make_stage(1, k, HALVES[k], StagePhase.LOADING)) for k, w in enumerate(("w1", "w2"))
    ]
    assert driver.beat(*loading) == []
    first, second = beats_of(1, "w1", "w2")
    assert driver.beat(first) == []
    assert not driver.machine.state(now_s=driver.now_s).ready
    assert driver.beat(second) == []
    assert driver.machine.state(now_s=driver.now_s).ready
    assert isinstance(driver.all[-1], BroadcastState)


def test_auto_waits_until_the_set_is_stable() -> None:
    driver = Driver(make_settings(stages="auto", settle_s=1.0))
    one, two = make_heartbeat("w1"), make_heartbeat("w2")
    driver.beat(one)
    assert driver.wait(0.9, beats=(one,)) == []
    driver.beat(two)
    assert driver.wait(0.9, beats=(one, two)) == []
    assert driver.wait(0.2, beats=(one, two)) == [TakeEpoch(0)]


def test_a_fixed_number_waits_for_ever_for_the_first_pipeline() -> None:
    driver = Driver(make_settings(stages=2))
    assert driver.wait(100, beats=(make_heartbeat("w1"),)) == []
    assert "waiting for 2 workers" in driver.machine.state(now_s=driver.now_s).reason


def test_who_is_not_fit_is_not_used_and_told_why() -> None:
    driver = Driver(make_settings(stages="auto"))
    driver.beat(
        make_heartbeat("ok1"),
        make_heartbeat("ok2"),
        make_heartbeat("other", card=make_card(fingerprint="0" * 16)),
        make_heartbeat("busy", preparing="downloading 40 %"),
        make_heartbeat("broken", problem="its disk is full"),
        make_heartbeat("going", leaving=True),
        make_heartbeat("small", memory_bytes=10),
    )
    assert driver.wait(1.5) == [TakeEpoch(0)]
    done = driver.do(EpochTaken(1))
    assert [one.worker for one in done if isinstance(one, AssignStageTo)] == ["ok1", "ok2"]
    roles = {one.worker: (one.role, one.reason) for one in driver.machine.state(now_s=driver.now_s).workers}
    assert roles["ok1"] == ("stage 0 of pipeline 1", "layers 0 to 1 of 4; told to load, no answer yet")
    assert roles["other"][0] == "unfit" and "other weights" in roles["other"][1]
    assert roles["busy"] == ("preparing", "downloading 40 %")
    assert roles["broken"] == ("unfit", "its disk is full")
    assert roles["going"] == ("unfit", "it is leaving")
    assert roles["small"][0] == "standby" and "do not hold one layer" in roles["small"][1]


def test_a_pool_without_room_says_how_much_is_missing_and_tries_again_when_it_grows() -> None:
    driver = Driver(make_settings(stages="auto"))
    first, second = (make_heartbeat(name, memory_bytes=100_000) for name in ("w1", "w2"))
    assert driver.wait(2, beats=(first,)) == []
    assert "missing" in driver.machine.state(now_s=driver.now_s).reason
    assert driver.wait(1.5, beats=(first, second)) == [TakeEpoch(0)]


def test_a_worker_that_refuses_or_fails_is_left_out_for_a_while() -> None:
    driver = Driver(make_settings(stages="auto"))
    driver.beat(make_heartbeat("w1"), make_heartbeat("w2"))
    driver.wait(1.5)
    driver.do(EpochTaken(1))
    failed = make_heartbeat("w2", stage=make_stage(1, 1, HALVES[1], StagePhase.FAILED))
    assert driver.beat(failed) == []
    assert driver.wait(2, beats=(make_heartbeat("w1"), failed)) == [TakeEpoch(1)]
    done = driver.do(EpochTaken(2))
    assert [one.worker for one in done if isinstance(one, AssignStageTo)] == ["w1"]
    state = driver.machine.state(now_s=driver.now_s)
    assert "no memory" in next(one.reason for one in state.workers if one.worker == "w2")
    assert driver.do(AssignAnswered("w1", 2, "busy")) == []
    assert not driver.machine.state(now_s=driver.now_s).pipelines


def test_an_epoch_that_nobody_wants_any_more_changes_nothing(ready: Driver) -> None:
    assert ready.do(EpochTaken(9)) == []
    assert ready.machine.books.highest_epoch == 9


def test_an_epoch_older_than_what_a_worker_has_is_drawn_again() -> None:
    driver = Driver()
    driver.beat(make_heartbeat("w1"), make_heartbeat("w2"))
    driver.beat(make_heartbeat("w1", stage=make_stage(7, 0, HALVES[0])))
    assert driver.do(EpochTaken(1)) == [TakeEpoch(7)]
    assert [type(one) for one in driver.do(EpochTaken(8))] == [SavePipeline, AssignStageTo, AssignStageTo]


def test_standbys_are_left_over_where_the_model_fits_without_them() -> None:
    beats = tuple(make_heartbeat(name) for name in ("w1", "w2", "w3"))
    driver = Driver(make_settings(stages="auto", standbys=1))
    driver.wait(1.5, beats=beats)
    done = driver.do(EpochTaken(1))
    assert len([one for one in done if isinstance(one, AssignStageTo)]) == 2
    driver = Driver(make_settings(stages=3, standbys=1))
    driver.beat(*beats)
    done = driver.do(EpochTaken(1))
    assert len([one for one in done if isinstance(one, AssignStageTo)]) == 3, "stages that are asked for come first"
