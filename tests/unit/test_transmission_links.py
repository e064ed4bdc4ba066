"""How the adaptive policy does on links of many kinds, in virtual time."""

from __future__ import annotations

import pytest

from molink_common.messages import Scheduling
from molink_common.wire import Traffic
from molink_stage_worker.transmission import LinkSender
from tests.transmission_simulator import LinkModel, Simulation

MBIT = 125e3


def make_simulation(
    mbit: float, round_trip_s: float, *, jitter: float = 0.0, scheduling: Scheduling = Scheduling.ADAPTIVE
) -> Simulation:
    link = LinkModel(rate_bytes_per_s=mbit * MBIT, one_way_s=round_trip_s / 2, hop_s=0.001, jitter=jitter)
    return Simulation(LinkSender(scheduling, assumed_link_bytes_per_s=12.5e6), link, keeps_deliveries=False)


def bulk_share(simulation: Simulation, seconds: float) -> float:
    """Of what the link carries, from now on."""
    before, until_s = simulation.bulk_bytes_received, simulation.now_s + seconds
    simulation.run(until_s)
    return (simulation.bulk_bytes_received - before) / seconds / simulation.link.rate_bytes_per_s


def late_waits_s(simulation: Simulation, from_s: float) -> list[float]:
    return sorted(wait.waited_s for wait in simulation.decode_waits if wait.offered_s >= from_s)


@pytest.mark.parametrize("jitter", [0.0, 0.2])
@pytest.mark.parametrize("round_trip_s", [0.002, 0.01, 0.03, 0.1])
@pytest.mark.parametrize("mbit", [10, 100, 1000])
def test_a_bulk_prefill_fills_the_link_and_decode_hardly_waits(mbit: float, round_trip_s: float, jitter: float) -> None:
    simulation = make_simulation(mbit, round_trip_s, jitter=jitter)
    simulation.keep_bulk_queued(3.0)
    for index in range(75):
        simulation.offer_at(index * 0.04, Traffic.DECODE, 2048)
    assert bulk_share(simulation, 1.0) >= (0.8 if round_trip_s < 0.1 else 0.2), "the first second"
    assert bulk_share(simulation, 1.9) >= 0.9
    waits = late_waits_s(simulation, 1.0)
    noise_s = 2 * jitter * (round_trip_s + 0.002)
    assert waits[len(waits) // 2] <= 0.020 + noise_s
    assert waits[-1] <= 0.035 + noise_s
    rate = simulation.sender.report().rate_bytes_per_s
    assert rate == pytest.approx(simulation.link.rate_bytes_per_s, rel=0.05)


@pytest.mark.parametrize("jitter", [0.05, 0.2])
@pytest.mark.parametrize(("mbit", "round_trip_s"), [(100, 0.03), (100, 0.002), (1000, 0.03), (100, 0.1)])
def test_bulk_gets_the_rest_beside_decode_in_bursts(mbit: float, round_trip_s: float, jitter: float) -> None:
    simulation = make_simulation(mbit, round_trip_s, jitter=jitter)
    simulation.keep_bulk_queued(6.0)
    simulation.offer_decode_bursts(0.5, 6.0, load=0.5)
    simulation.run(3.0)
    assert bulk_share(simulation, 2.9) >= 0.8 * 0.5
    waits = late_waits_s(simulation, 3.0)
    assert waits[len(waits) // 2] <= 0.020
    assert waits[-1] <= 0.035


@pytest.mark.parametrize("period_s", [0.03, 0.054, 0.077, 0.154, 0.3])
@pytest.mark.parametrize("load", [0.3, 0.5, 0.7, 0.85])
@pytest.mark.parametrize(("mbit", "round_trip_s"), [(10, 0.03), (10, 0.1), (100, 0.1)])
def test_bulk_gets_the_rest_whatever_the_beat_of_decode(
    mbit: float, round_trip_s: float, load: float, period_s: float
) -> None:
    simulation = make_simulation(mbit, round_trip_s, jitter=0.1)
    simulation.keep_bulk_queued(12.0)
    simulation.offer_decode_bursts(0.5, 12.0, load=load, period_s=period_s)
    simulation.run(6.0)  # the bulk that was under way when decode began is a queue that takes its time
    assert bulk_share(simulation, 5.9) >= 0.9 * (1 - load)
    assert late_waits_s(simulation, 6.0)[-1] <= 0.030


@pytest.mark.parametrize("share", [0.3, 0.5])
@pytest.mark.parametrize(("mbit", "round_trip_s"), [(10, 0.03), (100, 0.002), (100, 0.03), (100, 0.1)])
def test_where_others_send_too_bulk_takes_what_they_leave_and_makes_no_queue(
    mbit: float, round_trip_s: float, share: float
) -> None:
    simulation = make_simulation(mbit, round_trip_s, jitter=0.1)
    simulation.keep_bulk_queued(10.0)
    simulation.offer_decode_bursts(0.5, 10.0, load=0.05)
    simulation.share_with_others(2.0, 10.0, share=share)
    simulation.run(5.0)
    assert bulk_share(simulation, 4.9) >= 0.9 * (0.95 - share)
    waits = late_waits_s(simulation, 5.0)
    assert waits[len(waits) // 2] <= 0.015
    assert simulation.sender.report().rate_bytes_per_s == pytest.approx((1 - share) * mbit * MBIT, rel=0.1)


@pytest.mark.parametrize(("before", "after"), [(100, 10), (1000, 100), (10, 100), (100, 1000)])
@pytest.mark.parametrize("round_trip_s", [0.002, 0.03])
def test_a_link_that_changes_tenfold_is_followed(before: float, after: float, round_trip_s: float) -> None:
    simulation = make_simulation(before, round_trip_s, jitter=0.05)
    simulation.keep_bulk_queued(9.0)
    for index in range(220):
        simulation.offer_at(index * 0.04, Traffic.DECODE, 2048)
    simulation.run(3.0)
    simulation.link.rate_bytes_per_s = after * MBIT
    simulation.run(6.0)
    assert bulk_share(simulation, 2.9) >= 0.85
    assert late_waits_s(simulation, 6.0)[-1] <= 0.030
    rate = simulation.sender.report().rate_bytes_per_s
    assert rate == pytest.approx(simulation.link.rate_bytes_per_s, rel=0.1)


def test_bulk_that_never_pauses_does_not_forget_the_way_without_a_queue() -> None:
    simulation = make_simulation(10, 0.03)
    simulation.keep_bulk_queued(70.0)
    for index in range(1700):
        simulation.offer_at(index * 0.04, Traffic.DECODE, 2048)
    simulation.run(50.0)
    assert bulk_share(simulation, 19.0) >= 0.9
    assert late_waits_s(simulation, 50.0)[-1] <= 0.030
    assert simulation.sender.report().round_trip_s == pytest.approx(0.034, abs=0.008)


def test_the_baselines_make_decode_wait_as_the_scheme_says() -> None:
    longest = {}
    for scheduling in Scheduling:
        simulation = make_simulation(10, 0.03, scheduling=scheduling)
        for index in range(4):
            simulation.offer_at(1.0, Traffic.BULK, 1 << 20)
            simulation.offer_at(1.05 + index * 0.1, Traffic.DECODE, 8192)
        simulation.run(30.0)
        longest[scheduling] = max(wait.waited_s for wait in simulation.decode_waits)
    assert longest[Scheduling.ADAPTIVE] < longest[Scheduling.PUBLISHED] < longest[Scheduling.PLAIN]
    assert longest[Scheduling.PLAIN] > 2.0


@pytest.mark.parametrize(
    ("mbit", "round_trip_s", "stall_s"), [(1000, 0.0005, 0.03), (1000, 0.0005, 0.06), (100, 0.03, 0.03)]
)
def test_a_thin_stream_to_a_slow_receiver_does_not_pass_for_all_that_the_link_carries(
    mbit: float, round_trip_s: float, stall_s: float
) -> None:
    simulation = make_simulation(mbit, round_trip_s)
    simulation.link.stall_s = stall_s
    for index in range(600):
        simulation.offer_at(index * 0.02, Traffic.DECODE, 2400)
    chunk_bytes = 300_000
    for index in range(4):
        simulation.offer_at(8.0 + index, Traffic.BULK, chunk_bytes)
    simulation.run(7.9)
    simulation.run(12.0)
    assert simulation.bulk_bytes_received == 4 * chunk_bytes, "a chunk a second is nothing for this link"
