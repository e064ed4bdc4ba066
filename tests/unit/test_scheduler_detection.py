"""How losses are noticed: closed connections, silence, deafness, hung devices."""

from __future__ import annotations

from molink_common.messages import LinkReport
from molink_scheduler.events import EpochTaken, Tick, WorkerDisconnected, WorkerProbed
from molink_scheduler.instructions import AssignStageTo, NoteLoss, ProbeWorker, TakeEpoch
from tests.scheduler_builders import HALVES, Driver, beats_of, make_heartbeat, make_stage, running_driver

W1, W2 = beats_of(1, "w1", "w2")
W3 = make_heartbeat("w3")


def noted(driver: Driver) -> list[NoteLoss]:
    return [one for one in driver.all if isinstance(one, NoteLoss)]


def probes(driver: Driver) -> list[str]:
    return [one.worker for one in driver.all if isinstance(one, ProbeWorker)]


def test_a_closed_connection_is_asked_about_and_nobody_there_is_a_loss_at_once() -> None:
    driver = running_driver("w3")
    assert driver.do(WorkerDisconnected("w2"), after_s=0.1) == []
    assert probes(driver) == ["w2"]
    assert driver.do(WorkerProbed("w2", False), after_s=0.005) == [TakeEpoch(1)]
    (loss,) = noted(driver)
    assert (loss.worker, loss.reason) == ("w2", "its process or its connection has ended")
    assert round(loss.silent_s, 3) == 0.105


def test_a_worker_that_has_another_connection_or_has_spoken_since_is_not_lost() -> None:
    driver = running_driver("w3")
    driver.do(WorkerDisconnected("w2"), after_s=0.1)
    assert driver.do(WorkerProbed("w2", True)) == []
    driver.do(WorkerDisconnected("w2"))
    driver.now_s += 0.01
    driver.beat(W2)
    assert driver.do(WorkerProbed("w2", False)) == []
    assert noted(driver) == []


def test_strangers_are_not_asked_about() -> None:
    driver = running_driver()
    driver.do(WorkerDisconnected("gateway-1"))
    driver.do(WorkerProbed("gateway-1", False))
    assert (probes(driver), noted(driver)) == ([], [])


def test_an_overdue_heartbeat_leads_to_a_question_and_silence_to_a_loss() -> None:
    driver = running_driver("w3")
    assert driver.wait(0.75, beats=(W1, W3), tick_s=0.25) == []
    assert probes(driver) == []
    assert driver.wait(0.75, beats=(W1, W3), tick_s=0.25) == []
    assert probes(driver) == ["w2", "w2"]
    assert driver.wait(0.25, beats=(W1, W3), tick_s=0.25) == [TakeEpoch(1)]
    assert [(one.worker, one.reason) for one in noted(driver)] == [("w2", "silent for 1.8 s")]


def test_silence_does_not_count_while_nobody_listened() -> None:
    driver = running_driver("w3")
    driver.do(Tick())
    assert driver.do(Tick(), after_s=5) == []  # this scheduler stood still
    assert driver.wait(1.5, beats=(W1, W3), tick_s=0.25) == []
    assert driver.wait(0.25, beats=(W1, W3), tick_s=0.25) == [TakeEpoch(1)]


def test_right_after_an_outage_a_worker_may_only_not_be_back_yet() -> None:
    driver = running_driver("w3")
    driver.do(Tick(bus_up=False), after_s=0.25)
    driver.do(WorkerDisconnected("w2"), after_s=0.3)
    assert driver.do(WorkerProbed("w2", False)) == []
    driver.wait(1.0, beats=(W1, W3), tick_s=0.25)
    assert driver.do(WorkerProbed("w2", False)) == [TakeEpoch(1)]


def test_a_pass_far_longer_than_any_before_is_a_hung_device() -> None:
    driver = running_driver("w3")

    def computing(age_s: float, longest_s: float) -> list[object]:
        stage = make_stage(1, 1, HALVES[1], pass_age_s=age_s, longest_pass_s=longest_s)
        return [*driver.beat(W2.model_copy(update={"stage": stage}))]

    assert computing(9.9, 0.1) == []
    assert computing(29, 6) == []
    assert computing(10.1, 0.1) == [TakeEpoch(1)]
    assert "its device hangs" in noted(driver)[0].reason


def test_a_stage_that_its_neighbour_s_frames_do_not_reach_is_lost_though_both_live() -> None:
    driver = running_driver("w3")
    head = make_stage(1, 0, HALVES[0], oldest_step_age_s=11)
    cut = make_heartbeat("w1", stage=head.model_copy(update={"link": LinkReport(unacknowledged_s=11)}))
    slow = make_heartbeat("w1", stage=head.model_copy(update={"link": LinkReport(unacknowledged_s=0.2)}))
    driver.wait(11, beats=(slow, W2, W3))
    assert noted(driver) == [], "steps take long, but they arrive"
    assert TakeEpoch(1) in driver.wait(1, beats=(cut, W2, W3))
    (loss,) = noted(driver)
    assert (loss.worker, loss.reason) == ("w2", "frames of worker w1 have not reached it for 11 s")
    done = driver.do(EpochTaken(2))
    assert [one.worker for one in done if isinstance(one, AssignStageTo)] == ["w1", "w3"]
