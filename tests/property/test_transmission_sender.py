"""The transmission scheduler under random traffic on random links: order, bounds, progress."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molink_common.messages import Scheduling
from molink_common.wire import Traffic
from molink_stage_worker.transmission import LinkSender, Parcel, SenderSettings
from tests.transmission_simulator import LinkModel, Simulation

ASSUMED = 12.5e6


def simulate(
    seed: int, *, seconds: float, decode_load: float, bulk_load: float, ack_loss: float, scheduling: Scheduling
) -> Simulation:
    dice = random.Random(seed)
    link = LinkModel(
        rate_bytes_per_s=10 ** dice.uniform(6, 8),
        one_way_s=dice.uniform(0.0005, 0.06),
        hop_s=dice.choice([0.0, 0.001]),
        jitter=dice.choice([0.0, 0.2]),
        ack_loss=ack_loss,
    )
    simulation = Simulation(LinkSender(scheduling, assumed_link_bytes_per_s=ASSUMED), link, seed=seed)
    simulation.offer_randomly(seconds, decode_load=decode_load, bulk_load=bulk_load)
    simulation.run(1e6)
    return simulation


def check_bounds(simulation: Simulation) -> None:
    rate = simulation.link.rate_bytes_per_s
    assert simulation.window_breaches == 0
    for wait in simulation.decode_waits:
        bound_s = (wait.bulk_ahead_bytes + wait.decode_ahead_bytes + SenderSettings().max_piece_bytes) / rate
        assert wait.waited_s <= bound_s, wait


@pytest.mark.parametrize("seed", range(12))
def test_many_random_sends_on_random_links(seed: int) -> None:
    dice = random.Random(seed)
    rate_share = dice.uniform(0.05, 0.5), dice.uniform(0.2, 0.7)
    simulation = simulate(
        seed,
        seconds=12,
        decode_load=rate_share[0],
        bulk_load=rate_share[1],
        ack_loss=dice.choice([0.0, 0.2]),
        scheduling=Scheduling.ADAPTIVE,
    )
    simulation.sender.check_invariants()
    simulation.check_deliveries()
    check_bounds(simulation)
    assert simulation.sender.report().queued_bytes == 0


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    decode_load=st.floats(0.01, 0.8),
    bulk_load=st.floats(0.01, 0.8),
    ack_loss=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    scheduling=st.sampled_from(Scheduling),
)
def test_everything_arrives_once_and_in_order_even_without_acknowledgements(
    seed: int, decode_load: float, bulk_load: float, ack_loss: float, scheduling: Scheduling
) -> None:
    simulation = simulate(
        seed, seconds=0.3, decode_load=decode_load, bulk_load=bulk_load, ack_loss=ack_loss, scheduling=scheduling
    )
    simulation.sender.check_invariants()
    simulation.check_deliveries()


@pytest.mark.parametrize("load", [0.3, 0.9, 1.2])
@pytest.mark.parametrize(("mbit", "round_trip_s"), [(10, 0.03), (100, 0.03), (100, 0.1)])
def test_bulk_progresses_whatever_decode_does(mbit: float, round_trip_s: float, load: float) -> None:
    link = LinkModel(rate_bytes_per_s=mbit * 125e3, one_way_s=round_trip_s / 2, hop_s=0.001, jitter=0.1)
    simulation = Simulation(LinkSender(Scheduling.ADAPTIVE, assumed_link_bytes_per_s=ASSUMED), link)
    simulation.keep_bulk_queued(6.0)
    simulation.offer_decode_bursts(0.5, 6.0, load=load)
    simulation.run(2.0)
    before = simulation.bulk_bytes_received
    simulation.run(6.0)
    share = (simulation.bulk_bytes_received - before) / 4.0 / link.rate_bytes_per_s
    longest_wait_s = max(wait.waited_s for wait in simulation.decode_waits)
    assert simulation.longest_bulk_gap_s <= longest_wait_s + 2 * round_trip_s + 0.1
    assert share >= 0.02
    if load < 1:
        assert share >= 0.5 * (1 - load)


class SenderMoves:
    """Random calls in any order, with stale, repeated and invented acknowledgements."""

    def __init__(self, seed: int, scheduling: Scheduling) -> None:
        self.dice = random.Random(seed)
        self.sender = LinkSender(scheduling, assumed_link_bytes_per_s=ASSUMED)
        self.now_s = 100.0
        self.sent: list[tuple[Traffic, int, int]] = []
        self.offered: dict[int, int] = {}
        self.finished: set[int] = set()
        self.step = 0

    def move(self) -> None:
        self.now_s += self.dice.choice([0.0, 1e-6, 1e-3, 0.02, 3.0])
        match self.dice.choice(["offer", "next", "next", "next", "ack", "invented", "cut"] + ["ack"] * 3):
            case "offer":
                self.step += 1
                self.offered[self.step] = self.dice.choice([1, 100, 8193, 70_000, 500_000])
                traffic = self.dice.choice(list(Traffic))
                self.sender.offer(
                    Parcel(step=self.step, traffic=traffic, size_bytes=self.offered[self.step]), self.now_s
                )
            case "next":
                if (send := self.sender.next(self.now_s)) is not None:
                    self.sent.append((send.traffic, send.step, send.offset + send.size_bytes))
            case "ack" if self.sent:
                received_us = round((self.now_s + self.dice.choice([0.0, 0.0, -5.0, 5.0])) * 1e6)
                self.sender.on_ack(*self.dice.choice(self.sent[-8:]), received_us, self.now_s)
            case "invented":
                self.sender.on_ack(Traffic.BULK, self.dice.randrange(50), self.dice.randrange(9999), 0, self.now_s)
            case "cut" if self.dice.random() < 0.1:
                forgotten = self.sender.on_cut_off()
                assert set(forgotten) <= set(self.offered)
                assert self.sender.next(self.now_s) is None
                assert self.sender.report().under_way_bytes == self.sender.report().queued_bytes == 0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 32), scheduling=st.sampled_from(Scheduling))
def test_the_books_agree_whatever_is_called(seed: int, scheduling: Scheduling) -> None:
    moves = SenderMoves(seed, scheduling)
    for _ in range(150):
        moves.move()
        moves.sender.check_invariants()
