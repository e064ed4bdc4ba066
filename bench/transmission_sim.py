"""The transmission scheduler on simulated links, in virtual time: no network, the same code as in a worker.

    python -m bench.transmission_sim                  the tables, and a million random sends
    python -m bench.transmission_sim --sends 100000

Goodput and rate are shares of what the link carries; waits are what held a decode frame up on the link.
"""

from __future__ import annotations

import argparse
import itertools
import random
from statistics import mean, median

from molink_common.messages import Scheduling
from molink_common.wire import Traffic
from molink_stage_worker.transmission import LinkSender
from tests.transmission_simulator import LinkModel, Simulation

_ROUND_TRIPS_S = (0.002, 0.03, 0.1)
_LINKS = [(mbit, round_trip_s) for mbit in (10, 100, 1000) for round_trip_s in _ROUND_TRIPS_S]
_LOADS = (0.3, 0.5, 0.7, 0.85)
_PERIODS_S = (0.03, 0.054, 0.077, 0.154, 0.3)


def make_simulation(scheduling: Scheduling, mbit: float, round_trip_s: float, jitter: float) -> Simulation:
    link = LinkModel(rate_bytes_per_s=mbit * 125e3, one_way_s=round_trip_s / 2, hop_s=0.001, jitter=jitter)
    return Simulation(LinkSender(scheduling, assumed_link_bytes_per_s=12.5e6), link, keeps_deliveries=False)


def show_link(scheduling: Scheduling, mbit: float, round_trip_s: float, jitter: float, decode_load: float) -> None:
    """One line: ten seconds of bulk beside decode, the first two not counted."""
    simulation = make_simulation(scheduling, mbit, round_trip_s, jitter)
    simulation.keep_bulk_queued(10.0)
    simulation.offer_decode_bursts(0.5, 10.0, load=decode_load)
    simulation.run(2.0)
    before = simulation.bulk_bytes_received
    simulation.run(9.9)
    carried = 7.9 * simulation.link.rate_bytes_per_s
    share = (simulation.bulk_bytes_received - before) / carried / (1 - decode_load)
    waits_ms = sorted(1e3 * wait.waited_s for wait in simulation.decode_waits if wait.offered_s >= 2.0)
    report = simulation.sender.report()
    rate = (report.rate_bytes_per_s or 0.0) / simulation.link.rate_bytes_per_s
    print(
        f"{scheduling:9}  {mbit:5} Mbit/s {1e3 * round_trip_s:4.0f} ms  "
        f"jitter {jitter:.1f}  decode {decode_load:4.2f}  "
        f"bulk of the rest {share:5.3f}  wait p50 {waits_ms[len(waits_ms) // 2]:6.1f} "
        f"p95 {waits_ms[int(0.95 * len(waits_ms))]:6.1f} max {waits_ms[-1]:6.1f} ms  "
        f"rate {rate:4.2f}  window {report.window_bytes >> 10} KiB"
    )


def show_beats(mbit: float) -> None:
    """Bulk beside decode frames of many sizes and beats: one line for all of them, twelve seconds each."""
    shares, waits_ms = [], []
    for round_trip_s, load, period_s, unsteady in itertools.product(_ROUND_TRIPS_S, _LOADS, _PERIODS_S, (0.0, 0.5)):
        simulation = make_simulation(Scheduling.ADAPTIVE, mbit, round_trip_s, 0.1)
        rate, dice, at_s = simulation.link.rate_bytes_per_s, random.Random(3), 0.5
        simulation.keep_bulk_queued(16.0)
        while at_s < 16.0:
            simulation.offer_at(at_s, Traffic.DECODE, round(load * period_s * rate))
            at_s += period_s * (1 + unsteady * dice.uniform(-1, 1))
        simulation.run(4.0)
        before = simulation.bulk_bytes_received
        simulation.run(15.9)
        shares.append((simulation.bulk_bytes_received - before) / 11.9 / rate / (1 - load))
        waits_ms.append(median(1e3 * wait.waited_s for wait in simulation.decode_waits if wait.offered_s > 4.0))
    print(
        f"{len(shares)} beats of decode at {mbit} Mbit/s: bulk got {mean(shares):.2f} of the rest "
        f"(least {min(shares):.2f}, {sum(share < 0.8 for share in shares)} below 0.8); "
        f"decode waited {mean(waits_ms):.1f} ms in the middle"
    )


def send_randomly(sends: int) -> None:
    """Random traffic on random links, with lost acknowledgements, checked delivery by delivery."""
    done = broken = links = 0
    worst_share = 0.0
    while done < sends:
        dice = random.Random(links)
        link = LinkModel(
            rate_bytes_per_s=10 ** dice.uniform(6, 8),
            one_way_s=dice.uniform(0.0005, 0.06),
            hop_s=0.001,
            jitter=dice.choice([0.0, 0.2]),
            ack_loss=dice.choice([0.0, 0.2]),
        )
        simulation = Simulation(LinkSender(Scheduling.ADAPTIVE, assumed_link_bytes_per_s=12.5e6), link, seed=links)
        simulation.offer_randomly(20.0, decode_load=dice.uniform(0.05, 0.5), bulk_load=dice.uniform(0.2, 0.7))
        simulation.run(1e6)
        simulation.check_deliveries()
        simulation.sender.check_invariants()
        for wait in simulation.decode_waits:
            bound_s = (wait.bulk_ahead_bytes + wait.decode_ahead_bytes + (64 << 10)) / link.rate_bytes_per_s
            worst_share = max(worst_share, wait.waited_s / bound_s)
            broken += wait.waited_s > bound_s
        broken += simulation.window_breaches
        done, links = done + simulation.sends, links + 1
    decode = Traffic.DECODE.name.lower()
    print(f"{done} random sends on {links} links: everything arrived once and in order; {broken} bounds broken;")
    print(f"the longest {decode} wait was {worst_share:.2f} of one window drain plus one piece plus decode before it")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sends", type=int, default=1_000_000)
    sends = parser.parse_args().sends
    for decode_load in (0.02, 0.5, 0.8):
        for mbit, round_trip_s in _LINKS:
            show_link(Scheduling.ADAPTIVE, mbit, round_trip_s, 0.1, decode_load)
    for mbit in (10, 100):
        show_beats(mbit)
    for scheduling in (Scheduling.PUBLISHED, Scheduling.PLAIN):
        show_link(scheduling, 100, 0.03, 0.1, 0.5)
    send_randomly(sends)


if __name__ == "__main__":
    main()
