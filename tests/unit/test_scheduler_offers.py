"""What heartbeats say of speeds and links, as placement gets it."""

from __future__ import annotations

from molink_common.messages import Dtype, Heartbeat, LinkReport, StagePhase
from molink_scheduler.books import Worker
from molink_scheduler.fitness import offers_of
from molink_scheduler.placement import Link
from tests.scheduler_builders import make_heartbeat, make_stage


def beat(worker: str, **changes: object) -> Heartbeat:
    return make_heartbeat(worker).model_copy(update=changes)


def workers(*beats: Heartbeat) -> list[Worker]:
    return [Worker(heartbeat=one, heard_s=0.0, progress_s=0.0) for one in beats]


def test_devices_of_one_name_that_were_measured_at_different_moments_are_equally_fast() -> None:
    offers = offers_of(
        workers(
            beat("a", parameters_per_s=6e9),
            beat("b", parameters_per_s=9e9),
            beat("c", parameters_per_s=8e9),
            beat("one_thread", parameters_per_s=3e9),
            beat("gpu", parameters_per_s=7e9, device="cuda:0", device_name="other"),
            beat("new"),
        )
    )
    assert [offer.parameters_per_s for offer in offers] == [8e9, 8e9, 8e9, 3e9, 7e9, None]
    assert {offer.measured_in for offer in offers} == {Dtype.FLOAT32}


def test_a_link_is_known_by_its_two_stages() -> None:
    head = make_stage(3, 0, (0, 2)).model_copy(update={"link": LinkReport(round_trip_s=0.03, rate_bytes_per_s=1e3)})
    tail = make_stage(3, 1, (2, 4))
    of_another_epoch = make_stage(2, 1, (2, 4), StagePhase.LOADING)
    offers = offers_of(workers(beat("x", stage=of_another_epoch), beat("a", stage=head), beat("b", stage=tail)))
    assert [offer.links for offer in offers] == [(), (Link(peer="b", round_trip_s=0.03),), ()]
    assert offers_of(workers(beat("a", stage=head)))[0].links == ()
