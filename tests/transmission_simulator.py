"""A link with a virtual clock, for the transmission scheduler: FIFO, rate, delay, a broker between, acknowledgements.

    sender ─▶ rate (FIFO) ─▶ delay, hop, jitter ─▶ receiver ─▶ delay, hop ─▶ on_ack

The receiver's clock has nothing to do with the sender's.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from molink_common.wire import Traffic
from molink_stage_worker.transmission import LinkSender, Parcel, Send

RECEIVER_CLOCK_S = 4321.0


@dataclass(kw_only=True)
class LinkModel:
    """May be changed while it runs."""

    rate_bytes_per_s: float
    one_way_s: float
    hop_s: float = 0.0
    """More, each way, in the broker."""
    jitter: float = 0.0
    """Each way takes up to this share of the delay longer. Order is kept."""
    ack_loss: float = 0.0
    stall_s: float = 0.0
    """The receiver looks at what has come up to so much later."""

    @property
    def round_trip_s(self) -> float:
        return 2 * (self.one_way_s + self.hop_s)


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message that arrived."""

    send: Send
    sent_s: float
    arrived_s: float


@dataclass
class DecodeWait:
    """What held a decode frame up on the link."""

    offered_s: float
    waited_s: float
    """Beside its own transmission and the way."""
    decode_ahead_bytes: int
    """Other decode frames that were on the link before it."""
    bulk_ahead_bytes: int
    """Bulk that was under way: on the link, or its acknowledgement on the way back."""


@dataclass
class Simulation:
    """Offers what was planned with `offer_at`, obeys the sender, and writes down what arrives."""

    sender: LinkSender
    link: LinkModel
    seed: int = 0
    now_s: float = 0.0
    deliveries: list[Delivery] = field(default_factory=list)
    decode_waits: list[DecodeWait] = field(default_factory=list)
    keeps_deliveries: bool = True
    bulk_bytes_received: int = 0
    bytes_received: int = 0
    sends: int = 0
    window_breaches: int = 0
    """Pieces that were sent though the window was full."""
    longest_bulk_gap_s: float = 0.0
    """Between two arrivals of bulk while some was waiting all the time."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._steps = itertools.count(1)
        self._free_s = self._last_arrival_s = self._last_ack_s = 0.0
        self._last_bulk_s: float | None = None
        self._bulk_waiting = 0
        self._wake_s: float | None = None
        self._decode_on_link: list[tuple[float, int]] = []
        self._offered_s: dict[int, float] = {}
        self._offer_order: dict[int, int] = {}
        self._sizes: dict[int, int] = {}

    def at(self, when_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._count), act))

    def offer_at(self, when_s: float, traffic: Traffic, size_bytes: int) -> int:
        step = next(self._steps)
        self.at(when_s, lambda: self._offer(Parcel(step=step, traffic=traffic, size_bytes=size_bytes)))
        return step

    def keep_bulk_queued(self, until_s: float, frame_bytes: int = 1 << 20) -> None:
        """From now on bulk always waits, until then."""

        def feed() -> None:
            while self.sender.report().queued_bytes < 4 * frame_bytes:
                step = next(self._steps)
                self._offer(Parcel(step=step, traffic=Traffic.BULK, size_bytes=frame_bytes))
            again_s = self.now_s + frame_bytes / self.link.rate_bytes_per_s
            if again_s < until_s:
                self.at(again_s, feed)

        self.at(self.now_s, feed)

    def offer_decode_bursts(self, from_s: float, until_s: float, *, load: float, period_s: float = 0.040) -> None:
        """A decode frame every `period_s`, `load` of what the link carries."""
        count = round((until_s - from_s) / period_s)
        for index in range(count):
            self.offer_at(
                from_s + index * period_s, Traffic.DECODE, round(load * period_s * self.link.rate_bytes_per_s)
            )

    def share_with_others(self, from_s: float, until_s: float, *, share: float, period_s: float = 0.004) -> None:
        """Somebody else's messages go over the link, too: so much of what it carries."""

        def send() -> None:
            self._free_s = max(self._free_s, self.now_s) + share * period_s
            if self.now_s + period_s < until_s:
                self.at(self.now_s + period_s, send)

        self.at(from_s, send)

    def offer_randomly(self, until_s: float, *, decode_load: float, bulk_load: float) -> None:
        """Frames of all sizes at random times, so much of what the link carries."""
        dice = self._random
        for traffic, load, least, most in (
            (Traffic.DECODE, decode_load, 200, 100_000),
            (Traffic.BULK, bulk_load, 300, 3_000_000),
        ):
            when_s = dice.random() * 0.1
            while when_s < until_s:
                size = round(least * (most / least) ** dice.random())
                self.offer_at(when_s, traffic, size)
                when_s += dice.expovariate(load * self.link.rate_bytes_per_s / size)

    def check_deliveries(self) -> None:
        """Each frame arrived whole, each byte once, in the order of offering within its class."""
        for traffic in Traffic:
            expected_offset, last_step = 0, 0
            for send in (delivery.send for delivery in self.deliveries if delivery.send.traffic is traffic):
                assert send.offset == expected_offset, send
                assert send.step == last_step if send.offset else self._comes_after(last_step, send.step), send
                expected_offset += send.size_bytes
                size = self._sizes[send.step]
                assert send.is_last == (expected_offset == size), send
                assert expected_offset <= size, send
                last_step = send.step
                if send.is_last:
                    expected_offset = 0
            assert expected_offset == 0, "a frame stayed unfinished"
        assert self.bytes_received == sum(self._sizes.values())

    def _comes_after(self, earlier: int, later: int) -> bool:
        return self._offer_order.get(earlier, -1) < self._offer_order[later]

    def run(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            when_s, _, act = heapq.heappop(self._events)
            self.now_s = max(self.now_s, when_s)
            act()
            self.pump()
        self.now_s = max(self.now_s, until_s)

    def pump(self) -> None:
        while (send := self.sender.next(self.now_s)) is not None:
            self._transmit(send)
        wake_s = self.sender.wake_at_s()
        if wake_s is not None and wake_s != self._wake_s:
            self._wake_s = wake_s
            self.at(max(wake_s, self.now_s), lambda: None)

    def _offer(self, parcel: Parcel) -> None:
        self._offered_s[parcel.step] = self.now_s
        self._offer_order[parcel.step] = len(self._sizes)
        self._sizes[parcel.step] = parcel.size_bytes
        if parcel.traffic is Traffic.BULK:
            if self._bulk_waiting == 0:
                self._last_bulk_s = self.now_s
            self._bulk_waiting += parcel.size_bytes
        self.sender.offer(parcel, self.now_s)

    def _transmit(self, send: Send) -> None:
        self.sends += 1
        link, now_s = self.link, self.now_s
        begin_s = max(now_s, self._free_s)
        transmission_s = send.size_bytes / link.rate_bytes_per_s
        self._free_s = begin_s + transmission_s
        if send.traffic is Traffic.BULK:
            report = self.sender.report()
            if report.under_way_bytes > max(report.window_bytes, send.size_bytes):
                self.window_breaches += 1
        else:
            self._decode_on_link = [(end_s, size) for end_s, size in self._decode_on_link if end_s > now_s]
            ahead = sum(size for _, size in self._decode_on_link)
            offered_s = self._offered_s.pop(send.step)
            bulk_ahead = self.sender.report().under_way_bytes
            self.decode_waits.append(DecodeWait(offered_s, begin_s - offered_s, ahead, bulk_ahead))
            self._decode_on_link.append((self._free_s, send.size_bytes))
        stall_s = link.stall_s * self._random.random()
        arrival_s = max(self._last_arrival_s, self._free_s + self._way_s() + stall_s)
        self._last_arrival_s = arrival_s
        self.at(arrival_s, lambda: self._arrive(Delivery(send, now_s, arrival_s)))

    def _arrive(self, delivery: Delivery) -> None:
        send = delivery.send
        if self.keeps_deliveries:
            self.deliveries.append(delivery)
        self.bytes_received += send.size_bytes
        if send.traffic is Traffic.BULK:
            self.bulk_bytes_received += send.size_bytes
            self._bulk_waiting -= send.size_bytes
            if self._last_bulk_s is not None:
                self.longest_bulk_gap_s = max(self.longest_bulk_gap_s, self.now_s - self._last_bulk_s)
            self._last_bulk_s = self.now_s if self._bulk_waiting else None
        if self._random.random() < self.link.ack_loss:
            return
        received_us = round((RECEIVER_CLOCK_S + self.now_s) * 1e6)
        ack_s = max(self._last_ack_s, self.now_s + self._way_s())
        self._last_ack_s = ack_s
        end = send.offset + send.size_bytes
        self.at(ack_s, lambda: self.sender.on_ack(send.traffic, send.step, end, received_us, self.now_s))

    def _way_s(self) -> float:
        link = self.link
        return (link.one_way_s + link.hop_s) * (1 + link.jitter * self._random.random())
