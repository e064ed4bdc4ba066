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
    window_bytes: int


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

    def at(self, when_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._count), act))

    def offer_at(self, when_s: float, traffic: Traffic, size_bytes: int) -> int:
        step = next(self._steps)
        self.at(when_s, lambda: self._offer(Parcel(step=step, traffic=traffic, size_bytes=size_bytes)))
        return step

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
        if send.traffic is Traffic.DECODE:
            self._decode_on_link = [(end_s, size) for end_s, size in self._decode_on_link if end_s > now_s]
            ahead = sum(size for _, size in self._decode_on_link)
            offered_s = self._offered_s.pop(send.step)
            window = self.sender.report().window_bytes
            self.decode_waits.append(DecodeWait(offered_s, begin_s - offered_s, ahead, window))
            self._decode_on_link.append((self._free_s, send.size_bytes))
        arrival_s = max(self._last_arrival_s, self._free_s + self._way_s())
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
